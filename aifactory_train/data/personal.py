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
class PersonalDataFound:
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


def scan(rows: Iterable[str], hint: str = "") -> PersonalDataFound:
    """Counts of personal data in ``rows``.

    ``hint`` is text that stands beside every row, such as the name of its column: it counts as context for numbers whose check alone says
    little. Raises TypeError for a row that is not a string (the message names its position, not its content).
    """
    report = PersonalDataFound()
    counts: Counter[str] = Counter()
    in_rows: Counter[str] = Counter()
    weak: Counter[str] = Counter()
    weak_rows: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    hint = hint.casefold()
    for position, row in enumerate(rows):
        if not isinstance(row, str):
            raise TypeError(f"row {position}: expected text, got {type(row).__name__}")
        report.texts += 1
        report.bytes += len(row) if row.isascii() else len(row.encode("utf-8", "surrogatepass"))
        tally = Tally(tried)
        if "@" in row:
            tally.found["email"] += _emails(row)
        if "::" in row or row.count(":") >= 7:
            tally.found["ipv6"] += _ipv6(row)
        if _ANY_DIGIT.search(row):
            _numbers(row, hint, tally)
        for kind, n in tally.found.items():
            if n:
                counts[kind] += n
                in_rows[kind] += 1
        for kind, n in tally.unsure.items():
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


class Tally:
    """Counts of one text: ``found``, and ``unsure``: weak kinds whose check passed without context. ``tried`` (of the whole scan) counts the
    numbers that had the layout of a weak kind, passed or not."""

    def __init__(self, tried: Counter[str]):
        self.found: Counter[str] = Counter()
        self.unsure: Counter[str] = Counter()
        self.tried = tried

    def certain(self, passed: list[Number], text: str, start: int, end: int, hint: str) -> bool:
        """Count a number as the kind that the context names, else as the first that needs no context; False if there is neither."""
        if not passed:
            return False
        context = f"{hint} {text[max(0, start - CONTEXT_BEFORE) : start]} {text[end : end + CONTEXT_AFTER]}".casefold()
        named = (n for n in passed if any(word in context for word in n.context))
        number = next(named, None) or next((n for n in passed if n.alone), None)
        if number is not None:
            self.found[number.kind] += 1
        return number is not None

    def possible(self, candidates: list[Number], passed: list[Number]) -> None:
        for number in candidates:
            if not number.alone:
                self.tried[number.kind] += 1
                if number in passed:
                    self.unsure[number.kind] += 1


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
            n += local is not None and local.group().strip(".") == local.group()
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
# From a first digit: letters and digits, and up to three separators if a digit follows, seven characters at least; then a last letter.
_BLANK = " \u00a0\u2009\u202f"
_HYPHEN = "-\u2010\u2011\u2012\u2013"
_CLUSTER = re.compile(
    rf"[0-9](?:[0-9A-Za-z]|[-{_BLANK}{_HYPHEN[1:]}./+()]{{1,3}}(?=[0-9])){{6,}}(?:-[A-Za-z](?![0-9A-Za-z]))?"
)
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
    r"|(?P<ie_pps>[0-9]{7}[A-Z][A-IWTX]?)"
    r"|(?P<fi_hetu>[0-9]{6}[-+A-FU-Y][0-9]{3}[0-9A-FHJ-NPR-Y])"
    r")(?![0-9A-Za-z])",
    re.IGNORECASE,
)
_DIGIT_PART = re.compile(r"(?<![0-9A-Za-z])[0-9][^A-Za-z]{5,}[0-9](?![0-9A-Za-z])")
_SEPARATORS = re.compile(r"[^0-9A-Za-z]+")
_FIVE_DIGITS = re.compile(r"(?:[0-9][^0-9]*){5}")
_PHONE_DIGITS = 15  # at most (E.164)
_FEWEST = 9  # digits of the shortest number beside addresses and telephone numbers after a word
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
_PHONE_WORDS = re.compile(
    r"(?<!\w)(?:tel|tél|phone|mobil|móvil|handy|cell|fax|puh|tlf|gsm|τηλ|κιν|тел|моб|whatsapp)", re.IGNORECASE
)


