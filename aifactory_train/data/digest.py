"""What identifies prepared rows."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory_train.data import TokenDataset


def data_digest(rows: TokenDataset) -> str:
    """Of what the cursor counts: the documents' lengths and supervised tokens, in order."""
    return hashlib.sha256(rows.lengths.tobytes() + rows.supervised.tobytes()).hexdigest()
