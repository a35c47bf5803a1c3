"""Invented personal data for tests and the benchmark: numbers with right check digits that belong to nobody in
particular.

Every kind has a beginning that fits (a date, a country, a prefix); the other places are drawn until the check digits
are right. So samples say how well numbers are *found in text*; whether the checks themselves are right is tested with
published examples and with python-stdnum.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from aifactory_train.data.personal_numbers import IBAN_LENGTH, LETTERED, NUMBERS, Number

Draw = random.Random
BY_KIND = {n.kind: n for n in NUMBERS + LETTERED}
IBAN_COUNTRIES = ("DE", "FR", "NL", "ES", "IT", "FI", "GB", "MT", "PL", "BE")
KINDS = ("email", "phone", "iban", "ipv4", "ipv6", *BY_KIND)


def _date(r: Draw) -> tuple[str, str, str]:
    """Day, month, two digits of a year between 1940 and 1999."""
    return f"{r.randint(1, 28):02d}", f"{r.randint(1, 12):02d}", f"{r.randint(40, 99):02d}"


def _ddmmyy(r: Draw) -> str:
    return "".join(_date(r))


def _yymmdd(r: Draw) -> str:
    return "".join(reversed(_date(r)))


_BEGIN: dict[str, Callable[[Draw], str]] = {
    "card": lambda r: r.choice(("4", "51", "55")),
    "ch_ahv": lambda r: "756",
    "fr_nir": lambda r: f"{r.choice('12')}{r.randint(40, 99)}{r.randint(1, 12):02d}{r.randint(1, 95):02d}",
    "ro_cnp": lambda r: r.choice("12") + _yymmdd(r) + f"{r.randint(1, 46):02d}",
    "lu_matricule": lambda r: "19" + _yymmdd(r),
    "jmbg": lambda r: (lambda d: d[0] + d[1] + "9" + d[2])(_date(r)) + "50",
    "es_nuss": lambda r: f"{r.randint(1, 50):02d}",
    "se_personnummer": _yymmdd,
    "be_nn": lambda r: r.choice("789") + _yymmdd(r)[1:],
    "no_fnr": lambda r: _ddmmyy(r) + r.choice("0123"),
    "ee_lt_code": lambda r: r.choice("34") + _yymmdd(r),
    "gr_amka": _ddmmyy,
    "lv_pk": lambda r: _ddmmyy(r) + "1",
    "pl_pesel": _yymmdd,
    "is_kennitala": _ddmmyy,
    "at_svnr": lambda r: "".join(r.choices("123456789", k=1) + r.choices(string.digits, k=3)) + _ddmmyy(r),
    "cz_sk_rc": _yymmdd,
    "bg_egn": _yymmdd,
    "hu_tax_id": lambda r: f"8{r.randint(20000, 50000)}",
    "dk_cpr": _ddmmyy,
    "ua_rnokpp": lambda r: f"{r.randint(15000, 40000)}",
    "pt_nif": lambda r: r.choice("123"),
    "it_cf": lambda r: "".join(r.choices(string.ascii_uppercase, k=6)) + f"{r.randint(40, 99)}{r.choice('ABCDEHLMPRST')}{r.randint(1, 28):02d}",  # noqa: E501
    "es_nie": lambda r: r.choice("XYZ"),
    "fi_hetu": lambda r: _ddmmyy(r) + "-" + r.choice("12345678"),
    "de_rvnr": lambda r: f"{r.randint(10, 80)}" + _ddmmyy(r),
    "gb_nino": lambda r: r.choice(("AB", "CE", "JH", "PR")),
}  # fmt: skip


def number(kind: str, r: Draw) -> str:
    """A valid number of an identity kind or a card, without separators (Finnish ones with their sign of the
    century).
    """
    entry = BY_KIND[kind]
    shape = entry.layouts[0] if entry in LETTERED else "9" * sum(map(int, entry.layouts[0].translate(_SPLIT).split()))
    while True:
        text = _BEGIN.get(kind, lambda _: "")(r)
        for place in shape[len(text) :]:
            text += r.choice(string.ascii_uppercase) if place == "A" else r.choice(string.digits)
        if entry.check(text) and (kind != "is_kennitala" or text.endswith("9")):
            return text


_SPLIT = str.maketrans("-./+", "    ")


def laid_out(entry: Number, digits: str, layout: str) -> str:
    """Digits with the separators of a layout: ``laid_out(..., "8507303328", "6-4")``."""
    out, at, size = "", 0, ""
    for char in layout + "|":
        if char.isdigit():
            size += char
            continue
        out += digits[at : at + int(size)] + (char if char != "|" else "")
        at, size = at + int(size), ""
    return out


def layouts_of(kind: str, length: int) -> list[str]:
    return [x for x in BY_KIND[kind].layouts if sum(map(int, x.translate(_SPLIT).split())) == length]


def iban(r: Draw, country: str) -> str:
    body = "".join(r.choices(string.digits, k=IBAN_LENGTH[country] - 4))
    if country == "GB":
        body = "NWBK" + body[4:]
    if country == "MT":
        body = "MALT" + body[4:-7] + "MTLCAST"
    check = 98 - int("".join(str(int(c, 36)) for c in body + country + "00")) % 97
    return f"{country}{check:02d}{body}"


def grouped(text: str, size: int = 4) -> str:
    return " ".join(text[i : i + size] for i in range(0, len(text), size))


def sample(kind: str, r: Draw) -> str:
    """One piece of invented personal data as people write it."""
    if kind == "email":
        name = r.choice(("anna.virtanen", "j_kowalski+x", "müller", "o'brien", "x1")) + str(r.randrange(1000))
        return f"{name}@{r.choice(('example.org', 'mail.example.co.uk', 'firma-beispiel.de', 'example.technology'))}"
    if kind == "phone":
        a, b, c = r.randint(20, 99), r.randint(100, 999), r.randint(1000, 9999)
        return r.choice(
            (
                f"+49 {a} {b}{c}",
                f"+33 (0)1 {a} {a} {a} {a}",
                f"0{a}/{b}{c}",
                f"0{a}-{b} {c}",
                f"(0{a}) {b}{c}",
                f"+358{a}{b}{c}",
                f"00420 {b} {b} {b}",
            )
        )
    if kind == "iban":
        text = iban(r, r.choice(IBAN_COUNTRIES))
        return r.choice((text, grouped(text), text.lower()))
    if kind == "ipv4":
        return f"{r.randint(11, 120)}.{r.randrange(256)}.{r.randrange(256)}.{r.randrange(256)}"
    if kind == "ipv6":
        return (
            ":".join(f"{r.randrange(4096, 65536):x}" for _ in range(8))
            if r.random() < 0.5
            else f"2001:db8::{r.randrange(4096, 65536):x}:1"
        )
    text = number(kind, r)
    if BY_KIND[kind] in LETTERED:
        return text
    return laid_out(BY_KIND[kind], text, r.choice(layouts_of(kind, len(text))))


# --------------------------------------------------------------------------- text without personal data

_PROSE = (
    "the model of a grid and its energy was measured twice in winter der Antrag wurde geprüft und bewilligt sowie "
    "veröffentlicht la "
    "évaluation des données est terminée los resultados del ensayo fueron publicados malli koulutettiin aineistolla "
    "wyniki są "
    "dostępne Materials Processing Training European Commission Artikel Regulation capacity pressure"
)
_WORDS = _PROSE.split()


def harmless(r: Draw) -> str:
    """A number that names nobody: dates, amounts, versions, sizes, coordinates, codes."""
    return r.choice((
        lambda: f"{r.randint(1990, 2030)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}",
        lambda: f"{r.randint(1, 28):02d}.{r.randint(1, 12):02d}.{r.randint(1990, 2030)}",
        lambda: f"{r.randint(1, 28)}/{r.randint(1, 12)}/{r.randint(1990, 2030)} "
                f"{r.randrange(24):02d}:{r.randrange(60):02d}:{r.randrange(60):02d}",
        lambda: f"{r.randrange(10**6):,}.{r.randrange(100):02d}",
        lambda: f"{r.randrange(1, 999)} {r.randrange(1000):03d} {r.randrange(1000):03d} EUR",
        lambda: f"{r.random():.7f}",
        lambda: f"v{r.randrange(20)}.{r.randrange(20)}.{r.randrange(200)}",
        lambda: f"{r.randrange(1990, 2030)}",
        lambda: f"{r.randrange(10**5)} kWh",
        lambda: f"{r.uniform(-90, 90):.5f}, {r.uniform(-180, 180):.5f}",
        lambda: f"{r.randrange(16**8):08x}-{r.randrange(16**4):04x}-4{r.randrange(16**3):03x}-a{r.randrange(16**3):03x}-{r.randrange(16**12):012x}",  # noqa: E501
        lambda: f"Art. {r.randrange(1, 99)}({r.randrange(1, 9)})",
        lambda: f"EU {r.randint(2010, 2026)}/{r.randrange(1, 3000)}",
        lambda: f"std::vector<{r.choice(('int', 'float'))}>",
        lambda: f"HP:{r.randrange(10**7):07d}",
        lambda: f"{r.randrange(100)} %",
        lambda: f"user{r.randrange(100)} @ desk",
    ))()  # fmt: skip


def prose(r: Draw, words: int = 60, numbers: int = 4) -> str:
    """A paragraph in several languages with harmless numbers, none of them personal."""
    out = r.choices(_WORDS, k=words)
    for _ in range(numbers):
        out[r.randrange(words)] = harmless(r)
    return " ".join(out) + "."
