"""``python -m aifactory_train`` is the same program as the console script ``aifactory``."""

import sys

from aifactory_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
