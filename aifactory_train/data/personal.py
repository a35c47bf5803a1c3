"""Personal data in rows: counts per kind, never the text.

:func:`scan` reads rows once and counts e-mail addresses, telephone numbers, IBANs, payment cards, IP addresses and the identity numbers of
``personal_numbers.py``. Nothing that was matched leaves this module: neither the result nor a message of an error holds a piece of a row.

How it is fast: only places with an ``@``, a run of digits or ``::`` are looked at. A run of digits is split into its groups, and neighbouring groups
are looked up by layout (``"6-4"``), so a number costs a few dictionary look-ups instead of one pattern per kind.

What it does not find: names, addresses, dates of birth, numbers that are misspelt, and numbers written with other than ASCII digits. It is a gate
that says "look here", no proof that rows are free of personal data.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from aifactory_train.data.personal_numbers import IBAN_LENGTH, LETTERED, NUMBERS, Number, iban

# Kinds beside the identity numbers, with their sources.
OTHER_KINDS = {
    "email": "RFC 5321 and 5322: dot-atom @ domain with a top-level name",
    "phone": "ITU-T E.164: + or 00, country code, at most 15 digits; national numbers with a leading 0 and groups, or after a word such as tel",
    "iban": "ISO 13616, SWIFT IBAN registry; ISO/IEC 7064 MOD 97-10",
    "ipv4": "RFC 791 (loopback, multicast and unspecified addresses are left out)",
    "ipv6": "RFC 4291",
}
# Numbers whose check lets about one in ten random numbers pass count without a word beside them only when they fill a column: at least
# this many, and this share of all numbers of that layout.
COLUMN_LEAST, COLUMN_SHARE = 5, 0.5
CONTEXT_BEFORE, CONTEXT_AFTER = 48, 16


@dataclass
class Report:
    """What :func:`scan` found: ``counts`` and ``rows`` (rows with at least one) per kind; ``possible``: numbers that pass the check of a weak
    kind with nothing beside them to say so, not contained in ``counts``; ``bytes`` (UTF-8) and ``texts`` that were read."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    possible: dict[str, int] = field(default_factory=dict)
    texts: int = 0

    @property
    def found(self) -> bool:
        return bool(self.counts)


def kinds() -> dict[str, str]:
    """Every kind that :func:`scan` counts, with the public source of its form and check."""
    return dict(OTHER_KINDS) | {n.kind: n.source for n in NUMBERS + LETTERED}


def scan(rows: Iterable[str], hint: str = "") -> Report:
    """Counts of personal data in ``rows``.

    ``hint`` is text that stands beside every row, such as the name of its column: it counts as context for numbers whose check alone says
    little. Raises TypeError for a row that is not a string (the message names its position, not its content).
    """
    report = Report()
    counts: Counter[str] = Counter()
    in_rows: Counter[str] = Counter()
    weak: Counter[str] = Counter()
    weak_rows: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    hint = hint.casefold()
    for position, row in enumerate(rows):
        if not isinstance(row, str):
            raise TypeError(f"row {position}: text is expected, not {type(row).__name__}")
        report.texts += 1
        report.bytes += len(row) if row.isascii() else len(row.encode("utf-8", "surrogatepass"))
        found: Counter[str] = Counter()
        unsure: Counter[str] = Counter()
        if "@" in row:
            found["email"] += _emails(row)
        if "::" in row or row.count(":") >= 7:
            found["ipv6"] += _ipv6(row)
        if _ANY_DIGIT.search(row):
            _numbers(row, hint, found, unsure, tried)
        for kind, n in found.items():
            if n:
                counts[kind] += n
                in_rows[kind] += 1
        for kind, n in unsure.items():
            weak[kind] += n
            weak_rows[kind] += 1
    for kind, n in weak.items():
        if _BY_KIND[kind].column and n >= COLUMN_LEAST and n >= COLUMN_SHARE * tried[kind]:
            counts[kind] += n
            in_rows[kind] += weak_rows[kind]
        else:
            report.possible[kind] = n
    report.counts, report.rows = dict(sorted(counts.items())), dict(sorted(in_rows.items()))
    return report


# --------------------------------------------------------------------------- addresses

_LOCAL_END = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}\Z")
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,63}(?![\w@])")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{2,39}(?![\w:]|\.[0-9])")


def _emails(text: str) -> int:
    """Number of addresses: for every ``@`` a domain behind it and a local part before it."""
    n, at = 0, text.find("@")
    while at >= 0:
        if _DOMAIN.match(text, at + 1):
            local = _LOCAL_END.search(text[max(0, at - 64) : at])
            n += bool(local) and not local.group().startswith(".") and not local.group().endswith(".")
        at = text.find("@", at + 1)
    return n


