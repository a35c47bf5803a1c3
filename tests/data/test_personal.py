"""The scanner for personal data: every kind is found where it is right, nothing where its check digits are wrong, and
no text gets out.
"""

from __future__ import annotations

import importlib
import logging
import random
import time

import personal_samples as samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.data import personal
from aifactory_train.data.check_digits import iso7064_mod11_10, luhn, verhoeff
from aifactory_train.data.personal import kinds, scan
from aifactory_train.data.personal_numbers import IBAN_LENGTH, LETTERED, NUMBERS, iban

# Examples that authorities or the pages named in the table publish.
PUBLISHED = {
    "card": ["4111111111111111", "5555555555554444", "378282246310005", "30569309025904"],
    "ch_ahv": ["756.9217.0769.85"],
    "fr_nir": ["2 95 10 99 126 111 93", "253072A07300443", "253072B07300470"],
    "ro_cnp": ["1630615123457"],
    "lu_matricule": ["1893120105732"],
    "jmbg": ["0101006500006"],
    "se_personnummer": ["880320-0016", "811228-9874"],
    "be_nn": ["85.07.30-033.28", "17 07 30 033 84"],
    "no_fnr": ["151086 95088"],
    "de_idnr": ["36 574 261 809"],
    "tr_tckn": ["17291716060"],
    "ee_lt_code": ["36805280109"],
    "gr_amka": ["01013099997"],
    "lv_pk": ["161175-19997", "328673-00679"],
    "pl_pesel": ["44051401359"],
    "is_kennitala": ["120174-3399"],
    "at_svnr": ["1237 010180"],
    "cz_sk_rc": ["710319/2745"],
    "bg_egn": ["8032056031"],
    "it_cf": ["RSSMRA85T10A562S"],
    "es_dni": ["54362315-K", "12345678Z"],
    "es_nie": ["x-2482300w"],
    "fi_hetu": ["131052-308T"],
    "de_rvnr": ["15070649C103", "65170839J003"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "MT84MALT011000012345MTLCAST001S"],
    "email": ["Mail a.b+c@example.org!", "<j_doe@mail.example.co.uk>"],
    "phone": ["+49 (0)30 123456-78", "tel. 612 345 678", "030/1234567", "01.23.45.67.89", "0049 30 1234567"],
    "ipv4": ["192.168.10.7"],
    "ipv6": ["2001:db8::8a2e:370:7334"],
}
# Kinds that need a word beside them.
NAMED = {
    "nl_bsn": "BSN 1112.22.333",
    "gb_nhs": "NHS number: 943-476-5870",
    "ua_rnokpp": "РНОКПП 2740867680",
    "hr_oib": "OIB: 33392005961",
    "gr_afm": "ΑΦΜ 094259216",
    "dk_cpr": "CPR-nr. 211062-5629",
    "mt_id": "ID card 1234567M",
    "cy_tic": "TIC 10259033P",
}


def test_at_least_forty_kinds_each_with_a_source():
    found = kinds()
    assert len(found) >= 40 and len({n.kind for n in NUMBERS + LETTERED}) == len(NUMBERS + LETTERED)
    assert all(len(source) > 5 for source in found.values())


@pytest.mark.parametrize("kind", sorted(PUBLISHED))
def test_published_examples(kind):
    for text in PUBLISHED[kind]:
        for row in (text, f"Zeile {text}", f"{text}, fin", f'{{"x": "{text}"}}'):
            report = scan([row])
            assert report.counts == {kind: 1} and report.rows == {kind: 1}, (kind, report.counts)


@pytest.mark.parametrize("kind", sorted(NAMED))
def test_weak_numbers_count_with_their_word_only(kind):
    text = NAMED[kind]
    assert scan([text]).counts == {kind: 1}
    number = text.split()[-1] if kind != "nl_bsn" else "1112.22.333"
    alone = scan([f"Zeile {number}"])
    assert kind not in alone.counts and alone.possible.get(kind) == 1
    assert scan([f"Zeile {number}"], hint=text.split(number)[0]).counts == {kind: 1}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(samples.KINDS), st.integers(0, 2**32))
