"""A tokenizer as the fields of a GGUF file, read from ``tokenizer.json``.

llama.cpp knows two tokenizers of interest here. ``gpt2`` is byte-level BPE: tokens, merges, and the *name* of the rule
that cuts text into words before the merges; the rule itself is compiled into llama.cpp (``src/llama-vocab.cpp``).
``llama`` is SentencePiece-BPE: tokens with scores. The name is found from the rule that ``tokenizer.json`` states, so a
tokenizer with added tokens gets the name of the one it came from; a rule without a name is refused, since a wrong one
degrades answers silently.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_TEKKEN_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
TEKKEN = f"{_UPPER}|{_LOWER}" + r"|\p{N}" + _TEKKEN_TAIL
GPT4O = f"{_UPPER}{_CONTRACTIONS}?|{_LOWER}{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _TEKKEN_TAIL

#: (steps that cut text, whether whole words are taken without merging; None: either) -> ``tokenizer.ggml.pre``, after
#: the regular expressions and flags that llama.cpp has for each name (src/llama-vocab.cpp, read in October 2026).
RULES: dict[tuple[tuple[str, ...], bool | None], str] = {
    (("byte level, words",), False): "gpt-2",
    (("digits", "byte level, words"), False): "smollm",
    ((f"split {LLAMA3}", "byte level"), True): "llama-bpe",
    ((f"split {LLAMA3}", "byte level"), False): "smaug-bpe",  # the words of Llama 3, always merged
    ((f"split {QWEN2}", "byte level"), False): "qwen2",
    ((f"split {TEKKEN}", "byte level"), None): "tekken",
    ((f"split {GPT4O}", "byte level"), False): "gpt-4o",
}
WAY_OUT = (
    "export the safetensors (without --format gguf) and convert that folder with llama.cpp's convert_hf_to_gguf.py, "
    "which knows more models"
)


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens (``llama_token_type``)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class GgufTokenizer:
    """Content of the ``tokenizer.ggml.*`` fields; ``tokens``, ``types`` and ``scores`` have one entry per row of the
    embedding.
    """

    model: str  # gpt2 | llama
    pre: str  # name of the word rule; "default" for llama
    tokens: list[str]
    types: list[int]
    scores: list[float] | None  # llama only
    merges: list[str] | None  # gpt2 only
    special: dict[str, int]  # bos, eos, eot, unk, pad -> token id
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    template: str | None


def read_tokenizer(folder: Path, rows: int, ends: list[int]) -> GgufTokenizer:
    """The tokenizer saved in ``folder`` for an embedding of ``rows`` rows; ``ends`` are the ids that end an answer,
    first the one that was trained. Raises :class:`UserError` for a tokenizer that llama.cpp cannot reproduce."""
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError("the tokenizer has no tokenizer.json", where=str(folder), fix=WAY_OUT)
    stated = json.loads(path.read_text(encoding="utf-8"))
    model = stated["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"a tokenizer of type {model.get('type')} has no form that this export knows", where=str(path), fix=WAY_OUT
        )
    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    vocabulary = {**model["vocab"], **{t["content"]: t["id"] for t in stated.get("added_tokens", [])}}
    if max(vocabulary.values()) >= rows:
        raise UserError(
            f"token {max(vocabulary.values())} of the tokenizer has no row in the embedding, which has {rows}",
            where=str(path),
        )
    added = {t["id"]: t for t in stated.get("added_tokens", [])}
    by_id = {number: text for text, number in vocabulary.items()}
    if model.get("byte_fallback"):
        name, pre, prefix = "llama", "default", _space_prefix(stated, path)
        scores: list[float] | None = _scores(model, by_id, rows)
        merges = None
    else:
        name, pre, prefix = "gpt2", word_rule(stated, path), False
        scores, merges = None, _merges(model)
    tokens, types = [], []
    for number in range(rows):
        text = by_id.get(number)
        tokens.append(f"[PAD{number}]" if text is None else text)  # the embedding is often padded to a round number
        types.append(_type(text, added.get(number), name, getattr(loaded, "unk_token_id", None) == number))
    named = {kind: getattr(loaded, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    special = {kind: int(number) for kind, number in named.items() if number is not None}
    if ends:
        # Answers end where the training taught it. The tokenizer's own end of text stays one of the ends that llama.cpp
        # knows.
        if ends[0] != special.get("eos"):
            special["eot"] = ends[0]
        special.setdefault("eos", ends[0])
    plain, whole = loaded("a", add_special_tokens=False).input_ids, loaded("a").input_ids
    return GgufTokenizer(
        model=name,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        special=special,
        add_bos=len(whole) > len(plain) and whole[0] == special.get("bos"),
        add_eos=len(whole) > len(plain) and whole[-1] == special.get("eos"),
        add_space_prefix=prefix,
        template=loaded.chat_template if isinstance(loaded.chat_template, str) else None,
    )


# ---- byte-level BPE


def word_rule(stated: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of the rule by which ``tokenizer.json`` cuts text into words."""
    steps = tuple(s for part in _parts(stated.get("pre_tokenizer"), "pretokenizers") if (s := _step(part)))
    whole = bool(stated["model"].get("ignore_merges"))
    normalizers = [part["type"] for part in _parts(stated.get("normalizer"), "normalizers")]
    name = RULES.get((steps, whole)) or RULES.get((steps, None))
    # llama.cpp normalises nothing; NFC changes nothing in text that is composed already, as nearly all is.
    if name is None or set(normalizers) - {"NFC"}:
        shown = ", ".join([*normalizers, *steps]) or "none"
        raise UserError(
            f"llama.cpp has no name that is known here for this tokenizer's way of cutting text: {shown[:300]}",
            where=str(path),
            fix=WAY_OUT,
        )
    return name


