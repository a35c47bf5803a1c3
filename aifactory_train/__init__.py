"""aifactory-train: fine-tune language models on Europe's AI Factories.

A recipe says what to train, a site says where, and everything between them is derived, shown and checked before a GPU
hour is spent.
"""

import os as _os

__version__ = "0.1.0"

# A child of a process whose privacy profile closed the way out: closed here, too, before anything else is imported.
if "AIFACTORY_EGRESS_NODES" in _os.environ:
    from aifactory_train.private import egress as _egress

    _egress.close(_os.environ[_egress.VARIABLE].split(","))