def test_samples_are_found_among_prose(kind, seed):
    r = random.Random(seed)
    word = samples.BY_KIND[kind].context[0] + " " if kind in samples.BY_KIND else ""
    report = scan([f"{samples.prose(r, 10, 0)} {word}{samples.sample(kind, r)}; {samples.prose(r, 5, 0)}"])
    assert report.counts.get(kind) == 1, kind


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([n.kind for n in NUMBERS + LETTERED if n.kind not in ("dk_cpr", "mt_id", "gb_nino")]),
    st.integers(0, 2**32),
)
def test_a_wrong_check_digit_is_no_number(kind, seed):
    """Another last character is refused (schemes with several right ones excepted: there the check alone is asked)."""
    r = random.Random(seed)
    entry, text = samples.BY_KIND[kind], samples.number(kind, r)
    place = 3 if kind == "at_svnr" else 8 if kind == "is_kennitala" else 7 if kind == "ie_pps" else len(text) - 1
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if text[place].isalpha() or kind == "fi_hetu" else ""
    wrong = [
        text[:place] + c + text[place + 1 :]
        for c in "0123456789"[: 0 if letters and kind != "fi_hetu" else 10] + letters
    ]
    right = [t for t in wrong if entry.check(t)]
    assert text in right and len(right) <= (
        2 if kind in ("be_nn", "gr_afm", "ua_rnokpp", "bg_egn", "pt_nif", "tr_tckn") else 1
    )
    other = r.choice([t for t in wrong if t not in right])
    assert kind not in scan([f"{entry.context[0]}: {other}"]).counts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_ibans_of_all_countries(seed):
    r = random.Random(seed)
    for country in IBAN_LENGTH:
        text = samples.iban(r, country)
        assert iban(text)
        changed = text[:5] + ("Z" if text[5] != "Z" else "Y") + text[6:] if text[5].isalpha() else _other(text, 5)
        assert not iban(changed) and not iban(text + "0")
    text = samples.iban(r, "FR")
    assert scan([samples.grouped(text) + " AND MORE"]).counts == {"iban": 1}
    assert "iban" not in scan([text + "X"]).counts


def _other(text: str, place: int) -> str:
    return text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]


@given(st.text("0123456789", min_size=2, max_size=18))
def test_check_digits_notice_every_single_change(digits):
    for check in (luhn, verhoeff, iso7064_mod11_10):
        good = [digits + c for c in "0123456789" if check(digits + c)]
        assert len(good) == 1
        for place in range(len(digits)):
            changed = digits[:place] + str((int(digits[place]) + 1) % 10) + good[0][place + 1 :]
            assert not check(changed)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_harmless_numbers_are_hardly_ever_taken_for_persons(seed):
    r = random.Random(seed)
    dates = [
        f"{r.randint(1, 28):02d}.{r.randint(1, 12):02d}.{r.randint(1900, 2030)}",
        f"{r.randrange(2000, 2030)}-01-02 03:04:05.678",
    ]
    amounts = [
        f"{r.randrange(10**7):,}.00",
        f"{r.random():.9f}",
        f"{r.randrange(10**8)} kWh",
        f"1.{r.randrange(99)}.{r.randrange(99)}",
    ]
    assert scan([f"on {x} of" for x in dates + amounts]).counts == {}


def test_false_positives_of_generated_prose():
    r = random.Random(5)
    report = scan(samples.prose(r) for _ in range(1500))
    assert sum(report.counts.values()) <= 5, report.counts


def test_a_column_of_weak_numbers_says_what_it_is():
    r = random.Random(3)
    column = [samples.number("nl_bsn", r) for _ in range(40)]
    assert scan(column).counts.get("nl_bsn", 0) >= 35
    noise = [f"{r.randrange(10**8, 10**9)}" for _ in range(400)]
    assert scan(noise).counts == {} and scan(noise).possible


