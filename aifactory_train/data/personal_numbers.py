"""Numbers that name a person, an account or a card: how each is written, its check digits, and where that is published.

Every :class:`Number` has its *layouts*: groups of digits with what stands between them (``"6-4"`` is six digits, a hyphen, four digits;
a blank is any kind of space). ``check`` gets the digits (or the letters and digits, upper case) without separators and says whether
they are a valid number: check digits, plausible date, known prefix.

``alone`` says whether a valid number counts wherever it stands. Where check digits and date let pass more than about one in fifty of
random digits, it does not: a word of ``context`` must stand nearby (see ``personal.py``).

python-stdnum, which the tests compare with, is no substitute: its checks normalise every candidate and take two to twelve times as long
on random digits (PESEL, NIR and Norwegian numbers the most), which a scan of every row would feel, and its verdicts on a few PESEL and NIR
differ. It has no layouts and no context words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aifactory_train.data.check_digits import _VERHOEFF_P, iso7064_mod11_10, luhn, verhoeff, weighted

# --------------------------------------------------------------------------- arithmetic that several countries share


for _ in range(6):
    _VERHOEFF_P.append(tuple(_VERHOEFF_P[1][p] for p in _VERHOEFF_P[-1]))


_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def is_date(day: int, month: int, year: int | None = None) -> bool:
    """A day of the calendar; 29 February passes where the year is unknown or a leap year."""
    if not 1 <= month <= 12 or not 1 <= day <= 31:
        return False
    if month == 2 and day == 29:
        return year is None or (year % 4 == 0 and (year % 100 != 0 or year % 400 == 0))
    return day <= _DAYS[month - 1]


def _ddmmyy(digits: str) -> bool:
    return is_date(int(digits[0:2]), int(digits[2:4]))


# --------------------------------------------------------------------------- accounts and cards

# ISO 13616 IBAN registry (SWIFT): length per country, European and neighbouring countries first.
IBAN_LENGTH = {
    "AD": 24, "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20, "ES": 24, "FI": 18, "FO": 18,
    "FR": 27, "GB": 22, "GI": 23, "GL": 18, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IS": 26, "IT": 27, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "VA": 22,
    "AL": 28, "AZ": 28, "BA": 20, "BY": 28, "GE": 22, "MD": 24, "ME": 22, "MK": 19, "RS": 22, "TR": 26, "UA": 29, "XK": 20,
    "AE": 23, "BH": 22, "BR": 29, "CR": 22, "DO": 28, "EG": 29, "GT": 28, "IL": 23, "IQ": 23, "JO": 30, "KW": 30, "KZ": 20, "LB": 28,
    "LC": 32, "LY": 25, "MR": 27, "MU": 30, "PK": 24, "PS": 29, "QA": 29, "SA": 24, "SC": 31, "ST": 25, "SV": 28, "TL": 23, "TN": 24,
    "VG": 24,
}  # fmt: skip


def iban(text: str) -> bool:
    """ISO 13616 / ISO 7064 MOD 97-10: the first four characters to the end, letters as 10 to 35, remainder 1."""
    if IBAN_LENGTH.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def card(digits: str) -> bool:
    """Luhn, and a length and prefix that a card scheme uses (issuer ranges of ISO/IEC 7812 as the schemes publish them)."""
    n, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    scheme = (
        (digits[0] == "4" and n in (13, 16, 19))  # Visa
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and n == 16)  # Mastercard
        or (two in (34, 37) and n == 15)  # American Express
        or ((four == 6011 or two == 65 or 644 <= three <= 649) and n in (16, 19))  # Discover
        or (3528 <= four <= 3589 and 16 <= n <= 19)  # JCB
        or ((300 <= three <= 305 or two in (36, 38, 39)) and 14 <= n <= 19)  # Diners Club
        or (two == 62 and 16 <= n <= 19)  # UnionPay
        or ((two == 50 or 56 <= two <= 58 or two in (60, 63, 67)) and 13 <= n <= 19 and n != 15)  # Maestro
    )
    return scheme and len(set(digits)) > 1 and luhn(digits)


# --------------------------------------------------------------------------- digits only, by country


def at_svnr(d: str) -> bool:
    check = weighted(d[:3] + d[4:], (3, 7, 9, 5, 8, 4, 2, 1, 6)) % 11
    month = int(d[6:8])
    # months 13 to 15 are used when the serial numbers of a day are exhausted
    return d[0] != "0" and check == int(d[3]) and is_date(int(d[4:6]), min(month, 12))


def be_nn(d: str) -> bool:
    month, day = int(d[2:4]) % 20, int(d[4:6])  # the BIS number adds 20 or 40 to the month
    if int(d[2:4]) >= 60 or month > 12 or day > 31 or d[6:9] in ("000", "999"):
        return False
    if month and day and not is_date(day, month):
        return False
    base, check = int(d[:9]), int(d[9:])
    # births since 2000 put a 2 before the nine digits
    return check == 97 - base % 97 or (d[0] in "0123456" and check == 97 - (2_000_000_000 + base) % 97)


def bg_egn(d: str) -> bool:
    month = int(d[2:4])
    month -= 40 if month > 40 else 20 if month > 20 else 0
    return is_date(int(d[4:6]), month) and weighted(d[:9], (2, 4, 8, 5, 10, 9, 7, 3, 6)) % 11 % 10 == int(d[9])


def ch_ahv(d: str) -> bool:
    return d.startswith("756") and (10 - weighted(d[:12], (1, 3) * 6) % 10) % 10 == int(d[12])


def cz_sk_rc(d: str) -> bool:
    """Births since 1954: ten digits, a multiple of eleven (until 1985 also remainder 10 with a last digit 0)."""
    month = int(d[2:4])
    month -= 70 if month > 70 else 50 if month > 50 else 20 if month > 20 else 0
    if not is_date(int(d[4:6]), month):
        return False
    return int(d) % 11 == 0 or (int(d[:9]) % 11 == 10 and d[9] == "0" and 54 <= int(d[:2]) <= 85)


def de_idnr(d: str) -> bool:
    """Among the first ten digits one occurs twice or three times, all others at most once; ISO 7064 MOD 11,10."""
    counts = sorted(d[:10].count(c) for c in set(d[:10]))
    return d[0] != "0" and counts[-1] in (2, 3) and (len(counts) < 2 or counts[-2] == 1) and iso7064_mod11_10(d)


def dk_cpr(d: str) -> bool:
    """Date only: since October 2007 numbers are issued that do not satisfy the modulus 11 check."""
    return _ddmmyy(d)


def ee_lt_code(d: str) -> bool:
    if d[0] not in "12345678" or not is_date(int(d[5:7]), int(d[3:5])):
        return False
    check = weighted(d[:10], (1, 2, 3, 4, 5, 6, 7, 8, 9, 1)) % 11
    if check == 10:
        check = weighted(d[:10], (3, 4, 5, 6, 7, 8, 9, 1, 2, 3)) % 11 % 10
    return check == int(d[10])


def es_nuss(d: str) -> bool:
    province, serial, check = int(d[:2]), int(d[2:10]), int(d[10:])
    if not (1 <= province <= 53 or province == 66):
        return False
    return (serial + province * 10_000_000 if serial < 10_000_000 else int(d[:10])) % 97 == check


def fr_nir(d: str) -> bool:
    """Corsican departments 2A and 2B stand for 19 and 18 in the key (the scanner replaces them before)."""
    month = int(d[3:5])
    return (
        d[0] in "123478"
        and (1 <= month <= 12 or 20 <= month <= 42 or month >= 50)
        and 97 - int(d[:13]) % 97 == int(d[13:])
    )


def gb_nhs(d: str) -> bool:
    return (11 - weighted(d[:9], (10, 9, 8, 7, 6, 5, 4, 3, 2)) % 11) % 11 == int(d[9]) and len(set(d)) > 1


def gr_afm(d: str) -> bool:
    return weighted(d[:8], (256, 128, 64, 32, 16, 8, 4, 2)) % 11 % 10 == int(d[8]) and d != "0" * 9


def gr_amka(d: str) -> bool:
    return _ddmmyy(d) and luhn(d)


def hr_oib(d: str) -> bool:
    return iso7064_mod11_10(d)


def hu_tax_id(d: str) -> bool:
    """8, days from 1 January 1867 to the birth (59,000 is in 2028), serial number, check digit."""
    return (
        d[0] == "8"
        and 11_000 <= int(d[1:6]) <= 59_000
        and weighted(d[:9], (1, 2, 3, 4, 5, 6, 7, 8, 9)) % 11 == int(d[9])
    )


def hu_taj(d: str) -> bool:
    return weighted(d[:8], (3, 7, 3, 7, 3, 7, 3, 7)) % 10 == int(d[8]) and len(set(d)) > 1


def is_kennitala(d: str) -> bool:
    """Births of 1800, 1900 and 2000 end in 8, 9 and 0; companies add 40 to the day and are not persons."""
    check = (11 - weighted(d[:8], (3, 2, 7, 6, 5, 4, 3, 2)) % 11) % 11
    return d[9] in "890" and _ddmmyy(d) and check == int(d[8])


def jmbg(d: str) -> bool:
    """Unique master citizen number of Yugoslavia and its successors; Slovenia's EMŠO has register numbers 50 to 59."""
    year = int(d[4:7])
    if not (850 <= year <= 999 or year <= 60) or not is_date(
        int(d[:2]), int(d[2:4]), year + (1000 if year > 60 else 2000)
    ):
        return False
    return (11 - weighted(d[:12], (7, 6, 5, 4, 3, 2) * 2) % 11) % 11 == int(d[12])


