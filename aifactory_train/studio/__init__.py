"""``aifactory studio``: a local page from rows to a trained model. It runs commands of ``aifactory`` and shows each.

Nothing here computes what a command computes: a page asks for values, a command of its own process gives them as JSON,
and a template shows them. So a reader of a broken file ends no server, and a server that ends ends no training.
"""