def _ipv6(text: str) -> int:
    """Addresses with at least three groups and a digit (``a::b`` is more often code), loopback and unspecified left out."""
    n = 0
    for match in _IPV6.finditer(text):
        word = match.group().removesuffix(":") if not match.group().endswith("::") else match.group()
        if word.count(":") < 2 or sum(bool(g) for g in word.split(":")) < 3 or not any(c.isdigit() for c in word):
            continue
        try:
            address = ipaddress.IPv6Address(word)
        except ValueError:  # not an address: nothing to count (its message holds the text and goes nowhere)
            continue
        n += not (address.is_loopback or address.is_unspecified or address.is_multicast)
    return n


# --------------------------------------------------------------------------- numbers

_ANY_DIGIT = re.compile(r"[0-9]")
# From a first digit: letters and digits, and up to three separators if a digit follows. Seven characters at least.
_BLANK = " \u00a0\u2009\u202f"
_HYPHEN = "-\u2010\u2011\u2012\u2013"
_CLUSTER = re.compile(rf"[0-9](?:[0-9A-Za-z]|[-{_BLANK}{_HYPHEN[1:]}./+()]{{1,3}}(?=[0-9])){{6,}}")
_SAME = str.maketrans(dict.fromkeys(_BLANK, " ") | dict.fromkeys(_HYPHEN, "-"))
_IBAN = re.compile(r"[0-9][0-9](?<=[A-Za-z]{2}[0-9]{2})(?<![0-9A-Za-z][A-Za-z]{2}[0-9]{2})")
_GROUPS = re.compile(r"[0-9]+|[^0-9]+")
_LETTERED = re.compile(
    r"(?<![0-9A-Za-z])(?:"
    r"(?P<it_cf>[A-Z]{6}[0-9L-NP-V]{2}[A-EHLMPRST][0-9L-NP-V]{2}[A-Z][0-9L-NP-V]{3}[A-Z])"
    r"|(?P<es_nie>[XYZ][ -]?[0-9]{7}[ -]?[A-Z])"
    r"|(?P<gb_nino>[A-Z]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D])"
    r"|(?P<de_rvnr>[0-9]{2} ?[0-9]{6} ?[A-Z] ?[0-9]{3})"
    r"|(?P<es_dni>[0-9]{8}-?[A-Z])"
    r"|(?P<ie_pps>[0-9]{7}[A-W][A-IWTX]?)"
    r"|(?P<fi_hetu>[0-9]{6}[-+A-FU-Y][0-9]{3}[0-9A-FHJ-NPR-Y])"
    r")(?![0-9A-Za-z])",
    re.IGNORECASE,
)
_ALNUM = re.compile(r"[^0-9A-Za-z]+")
_LETTER = re.compile(r"[A-Za-z]")
_BY_KIND = {n.kind: n for n in NUMBERS + LETTERED}
# Several kinds share a shape: all are asked, in this order.
_SAME_SHAPE = {"es_dni": ("es_dni", "cy_tic"), "ie_pps": ("ie_pps", "mt_id")}
_BY_LAYOUT: dict[str, list[Number]] = {}
for _number in NUMBERS:
    for _layout in _number.layouts:
        _BY_LAYOUT.setdefault(_layout, []).append(_number)
_BEGINNINGS = {
    layout[: group.start()] for layout in _BY_LAYOUT for group in re.finditer(r"[^0-9]", layout)
}  # "2.2" of "2.2.2-3.2"
_PHONE_WORDS = (
    "tel",
    "phone",
    "mobil",
    "handy",
    "fax",
    "tél",
    "teléf",
    "telef",
    "puh.",
    "tlf",
    "gsm",
    "τηλ",
    "тел",
    "whatsapp",
    "call ",
)


def _context(text: str, start: int, end: int, hint: str) -> str:
    """Lower-case text around a number, with the hint."""
    return f"{hint} {text[max(0, start - CONTEXT_BEFORE) : start]} {text[end : end + CONTEXT_AFTER]}".casefold()


def _choose(candidates: list[Number], context: str) -> Number | None:
    """Of the kinds whose check a number passes: the one that the context names, else the first that needs none."""
    for number in candidates:
        if any(word in context for word in number.context):
            return number
    return next((n for n in candidates if n.alone), None)


