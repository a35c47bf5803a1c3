"""The Python API: what ``import aifactory_train as af`` offers, on top of the rooms that the commands use.

Everything here is imported by the name that :data:`aifactory_train.__all__` gives it, never by its module, so that
modules can move. Errors are :class:`aifactory_train.UserError` (the request is wrong) and
:class:`aifactory_train.RunFailed` (the work failed), as on the command line.
"""
