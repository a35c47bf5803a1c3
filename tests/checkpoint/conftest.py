"""The scripts that ranks run lie beside the tests that start them."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "parallel")]