def test_counts_rows_bytes():
    rows = ["a@example.org b@example.org", "nichts", "für c@example.org", ""]
    report = scan(iter(rows))
    assert report.counts == {"email": 3} and report.rows == {"email": 2} and report.found
    assert report.bytes == sum(len(r.encode()) for r in rows) and report.texts == 4
    assert not scan([]).found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(), max_size=5))
def test_any_text_is_read(rows):
    report = scan(rows)
    assert report.texts == len(rows) and set(report.counts) == set(report.rows) <= set(kinds())
    assert all(0 < report.rows[k] <= len(rows) and report.rows[k] <= n for k, n in report.counts.items())


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789 -./+()@:AZaz", max_size=80))
def test_no_arrangement_of_digits_and_signs_breaks_it(text):
    scan([text])


def test_no_text_gets_out(caplog, capsys):
    caplog.set_level(logging.DEBUG)
    r = random.Random(11)
    texts = [samples.sample(kind, r) for kind in samples.KINDS]
    report = scan(texts)
    reported = repr(report) + repr(vars(report)) + caplog.text + "".join(capsys.readouterr())
    assert not [t for t in texts if t in reported]
    assert all(isinstance(v, int) for d in (report.counts, report.rows, report.possible) for v in d.values())
    with pytest.raises(TypeError) as refused:
        scan(["x", {"name": "zebra-7f3a"}])  # type: ignore[list-item]
    assert "row 1" in str(refused.value) and "zebra" not in str(refused.value)


def test_long_rows_take_time_in_proportion():
    """No pattern and no loop looks at the row again and again: fifty times the length, about fifty times the time (not
    2,500).
    """
    for piece in ("1", "1 ", "a@", "1.", ":", "A1", "+49 ", "-", "0 (0)", "12345678901 ", "DE12 ", "x" * 60 + "@"):
        short, long = (min(_timed(piece * (size // len(piece))) for _ in range(2)) for size in (2_000, 100_000))
        assert long < 0.2 + 250 * short, piece


def _timed(row: str) -> float:
    started = time.process_time()
    scan([row])
    return time.process_time() - started


# ---- against another implementation

_PEERS = {
    "ch_ahv": "ch.ssn",
    "de_idnr": "de.idnr",
    "tr_tckn": "tr.tckimlik",
    "ee_lt_code": "ee.ik",
    "gb_nhs": "gb.nhs",
    "hr_oib": "hr.oib",
    "nl_bsn": "nl.bsn",
    "gr_afm": "gr.vat",
    "es_nie": "es.nie",
    "es_dni": "es.dni",
    "cy_tic": "cy.vat",
    "pl_pesel": "pl.pesel",
    "ro_cnp": "ro.cnp",
    "jmbg": "si.emso",
    "no_fnr": "no.fodselsnummer",
    "be_nn": "be.nn",
    "gr_amka": "gr.amka",
    "at_svnr": "at.vnr",
    "cz_sk_rc": "cz.rc",
    "bg_egn": "bg.egn",
    "fr_nir": "fr.nir",
    "it_cf": "it.codicefiscale",
    "fi_hetu": "fi.hetu",
    "ie_pps": "ie.pps",
    "is_kennitala": "is_.kennitala",
    "pt_nif": "pt.nif",
    "ua_rnokpp": "ua.rntrc",
    "se_personnummer": "se.personnummer",
}


@pytest.mark.parametrize("kind", sorted(_PEERS))
def test_python_stdnum_accepts_our_numbers(kind):
    """Every sample is right by python-stdnum's reckoning, too (it wants a separator in a personnummer)."""
    pytest.importorskip("stdnum")
    peer = importlib.import_module(f"stdnum.{_PEERS[kind]}")
    r = random.Random(2)
    for _ in range(40):
        text = samples.number(kind, r)
        if kind == "se_personnummer":
            text = f"{text[:6]}-{text[6:]}" if len(text) == 10 else f"{text[:8]}-{text[8:]}"
        assert peer.is_valid(text), kind


def test_the_module_tells_what_it_does_not_find():
    assert "What it does not find" in (personal.__doc__ or "")