def _parts(node: Any, key: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [leaf for part in node[key] for leaf in _parts(part, key)] if node["type"] == "Sequence" else [node]


def _step(part: dict[str, Any]) -> str | None:
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "byte level, words" if part.get("use_regex", True) else "byte level"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern = part["pattern"].get("Regex", "")
        return "digits" if pattern in (r"\p{N}", r"\d") else f"split {pattern}"
    return json.dumps(part)  # a step without a name is found in no rule


def _merges(model: dict[str, Any]) -> list[str]:
    """``"left right"`` per merge; a space within a part is written as llama.cpp's byte-level alphabet has it."""
    out = []
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        out.append(" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in parts))
    return out


# ---- SentencePiece-BPE


def _space_prefix(stated: dict[str, Any], path: Path) -> bool:
    """Whether text gets a space before its first word."""
    prefix = False
    for part in _parts(stated.get("normalizer"), "normalizers"):
        if part["type"] == "Prepend" and part.get("prepend") == "▁":
            prefix = True
        elif part != {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            raise UserError(f"llama.cpp does not do the normalisation {part['type']}", where=str(path), fix=WAY_OUT)
    for part in _parts(stated.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] != "Metaspace" or part.get("replacement") != "▁" or part.get("split", True):
            raise UserError(f"llama.cpp does not cut text by {part['type']}", where=str(path), fix=WAY_OUT)
        prefix = part.get("prepend_scheme") in ("always", "first")
    return prefix


def _scores(model: dict[str, Any], by_id: dict[int, str], rows: int) -> list[float]:
    """SentencePiece merges the pair whose result has the best score, ``tokenizer.json`` the first one in its list: the
    place of the first merge that makes a token, negated, is a score that gives the same order."""
    made: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        made.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), place)
    return [-float(made.get(by_id.get(number, ""), 0)) for number in range(rows)]


def _type(text: str | None, added: dict[str, Any] | None, model: str, unknown: bool) -> int:
    if text is None:
        return TokenType.UNUSED
    if unknown and model == "llama":
        return TokenType.UNKNOWN
    if added is not None:
        looks = re.fullmatch(r"<\|.*\|>|<｜.*｜>", text)
        return TokenType.CONTROL if added.get("special") or looks else TokenType.USER_DEFINED
    if model == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return TokenType.BYTE
    return TokenType.NORMAL
