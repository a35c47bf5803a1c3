"""aifactory-train: fine-tune language models on Europe's AI Factories.

A recipe says what to train, a site says where, and everything between them is derived, shown and checked before a GPU hour
is spent.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a source checkout the rooms kernels/, launchers/, recipes/ and sites/ lie beside this package; an installed wheel holds
# them inside it. Adding the checkout's root to __path__ gives both the same import names (python -m aifactory_train works
# from the root without installing anything).
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).resolve().parent / "sites").is_dir() and (_root / "sites" / "__init__.py").is_file():
    __path__.append(str(_root))