def _numbers(text: str, hint: str, found: Counter[str], unsure: Counter[str], tried: Counter[str]) -> None:
    """Adds what the numbers of one text are to ``found``; ``unsure`` gets weak kinds without context, ``tried`` how many had such a layout."""
    taken: list[tuple[int, int]] = []
    for match in _IBAN.finditer(text):
        end = _iban_end(text, match.start() - 2)
        if end:
            found["iban"] += 1
            taken.append((match.start() - 2, end))
    for cluster in _CLUSTER.finditer(text):
        start, end = cluster.span()
        if any(start < b and a < end for a, b in taken):
            continue
        raw = cluster.group()
        if (start and text[start - 1].isalpha()) or text[max(0, start - 3) : start].isupper() or _LETTER.search(raw):
            _lettered(text, start, end, hint, found, unsure, tried)
            if not _french(text, start, raw, hint, found):
                for part in _digit_parts(raw, start, text):
                    _groups(text, *part, hint, found, unsure, tried)
        else:
            _groups(text, raw, start, hint, found, unsure, tried)


def _iban_end(text: str, start: int) -> int:
    """Where the IBAN that begins at ``start`` ends, 0 if there is none."""
    length = IBAN_LENGTH.get(text[start : start + 2].upper())
    if not length:
        return 0
    kept: list[str] = []
    for place in range(start, min(len(text), start + 2 * length)):
        char = text[place]
        if char.isalnum() and char.isascii():
            kept.append(char)
            if len(kept) == length:
                after = text[place + 1 : place + 2]
                return place + 1 if not after.isalnum() and iban("".join(kept).upper()) else 0
        elif char not in " \u00a0\u202f-" or not text[place - 1].isalnum():
            return 0
    return 0


def _lettered(
    text: str, start: int, end: int, hint: str, found: Counter[str], unsure: Counter[str], tried: Counter[str]
) -> None:
    """Numbers with letters in and around one cluster."""
    low, high = max(0, start - 9), min(len(text), end + 3)
    while high < len(text) and text[high].isalnum() and high < end + 12:
        high += 1
    while low and text[low - 1].isalnum() and low > start - 24:
        low -= 1
    for match in _LETTERED.finditer(text, low, high):
        shape = match.lastgroup or ""
        clean = _ALNUM.sub("", match.group()).upper() if shape != "fi_hetu" else match.group().upper()
        passed = [_BY_KIND[k] for k in _SAME_SHAPE.get(shape, (shape,)) if _fits(k, clean) and _BY_KIND[k].check(clean)]
        weak = [_BY_KIND[k] for k in _SAME_SHAPE.get(shape, ()) if not _BY_KIND[k].alone and _fits(k, clean)]
        _count(passed, weak, text, *match.span(), hint, found, unsure, tried)


def _fits(kind: str, clean: str) -> bool:
    return len(clean) in {len(layout) for layout in _BY_KIND[kind].layouts}


def _french(text: str, start: int, raw: str, hint: str, found: Counter[str]) -> bool:
    """A French NIR of Corsica, with 2A or 2B as its department."""
    clean = _ALNUM.sub("", raw).upper()
    if len(clean) != 15 or clean[5:7] not in ("2A", "2B"):
        return False
    digits = clean[:5] + ("19" if clean[6] == "A" else "18") + clean[7:]
    if not digits.isdigit() or not _BY_KIND["fr_nir"].check(digits):
        return False
    found["fr_nir"] += 1
    return True


def _digit_parts(raw: str, start: int, text: str) -> Iterator[tuple[str, int]]:
    """Parts of a cluster with letters that hold digits and separators alone and touch no letter."""
    for match in re.finditer(r"(?<![0-9A-Za-z])[0-9](?:[^A-Za-z]{5,}[0-9])(?![0-9A-Za-z])", raw):
        if match.start() or not (start and text[start - 1].isalpha()):
            yield match.group(), start + match.start()


def _groups(
    text: str, raw: str, start: int, hint: str, found: Counter[str], unsure: Counter[str], tried: Counter[str]
) -> None:
    """Digits and separators: every run of neighbouring groups whose layout some kind has, the longest first; what is left may be a phone."""
    if _after_digit_text(text, start):
        return
    pieces = _GROUPS.findall(raw.translate(_SAME))
    places, at = [], start
    for piece in pieces:
        places.append(at)
        at += len(piece)
    n = len(pieces)
    if n == 7 and pieces[1] == pieces[3] == pieces[5] == "." and _ipv4(pieces[0::2], text, start, at):
        found["ipv4"] += 1
        return
    like_phone = pieces[0].startswith("0" if n > 1 else "00") or (start and text[start - 1] in "+(")
    if like_phone and _phone(pieces, text, start, at):
        found["phone"] += 1
        return
    first = 0
    while first < n:
        layout, sizes = "", []  # the layouts that begin here, as long as some kind's layout begins like this
        for i in range(first, n, 2):
            layout += str(len(pieces[i])) if i == first else pieces[i - 1] + str(len(pieces[i]))
            if layout in _BY_LAYOUT:
                sizes.append((i, layout))
            if layout not in _BEGINNINGS:
                break
        for last, layout in reversed(sizes):
            kinds_here = _BY_LAYOUT[layout]
            digits = pieces[first] if last == first else "".join(pieces[first : last + 1 : 2])
            passed = [k for k in kinds_here if k.check(digits)]
            weak = [k for k in kinds_here if not k.alone]
            if _count(passed, weak, text, places[first], places[last] + len(pieces[last]), hint, found, unsure, tried):
                first = last
                break
        else:
            if _phone_word(text, places[first], hint):
                length = sum(len(p) for p in pieces[first::2])
                if 7 <= length <= 15 and not _dated(pieces[first:]):
                    found["phone"] += 1
                    return
        first += 2


