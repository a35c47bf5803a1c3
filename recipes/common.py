"""What the converters share: reading a source, asking in one of several directions, and how rows are held out.

Sources of a trade (ontologies, standards, catalogues) repeat themselves: the same sentence describes a left and a right hand,
a direct and an alternating current. A plain random split would test what was trained. Here an entry goes to training or to
the held-out part by the hash of its *group* (entries that differ in numbers only share one), and of the held-out entries only
those are kept whose wording no training entry holds.
"""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError

#: Words in a row that are compared, and the share of them that one training entry may hold.
SHINGLE, SHARE = 4, 0.5

PARTS = ("train", "held_out")


def share_of(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone: the same on every machine, and in every release."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def words(text: str) -> list[str]:
    """Lower-case words without numbers: what two entries are compared by."""
    return re.findall(r"[^\W\d_]+", text.lower())


def fingerprint(text: str) -> str:
    """The group of a text: equal for texts that differ in numbers, case and punctuation only."""
    return hashlib.sha256(" ".join(words(text)).encode()).hexdigest()[:16]


def check_part(part: str) -> None:
    if part not in PARTS:
        raise UserError(f"unknown part '{part}'", where="data: options.part", fix="train or held_out")


def check_share(held_out: float) -> None:
    if not 0 < held_out < 1:
        raise UserError(f"held_out is {held_out}", where="data: options.held_out", fix="a share between 0 and 1")


def parted(entries: Iterable[dict[str, Any]], part: str, held_out: float = 0.15) -> Iterator[dict[str, Any]]:
    """The entries of one part.

    Args:
        entries: dicts with ``wording`` (the text that is compared) and, optional, ``group`` (entries that belong together;
            default: the fingerprint of the wording). Both keys stay in what is yielded.
        part: ``train`` or ``held_out``.
        held_out: share of the groups that is held out; fewer entries than that remain, see below.

    A held-out entry is left out if one training entry holds at least half of its four-word sequences. Both parts are the same
    in every call, and the same whichever part is asked for first.
    """
    check_part(part)
    check_share(held_out)
    train: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    for entry in entries:
        entry.setdefault("group", fingerprint(entry["wording"]))
        (held if share_of(entry["group"]) < held_out else train).append(entry)
    if part == "train":
        yield from train
        return
    repeated = repeats([e["wording"] for e in held], [e["wording"] for e in train])
    yield from (e for e, again in zip(held, repeated, strict=True) if not again)


def repeats(texts: Sequence[str], others: Sequence[str]) -> list[bool]:
    """For each of ``texts``: whether one of ``others`` holds at least :data:`SHARE` of its :data:`SHINGLE`-word sequences."""
    mine = [_shingles(text) for text in texts]
    wanted = set().union(*mine) if mine else set()
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, text in enumerate(others):
        for shingle in _shingles(text) & wanted:
            where[shingle].append(number)
    found = []
    for shingles in mine:
        shared: dict[int, int] = defaultdict(int)
        for shingle in shingles:
            for number in where.get(shingle, ()):
                shared[number] += 1
        found.append(bool(shared) and max(shared.values()) >= SHARE * len(shingles))
    return found


def _shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    width = min(SHINGLE, len(found))
    return {tuple(found[i : i + width]) for i in range(len(found) - width + 1)} if found else set()


def some(entries: Iterable[dict[str, Any]], path: Path, what: str) -> Iterator[dict[str, Any]]:
    """The entries as they come; a :class:`UserError` that names the file if there are none."""
    found = False
    for entry in entries:
        found = True
        yield entry
    if not found:
        raise no_rows(path, what)


def distinct(
    entries: Iterable[dict[str, Any]], path: Path, what: str, min_words: int = 1, max_words: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """Entries whose ``wording`` has that many words and has not come before; a :class:`UserError` if none has."""

    def kept() -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        for entry in entries:
            wording = entry["wording"]
            if wording not in seen and min_words <= len(wording.split()) <= max_words:
                seen.add(wording)
                yield entry

    return some(kept(), path, what)


def chat(entry: dict[str, Any], key: str, prompt: str, completion: str, system: str) -> dict[str, Any]:
    """One row in the ``prompt`` form, with its identity and its group."""
    return {"id": key, "group": entry["group"], "prompt": prompt, "completion": completion, "system": system}


def asked(
    entries: Iterable[dict[str, Any]],
    directions: Mapping[str, tuple[str, str]],
    direction: str,
    *,
    part: str,
    held_out: float,
    system: str,
) -> Iterator[dict[str, Any]]:
    """Rows that ask about the entries of one part in one direction, e.g. name to definition or definition to name.

    Args:
        entries: as for :func:`parted`, each with an ``id``.
        directions: the converter's directions, each with the templates of prompt and completion; ``{name}`` is the
            entry's value of that name.
        direction: the one that is asked.
        part, held_out: as for :func:`parted`.
        system: the system message of every row.
    """
    prompt, completion = directions[choose(direction, directions, "direction")]
    for entry in parted(entries, part, held_out):
        key = f"{entry['id']}/{direction}"
        yield chat(entry, key, prompt.format_map(entry), completion.format_map(entry), system)


def choose(value: str, known: Collection[str], option: str) -> str:
    """``value`` if it is one of ``known``; a :class:`UserError` that lists them otherwise."""
    if value not in known:
        raise UserError(
            f"unknown {option} '{value}'", where=f"data: options.{option}", fix=f"one of {', '.join(known)}"
        )
    return value


def plain(text: str) -> str:
    """Without line breaks and runs of spaces."""
    return re.sub(r"\s+", " ", text).strip()


def read_text(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """A text file; what is not text in that encoding is a :class:`UserError` that names the file."""
    try:
        return path.read_text(encoding=encoding, errors=errors)
    except UnicodeDecodeError as error:
        raise UserError(f"not {encoding} text: {error.reason}", where=str(path)) from None
    except IsADirectoryError:
        raise UserError("is a folder, not a file", where=str(path)) from None


def unescaped(text: str) -> str:
    """What stands between the quotes of an OBO or Turtle string, on one line: backslashes resolved."""
    return plain(re.sub(r"\\(.)", lambda m: " " if m[1] == "n" else m[1], text))


def read_xml(path: Path) -> ElementTree.Element:
    """Root of an XML file; what is not XML is a :class:`UserError` that names the file."""
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise not_xml(path, error) from None


def not_xml(path: Path, error: ElementTree.ParseError) -> UserError:
    """The error for a file that cannot be parsed."""
    return UserError(f"not XML: {error}", where=str(path))


def tag(node: ElementTree.Element) -> str:
    """Name of an XML element without its namespace."""
    return node.tag.rpartition("}")[2]


def child(node: ElementTree.Element, name: str) -> ElementTree.Element | None:
    """First child of that name, in whatever namespace."""
    return next((c for c in node if tag(c) == name), None)


def no_rows(path: Path, what: str) -> UserError:
    """The error for a file that was read and holds nothing of the kind."""
    return UserError(f"holds no {what}", where=str(path), fix="check that this is the file the recipe was written for")