def lu_matricule(d: str) -> bool:
    """Over the first eleven digits a Luhn digit and, after it, a Verhoeff digit."""
    if not 1850 <= int(d[:4]) <= 2060 or not is_date(int(d[6:8]), int(d[4:6]), int(d[:4])):
        return False
    return luhn(d[:12]) and verhoeff(d[:11] + d[12])


def lv_pk(d: str) -> bool:
    """Old codes begin with the day of birth; codes issued since July 2017 begin with 32 to 39 and tell nothing."""
    if not (_ddmmyy(d) and d[6] in "012") and not 32 <= int(d[:2]) <= 39:
        return False
    return (1101 - weighted(d[:10], (1, 6, 3, 7, 9, 10, 5, 8, 4, 2))) % 11 % 10 == int(d[10])


def nl_bsn(d: str) -> bool:
    total = weighted(d[:8], (9, 8, 7, 6, 5, 4, 3, 2)) - int(d[8])
    return total % 11 == 0 and len(set(d)) > 1


def no_fnr(d: str) -> bool:
    """Two check digits modulo 11; a D number adds 40 to the day."""
    day = int(d[:2])
    if not is_date(day - 40 if day > 40 else day, int(d[2:4])):
        return False
    return (
        weighted(d[:10], (3, 7, 6, 1, 8, 9, 4, 5, 2, 1)) % 11 == 0
        and weighted(d, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1)) % 11 == 0
    )