def _after_digit_text(text: str, start: int) -> bool:
    """Whether the digits continue something: ``1.234`` after a comma, an amount, a word."""
    if not start:
        return False
    before = text[start - 1]
    return before.isalnum() or before == "_" or (before in ",." and start > 1 and text[start - 2].isdigit())


def _count(passed: list[Number], weak: list[Number], text: str, start: int, end: int, hint: str, found: Counter[str],
           unsure: Counter[str], tried: Counter[str]) -> bool:  # fmt: skip
    """Counts one number; True if it was one for certain."""
    if not passed:
        for number in weak:
            tried[number.kind] += 1
        return False
    number = _choose(passed, _context(text, start, end, hint))
    if number is not None:
        found[number.kind] += 1
        return True
    for number in weak:
        tried[number.kind] += 1
    for number in passed:
        unsure[number.kind] += 1
    return False


def _ipv4(groups: list[str], text: str, start: int, end: int) -> bool:
    if any(len(g) > 3 or int(g) > 255 or (len(g) > 1 and g[0] == "0") for g in groups) or text[end : end + 1].isalnum():
        return False
    return 0 < int(groups[0]) < 224 and groups[0] != "127"


# --------------------------------------------------------------------------- telephone

# Country codes of one and two digits; all others have three digits and begin with one of the listed zones (ITU-T E.164, list of 2016).
_CODES_2 = frozenset(
    str(c)
    for c in (
        20,
        27,
        *range(30, 35),
        36,
        *range(39, 42),
        *range(43, 50),
        *range(51, 59),
        *range(60, 67),
        81,
        82,
        84,
        86,
        *range(90, 96),
        98,
    )
)
_CODES_3 = ("21", "22", "23", "24", "25", "26", "29", "35", "37", "38", "42", "50", "59", "67", "68", "80", "85", "87", "88", "96", "97", "99")  # fmt: skip


def _international(digits: str) -> bool:
    return 8 <= len(digits) <= 15 and (digits[0] in "17" or digits[:2] in _CODES_2 or digits[:2] in _CODES_3)


def _dated(pieces: list[str]) -> bool:
    """Whether the groups hold a date or a clock time: ``01.02.2024``, ``2024-02-01``."""
    for i in range(0, len(pieces) - 4, 2):
        lengths = tuple(len(p) for p in pieces[i : i + 5 : 2])
        if (
            pieces[i + 1] == pieces[i + 3]
            and pieces[i + 1] in ".-/"
            and lengths in ((2, 2, 4), (4, 2, 2), (1, 2, 4), (2, 1, 4), (1, 1, 4))
        ):
            return True
    return False


def _phone(pieces: list[str], text: str, start: int, end: int) -> bool:
    """A whole cluster as a telephone number; at most the first 15 digits in groups are taken."""
    plus = text[max(0, start - 2) : start].endswith(("+", "+("))
    if (
        any(len(p) > 1 and not set(p) <= set(" ()-") for p in pieces[1::2])
        or text[end : end + 1].isalnum()
        or _dated(pieces)
    ):
        return False
    digits = "".join(pieces[0::2])
    if plus:
        return _international(digits.replace("0", "", 1) if "(0)" in "".join(pieces) else digits)
    if digits.startswith("00") and not digits.startswith("000") and _international(digits[2:]):
        return len(pieces) > 1 or len(digits) >= 11
    if len(pieces) < 3 or (pieces[0] == "0" and pieces[1] == "."):
        return False
    return digits[0] == "0" and digits[1] != "0" and 9 <= len(digits) <= 12 and all(len(p) <= 8 for p in pieces[::2])


def _phone_word(text: str, start: int, hint: str) -> bool:
    before = f"{hint} {text[max(0, start - 16) : start]}".casefold()
    return any(word in before for word in _PHONE_WORDS)
