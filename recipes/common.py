"""What the converters share: reading a source, asking in one of several directions, and how rows are held out.

Sources of a trade (ontologies, standards, catalogues) repeat themselves: the same sentence describes a left and a right
hand, a direct and an alternating current. A plain random split would test what was trained. Here an entry goes to
training or to the held-out part by the hash of its *group* (entries that differ in numbers only share one), and of the
held-out entries only those are kept whose wording no training entry holds.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
        entries: dicts with ``wording`` (the text that is compared) and, optional, ``group`` (entries that belong
        together;
            default: the fingerprint of the wording). Both keys stay in what is yielded.
        part: ``train`` or ``held_out``.
        held_out: share of the groups that is held out; fewer entries than that remain, see below.

    A held-out entry is left out if one training entry holds at least half of its four-word sequences. Both parts are
    the same in every call, and the same whichever part is asked for first.
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
    """For each of ``texts``: whether one of ``others`` holds at least :data:`SHARE` of its :data:`SHINGLE`-word
    sequences.
    """
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


def distinct(entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of the entries with one ``wording`` the first."""
    seen: set[str] = set()
    for entry in entries:
        if entry["wording"] not in seen:
            seen.add(entry["wording"])
            yield entry


def chat(entry: dict[str, Any], key: str, prompt: str, completion: str, system: str) -> dict[str, Any]:
    """One row in the ``prompt`` form, with its identity and its group."""
    return {"id": key, "group": entry["group"], "prompt": prompt, "completion": completion, "system": system}


#: Joins the docstring of each converter that :func:`asked` makes.
_OPTIONS = """
    And as of every converter of this kind:
        part: ``train`` or ``held_out``.
        direction: {directions}.
        held_out: share of the wordings (or of their groups) that is held out.
        min_words, max_words: shorter and longer wordings are left out.
"""


def asked(
    system: str,
    directions: Mapping[str, tuple[str, str]],
    *,
    held_out: float = 0.15,
    what: str | None = None,
    words: tuple[float, float] = (1, float("inf")),
    once: bool = True,
) -> Callable[[Callable[..., Iterable[dict[str, Any]]]], Callable[..., Iterator[dict[str, Any]]]]:
    """Make a converter of a function that reads entries: its rows ask about them in one of several directions.

    The function takes the path, and by keyword the options of its source; its entries are as for :func:`parted`, each
    with an ``id``. The converter takes the options of this module besides: ``part``, ``direction``, ``held_out``,
    ``min_words`` and ``max_words``.

    Args:
        system: the system message of every row.
        directions: each with the templates of prompt and completion; ``{name}`` is the entry's value of that name. The
        first one
            is asked where the recipe names none.
        held_out: default share of what is held out.
        what: what a source without any entry holds none of, for the refusal; None: such a source is not refused.
        words: default of the least and most words of a wording.
        once: of the entries with one wording only the first is taken.
    """

    def converter(entries: Callable[..., Iterable[dict[str, Any]]]) -> Callable[..., Iterator[dict[str, Any]]]:
        common: dict[str, Any] = {"part": "train", "direction": next(iter(directions)), "held_out": held_out}
        common |= {"min_words": words[0], "max_words": words[1]}

        @functools.wraps(entries)
        def rows(path: Path, **options: Any) -> Iterator[dict[str, Any]]:
            given = {name: options.pop(name, default) for name, default in common.items()}
            least, most, direction = given["min_words"], given["max_words"], given["direction"]
            found: Iterable[dict[str, Any]] = entries(path, **options)
            found = (entry for entry in found if least <= len(entry["wording"].split()) <= most)
            found = distinct(found) if once else found
            found = some(found, path, what) if what else found
            prompt, completion = directions[choose(direction, directions, "direction")]
            for entry in parted(found, given["part"], given["held_out"]):
                key = f"{entry['id']}/{direction}"
                yield chat(entry, key, prompt.format_map(entry), completion.format_map(entry), system)

        first, *own = inspect.signature(entries).parameters.values()
        shared = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in common.items()]
        # Options are checked against the signature, and people are sent to the docstring.
        rows.__signature__ = inspect.Signature([first, *shared, *own])  # type: ignore[attr-defined]
        rows.__doc__ = f"{(entries.__doc__ or '').rstrip()}\n{_OPTIONS.format(directions=' or '.join(directions))}"
        return rows

    return converter


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