def pl_pesel(d: str) -> bool:
    """Births of 2000 to 2099 add 20 to the month, of 1800 to 1899 add 80."""
    month = int(d[2:4])
    month -= 80 if month > 80 else 20 if month > 20 else 0
    return is_date(int(d[4:6]), month) and weighted(d, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def pt_nif(d: str) -> bool:
    """Natural persons: first digit 1, 2 or 3 (non-residents 45)."""
    check = (11 - weighted(d[:8], (9, 8, 7, 6, 5, 4, 3, 2)) % 11) % 11 % 10
    return (d[0] in "123" or d.startswith("45")) and check == int(d[8])


def ro_cnp(d: str) -> bool:
    county = int(d[7:9])
    if (
        d[0] == "0"
        or not is_date(int(d[5:7]), int(d[3:5]))
        or not (1 <= county <= 52 or county == 70 or 80 <= county <= 83)
    ):
        return False
    check = weighted(d[:12], (2, 7, 9, 1, 4, 6, 3, 5, 8, 2, 7, 9)) % 11
    return (1 if check == 10 else check) == int(d[12])


def se_personnummer(d: str) -> bool:
    """Ten digits, or twelve with the century; a coordination number adds 60 to the day."""
    if len(d) == 12:
        if d[:2] not in ("18", "19", "20"):
            return False
        d = d[2:]
    day = int(d[4:6])
    return is_date(day - 60 if day > 60 else day, int(d[2:4])) and luhn(d)


def tr_tckn(d: str) -> bool:
    odd, even = sum(map(int, d[0:9:2])), sum(map(int, d[1:8:2]))
    return d[0] != "0" and (odd * 7 - even) % 10 == int(d[9]) and sum(map(int, d[:10])) % 10 == int(d[10])


def ua_rnokpp(d: str) -> bool:
    """Days from 31 December 1899 to the birth (47,000 is in 2028), serial number, check digit."""
    return 3_000 <= int(d[:5]) <= 47_000 and weighted(d[:9], (-1, 5, 7, 9, 4, 6, 10, 5, 7)) % 11 % 10 == int(d[9])


# --------------------------------------------------------------------------- letters and digits, by country

_DNI = "TRWAGMYFPDXBNJZSQVHLCKE"
_HETU = "0123456789ABCDEFHJKLMNPRSTUVWXY"
_CF_ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
                   (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22,
                    25, 24, 23), strict=True))  # fmt: skip
