"""aifactory-train: fine-tune language models on Europe's AI Factories.

A recipe says what to train, a site says where, and everything between them is derived, shown and checked before a GPU hour
is spent.
"""

__version__ = "0.1.0"
