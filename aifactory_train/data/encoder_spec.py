"""What decides how a row becomes tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides how a row becomes tokens; small, picklable, hashed into the cache key.

    ``tokenizer_json`` is the fast tokenizer serialised; ``special_ids`` all its special and added tokens; ``stop_ids``
    those that end an assistant's turn (found by :func:`probe`); ``eos_id`` ends a plain text; ``tool_template`` renders
    rows with tools where the tokenizer has a template of its own for them; ``control_tokens``:
    ``data.control_tokens_in_content``.
    """

    tokenizer_json: str
    template: str | None
    specials: dict[str, str]
    special_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    eos_id: int | None
    sequence_length: int
    long_documents: str
    supervise: str
    tool_template: str | None = None
    control_tokens: str = "as_text"

    def digest(self) -> str:
        rest = [getattr(self, name) for name in self.__dataclass_fields__ if name != "tokenizer_json"]
        digest = hashlib.sha256(self.tokenizer_json.encode())
        digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()