def _numbers(text: str, hint: str, tally: Tally) -> None:
    """Adds to ``tally`` what the numbers of one text are."""
    taken: list[tuple[int, int]] = []
    for match in _IBAN.finditer(text):
        end = _iban_end(text, match.start() - 2)
        if end:
            tally.found["iban"] += 1
            taken.append((match.start() - 2, end))
    for cluster in _CLUSTER.finditer(text):
        start, end = cluster.span()
        if taken and any(start < b and a < end for a, b in taken):
            continue
        raw = cluster.group()
        if (start and text[start - 1].isalpha()) or text[max(0, start - 3) : start].isupper() or _LETTER.search(raw):
            if _FIVE_DIGITS.search(raw):
                _lettered(text, start, end, hint, tally)
                if not _french(raw, tally):
                    for part, place in _digit_parts(raw, start, text):
                        _groups(text, part, place, hint, tally)
        else:
            _groups(text, raw, start, hint, tally)


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
        elif char not in _BLANK or not text[place - 1].isalnum():
            return 0
    return 0


def _lettered(text: str, start: int, end: int, hint: str, tally: Tally) -> None:
    """Numbers with letters in and around one cluster."""
    low, high = max(0, start - 9), min(len(text), end + 3)
    while high < len(text) and text[high].isalnum() and high < end + 12:
        high += 1
    while low and text[low - 1].isalnum() and low > start - 24:
        low -= 1
    for match in _LETTERED.finditer(text, low, high):
        shape = match.lastgroup or ""
        clean = match.group().upper() if shape == "fi_hetu" else _SEPARATORS.sub("", match.group()).upper()
        candidates = [_BY_KIND[k] for k in _SAME_SHAPE.get(shape, (shape,)) if _fits(k, clean)]
        passed = [n for n in candidates if n.check(clean)]
        if not tally.certain(passed, text, *match.span(), hint):
            tally.possible(candidates, passed)


def _fits(kind: str, clean: str) -> bool:
    return any(len(clean) == len(layout) for layout in _BY_KIND[kind].layouts)


def _french(raw: str, tally: Tally) -> bool:
    """A French NIR of Corsica, with 2A or 2B as its department."""
    clean = _SEPARATORS.sub("", raw).upper()
    if len(clean) != 15 or clean[5:7] not in ("2A", "2B"):
        return False
    digits = clean[:5] + ("19" if clean[6] == "A" else "18") + clean[7:]
    if not digits.isdigit() or not _BY_KIND["fr_nir"].check(digits):
        return False
    tally.found["fr_nir"] += 1
    return True


def _digit_parts(raw: str, start: int, text: str) -> Iterator[tuple[str, int]]:
    """Parts of a cluster with letters that hold digits and separators alone and touch no letter."""
    for match in _DIGIT_PART.finditer(raw):
        if match.start() or not (start and text[start - 1].isalpha()):
            yield match.group(), start + match.start()