_CF_OMOCODIA = str.maketrans("LMNPQRSTUV", "0123456789")


def cy_tic(t: str) -> bool:
    odd = sum((1, 0, 5, 7, 9, 13, 15, 17, 19, 21)[int(c)] for c in t[0:8:2])
    return not t.startswith("12") and chr(ord("A") + (odd + sum(map(int, t[1:8:2]))) % 26) == t[8]


def de_rvnr(t: str) -> bool:
    """Area, date of birth (a serial adds to the day), initial, serial number, check digit: VKVV § 4."""
    digits = f"{t[:8]}{ord(t[8]) - 64:02d}{t[9:11]}"
    products = (int(d) * w for d, w in zip(digits, (2, 1, 2, 5, 7, 1, 2, 1, 2, 1, 2, 1), strict=True))
    return (
        2 <= int(t[:2]) <= 89 and is_date(1, int(t[4:6])) and sum(p // 10 + p % 10 for p in products) % 10 == int(t[11])
    )


def es_dni(t: str) -> bool:
    return _DNI[int(t[:8]) % 23] == t[8]


def es_nie(t: str) -> bool:
    return _DNI[int(str("XYZ".index(t[0])) + t[1:8]) % 23] == t[8]


def fi_hetu(t: str) -> bool:
    """Serial numbers from 002; A to F, Y to U, plus and minus mark the century (letters beyond A and Y since 2023)."""
    return _ddmmyy(t) and int(t[7:10]) >= 2 and _HETU[int(t[:6] + t[7:10]) % 31] == t[10]


def gb_nino(t: str) -> bool:
    """No check digit: allowed letters only."""
    return (
        t[0] not in "DFIQUV"
        and t[1] not in "DFIOQUV"
        and t[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")
        and t[8] in "ABCD"
    )


def ie_pps(t: str) -> bool:
    """A second letter A to I counts nine times its place; W, T and X (spouses, until 1999) do not count."""
    second = t[8:]
    if second and second not in "ABCDEFGHIWTX":
        return False
    extra = ord(second) - 64 if second and second in "ABCDEFGHI" else 0
    return "WABCDEFGHIJKLMNOPQRSTUV"[(weighted(t[:7], (8, 7, 6, 5, 4, 3, 2)) + 9 * extra) % 23] == t[7]


def it_cf(t: str) -> bool:
    """Check letter over odd and even places; digits may be replaced by letters where two persons would share a code."""
    digits = "".join(t[i] for i in (6, 7, 9, 10, 12, 13, 14)).translate(_CF_OMOCODIA)
    day = int(digits[2:4]) if digits.isdigit() else 0
    if t[8] not in "ABCDEHLMPRST" or not (1 <= day <= 31 or 41 <= day <= 71):
        return False
    even = sum(int(c) if c.isdigit() else ord(c) - 65 for c in t[1:15:2])
    return chr(65 + (sum(_CF_ODD[c] for c in t[0:15:2]) + even) % 26) == t[15]


def mt_id(t: str) -> bool:
    """No check digit: number and letter of the register."""
    return t[7] in "MGAPLHBZ" and t[:7] != "0" * 7


# --------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Number:
    """One kind of number: name in counts, layouts, check, words that stand near it, and where it is described."""

    kind: str
    title: str
    layouts: tuple[str, ...]
    check: Callable[[str], bool]
    context: tuple[str, ...]
    source: str
    alone: bool = True
    column: bool = True  # whether a column full of them says what they are (not where nothing can be checked)


_STDNUM = "python-stdnum documentation, module "

NUMBERS: tuple[Number, ...] = (
    Number("card", "payment card", ("16", "4 4 4 4", "4-4-4-4", "15", "4 6 5", "4-6-5", "4 6 4", "14", "13", "17", "18", "19", "4 4 4 4 3"),
           card, ("card", "visa", "karte", "carte", "tarjeta", "carta"), "ISO/IEC 7812-1, annex B (Luhn)"),
    Number("ch_ahv", "Swiss AHV number", ("13", "3.4.4.2"), ch_ahv, ("ahv", "avs"),
           "Swiss Central Compensation Office: AHV number, EAN-13 check digit"),
    Number("fr_nir", "French NIR", ("15", "1 2 2 2 3 3 2", "13 2", "1 2 2 2 3 3-2"), fr_nir, ("nir", "sécurité sociale", "securite sociale"),
           "INSEE, definition c1409; xml.insee.fr/schema/nir.html"),
    Number("ro_cnp", "Romanian CNP", ("13",), ro_cnp, ("cnp",), "Legea 105/1996; github.com/vimishor/cnp-spec"),
    Number("lu_matricule", "Luxembourg matricule", ("13", "4 2 2 3 2", "8 5", "4 4 5"), lu_matricule, ("matricule",),
           "Règlement grand-ducal du 28 novembre 2013 (Luhn and Verhoeff)"),
    Number("jmbg", "JMBG / EMŠO", ("13",), jmbg, ("jmbg", "emšo", "emso", "embg", "јмбг"),
           "en.wikipedia.org/wiki/Unique_Master_Citizen_Number"),
    Number("es_nuss", "Spanish social security number", ("12", "2 10", "2/10", "2/8/2", "2 8 2", "2-8-2"), es_nuss,
           ("seguridad social", "nuss", "naf"), "Real Decreto 84/1996; Tesorería General de la Seguridad Social"),
    Number("se_personnummer", "Swedish personnummer", ("6-4", "8-4", "12", "10", "6+4"), se_personnummer,
           ("personnummer", "personnr", "samordningsnummer"), "Skatteverket SKV 704; Folkbokföringslag (1991:481) § 18"),
    Number("be_nn", "Belgian national number", ("11", "2.2.2-3.2", "6 3 2", "2 2 2 3 2", "6-3-2", "6-3.2"), be_nn,
           ("rijksregister", "registre national", "nationalregister", "insz", "niss"), "ibz.rrn.fgov.be, IT000 Rijksregisternummer"),
    Number("no_fnr", "Norwegian fødselsnummer", ("11", "6 5"), no_fnr, ("fødselsnummer", "fodselsnummer", "fnr", "d-nummer"),
           "Forskrift om folkeregistrering (2017) § 2-2-1; Skatteetaten"),
    Number("de_idnr", "German Steuer-ID", ("11", "2 3 3 3", "2 9"), de_idnr, ("steuer-id", "steueridentifikationsnummer", "idnr", "steuer-idnr"),
           "Abgabenordnung § 139b; ITZBund: Prüfziffernberechnung"),
    Number("tr_tckn", "Turkish identity number", ("11",), tr_tckn, ("t.c. kimlik", "kimlik", "tckn"), "tckimlik.nvi.gov.tr"),
    Number("ee_lt_code", "Estonian and Lithuanian personal code", ("11",), ee_lt_code, ("isikukood", "asmens kodas"),
           "Riigi Teataja 106032012004; lt.wikipedia.org/wiki/Asmens_kodas"),
    Number("gr_amka", "Greek AMKA", ("11",), gr_amka, ("amka", "αμκα", "α.μ.κ.α"), "amka.gr"),
    Number("lv_pk", "Latvian personas kods", ("6-5", "11"), lv_pk, ("personas kod",),
           "en.wikipedia.org/wiki/National_identification_number#Latvia"),
    Number("pl_pesel", "Polish PESEL", ("11",), pl_pesel, ("pesel",), "Ustawa o ewidencji ludności (2010) art. 15; gov.pl: numer PESEL"),
    Number("is_kennitala", "Icelandic kennitala", ("6-4", "10"), is_kennitala, ("kennital", "kt."), "Registers Iceland (skra.is): kennitala"),
    Number("at_svnr", "Austrian SVNR", ("10", "4 6", "4-6", "4/6", "4 2 2 2", "4 2.2.2"), at_svnr, ("svnr", "sv-nr", "sozialversicherungsnummer",
           "versicherungsnummer"), "ASVG § 30c; Dachverband der Sozialversicherungsträger"),
    Number("cz_sk_rc", "Czech and Slovak rodné číslo", ("6/4", "10", "6 4"), cz_sk_rc, ("rodné číslo", "rodne cislo", "r.č.", "rč"),
           "Zákon č. 133/2000 Sb. § 13"),
    Number("bg_egn", "Bulgarian EGN", ("10",), bg_egn, ("егн", "egn"), "Закон за гражданската регистрация, чл. 11; GRAO"),
    Number("hu_tax_id", "Hungarian tax number of a person", ("10",), hu_tax_id, ("adóazonosító", "adoazonosito"), "1996. évi XX. törvény, annex"),
    Number("dk_cpr", "Danish CPR number", ("6-4", "10", "6 4"), dk_cpr, ("cpr", "personnummer"), "cpr.dk: Personnummeret i CPR (no check since 2007)",
           alone=False),
    Number("gb_nhs", "NHS number", ("10", "3 3 4", "3-3-4"), gb_nhs, ("nhs",), "datadictionary.nhs.uk: NHS NUMBER", alone=False),
    Number("ua_rnokpp", "Ukrainian RNOKPP", ("10",), ua_rnokpp, ("рнокпп", "рнокп", "іпн", "ипн"), "uk.wikipedia.org/wiki/РНОКПП", alone=False),
    Number("hr_oib", "Croatian OIB", ("11",), hr_oib, ("oib",), "Zakon o osobnom identifikacijskom broju; Porezna uprava", alone=False),
    Number("nl_bsn", "Dutch BSN", ("9", "4.2.3", "4 2 3", "3 3 3"), nl_bsn, ("bsn", "burgerservicenummer", "sofinummer"),
           "burgerservicenummer.nl (elfproef)", alone=False),
    Number("pt_nif", "Portuguese NIF", ("9", "3 3 3"), pt_nif, ("nif", "contribuinte"), "Autoridade Tributária: NIF", alone=False),
    Number("hu_taj", "Hungarian TAJ number", ("9", "3 3 3", "3-3-3"), hu_taj, ("taj",), "1996. évi XX. törvény, annex", alone=False),
    Number("gr_afm", "Greek AFM", ("9",), gr_afm, ("αφμ", "α.φ.μ", "afm"), _STDNUM + "gr.vat", alone=False),
)  # fmt: skip

LETTERED: tuple[Number, ...] = (
    Number("it_cf", "Italian codice fiscale", ("AAAAAA99A99A999A",), it_cf, ("codice fiscale",), "D.M. 23 dicembre 1976; Agenzia delle Entrate"),
    Number("es_nie", "Spanish NIE", ("A9999999A",), es_nie, ("nie",), "Ministerio del Interior: cálculo del dígito de control del NIF/NIE"),
    Number("es_dni", "Spanish DNI", ("99999999A",), es_dni, ("dni", "nif"), "Ministerio del Interior: cálculo del dígito de control del NIF/NIE"),
    Number("cy_tic", "Cypriot tax identification code", ("99999999A",), cy_tic, ("tic", "αφτ"), _STDNUM + "cy.vat", alone=False),
    Number("fi_hetu", "Finnish henkilötunnus", ("999999-999A",), fi_hetu, ("hetu", "henkilötunnus"), "dvv.fi: The personal identity code"),
    Number("de_rvnr", "German pension insurance number", ("99999999A999",), de_rvnr, ("rentenversicherungsnummer", "rvnr", "sozialversicherungsnummer"),
           "VKVV § 2 and § 4"),
    Number("gb_nino", "UK National Insurance number", ("AA999999A",), gb_nino, ("national insurance", "nino", "ni number"), "HMRC NIM39110 (no check digit)"),
    Number("ie_pps", "Irish PPS number", ("9999999A", "9999999AA"), ie_pps, ("pps",), "Revenue: PPSN format; gov.ie"),
    Number("mt_id", "Maltese identity card number", ("9999999A",), mt_id, ("id card", "karta tal-identità", "identity card"),
           "Identity Malta (no check digit)", alone=False, column=False),
)  # fmt: skip