def _groups(text: str, raw: str, start: int, hint: str, tally: Tally) -> None:
    """Digits and separators: at every group a telephone number with a plus sign, else the longest run of groups whose layout and check
    some kind has, else another telephone number, else numbers that may be something."""
    pieces = _GROUPS.findall(raw.translate(_SAME))
    n, length = len(pieces), sum(map(len, pieces[::2]))
    if length < _FEWEST and (length < 4 or n != 7) and not (length >= 7 and _phone_word(text, start, hint)):
        return
    if _continues(text, start):
        return
    if n == 7 and pieces[1] == pieces[3] == pieces[5] == "." and _ipv4(pieces[0::2], text, start + len(raw)):
        tally.found["ipv4"] += 1
        return
    places, at = [], start
    for piece in pieces:
        places.append(at)
        at += len(piece)
    first = 0
    while first < n:
        before = pieces[first - 1] if first else text[max(0, start - 2) : start]
        ahead = pieces[first : first + 2 * _PHONE_DIGITS + 1]  # a telephone number has no more groups than digits
        after = text[at : at + 1] if first + len(ahead) >= n else ""
        used = _phone(ahead, before, after) if "+" in before else 0
        if used:
            tally.found["phone"] += 1
            first += used + 1
            continue
        layout, here = "", []  # the layouts that begin at this group, as long as some kind's layout begins like this
        for last in range(first, n, 2):
            layout += (pieces[last - 1] if last > first else "") + str(len(pieces[last]))
            if layout in _BY_LAYOUT:
                here.append((last, _BY_LAYOUT[layout]))
            if layout not in _BEGINNINGS:
                break
        unsure = []
        for last, candidates in reversed(here):
            digits = pieces[first] if last == first else "".join(pieces[first : last + 1 : 2])
            passed = [k for k in candidates if k.check(digits)]
            if tally.certain(passed, text, places[first], places[last] + len(pieces[last]), hint):
                first = last
                break
            unsure.append((candidates, passed))
        else:
            dialled = pieces[first].startswith("00") or (first == 0 and n > 1 and pieces[0][0] == "0")
            used = _phone(ahead, before, after) if dialled else 0
            if not used and _phone_word(text, places[first], hint) and not _dated(ahead):
                used = _fill(ahead, 7, _PHONE_DIGITS)
            if used:
                tally.found["phone"] += 1
                first += used - 1
            else:
                for candidates, passed in unsure:
                    tally.possible(candidates, passed)
        first += 2


def _continues(text: str, start: int) -> bool:
    """Whether the digits continue something: an amount (``1,234``), a word, a decimal number."""
    if not start:
        return False
    before = text[start - 1]
    return before.isalnum() or before == "_" or (before in ",." and start > 1 and text[start - 2].isdigit())


def _ipv4(groups: list[str], text: str, end: int) -> bool:
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


def _fill(pieces: list[str], least: int, most: int) -> int:
    """How many pieces, groups and separators, make ``least`` to ``most`` digits; as many as possible, 0 if none do."""
    total = used = 0
    for i in range(0, len(pieces), 2):
        total += len(pieces[i])
        if total > most:
            break
        used = i + 1 if total >= least else used
    return used


def _phone(pieces: list[str], before: str, after: str) -> int:
    """How many of the pieces from here on are a telephone number; 0 for none."""
    used = _fill(pieces, 8, _PHONE_DIGITS + 1)
    if not used or (used == len(pieces) and after.isalnum()):
        return 0
    pieces = pieces[:used]
    if any(len(p) > 1 and not set(p) <= set(" ()-") for p in pieces[1::2]) or _dated(pieces):
        return 0
    digits = "".join(pieces[0::2])
    if "+" in before:
        if pieces[2:3] == ["0"] and "(" in pieces[1]:  # +49 (0)30: this 0 is not dialled
            digits = pieces[0] + "".join(pieces[4::2])
        return used if _international(digits) else 0
    if before.endswith(
        (":", ".")
    ):  # an identifier such as HP:0012345, a decimal; behind a word such as tel: it is found all the same
        return 0
    if pieces[0].startswith("00"):
        return used if digits[2] != "0" and _international(digits[2:]) and (used > 1 or len(digits) >= 11) else 0
    if used < 3 or pieces[0] == "0" or len(pieces[0]) > 6:
        return 0
    good = digits[0] == "0" and 9 <= len(digits) <= 12 and all(len(p) <= 8 for p in pieces[::2])
    dots = "." in pieces[1::2]
    return used if good and (not dots or [len(p) for p in pieces[::2]] == [2] * 5) else 0


def _phone_word(text: str, start: int, hint: str) -> bool:
    return bool(_PHONE_WORDS.search(text, max(0, start - 16), start) or (hint and _PHONE_WORDS.search(hint)))
