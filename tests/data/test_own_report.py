"""The report on a user's rows: repetition, languages, cost in tokens, personal data. Figures only, no text."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.data import language, near, report

WORDS = [
    f"{a}{b}"
    for a in ("ka", "lo", "mi", "ru", "te", "vo")
    for b in ("ran", "del", "sim", "tok", "fur", "gel", "bin", "pos")
]


def texts(count: int, length: int = 30, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(count)]


def jaccard(a: str, b: str) -> float:
    one, two = ({tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in (a, b))
    return len(one & two) / len(one | two)


# ---- repetition


def test_duplicates_are_those_that_comparing_every_pair_finds():
    draw = random.Random(2)
    rows = texts(120, 40)
    for i in range(60):
        words = rows[i].split()
        for at in draw.sample(range(40), 1 + i % 4):
            words[at] = f"other{at}"
        rows.append(" ".join(words))
    rows += [rows[3].upper(), rows[4] + "."]
    exact, nearly = near.within(rows)
    assert np.flatnonzero(exact).tolist() == [180, 181]  # case and punctuation make no difference
    expected = [i for i in range(180) if any(jaccard(rows[i], rows[j]) >= near.SIMILAR for j in range(i))]
    assert np.flatnonzero(nearly).tolist() == expected and 10 < len(expected) < 60


@settings(max_examples=15, deadline=None)
@given(change=st.integers(0, 30), seed=st.integers(0, 5))
def test_leakage_is_judged_by_similarity_alone(change, seed):
    train, words = texts(40, 60, seed), texts(1, 60, seed)[0].split()
    held = " ".join(["zz" + w if i < change else w for i, w in enumerate(words)])
    result = near.between(near.shingle([*train, held]), np.arange(40), np.arange(40, 41))
    similar = jaccard(train[0], held)
    assert [bool(r[0]) for r in result] == [similar == 1, near.SIMILAR <= similar < 1] * 2
    assert not any(r[1:].any() for r in result[:2])


def test_short_empty_and_foreign_texts():
    rows = ["", "a", "a b", "A B", "東京都は日本の首都である。人口は多い", "東京都は日本の首都である。人口は多い", "…!"]
    exact, nearly = near.within(rows)
    assert exact.tolist() == [False, False, False, True, False, True, True] and not nearly.any()
    assert len(near.shingle(rows).of(4)) > 8  # characters, where words are not separated


def test_many_rows_are_looked_at_in_parts_with_the_same_result(monkeypatch):
    rows = texts(400, 50)
    whole = near.shingle(rows)
    import aifactory_train.data.near as module

    original, seen = module._hash, []
    monkeypatch.setattr(module, "_hash", lambda part, number: seen.append(len(part)) or original(part, number))
    big = near.shingle(rows * 30)
    assert len(seen) > 1 and sum(seen) == 12_000
    assert (big.whole[:400] == whole.whole).all() and (big.of(11_999) == whole.of(399)).all()


# ---- languages

SENTENCES = {
    "en": "The council met in January and decided to pay for better windows in the houses along the road.",
    "de": "Der Rat traf sich im Januar und beschloss, für bessere Fenster in den Häusern an der Straße zu zahlen.",
    "fr": "Le conseil s'est réuni en janvier et a décidé de payer de meilleures fenêtres dans les maisons le long de "
    "la route.",
    "es": "El consejo se reunió en enero y decidió pagar mejores ventanas en las casas a lo largo de la carretera.",
    "it": "Il consiglio si è riunito a gennaio e ha deciso di pagare finestre migliori nelle case lungo la strada che "
    "porta al mare.",
    "pt": "O conselho reuniu-se em janeiro e decidiu pagar melhores janelas nas casas ao longo da estrada, mas não "
    "para todos.",
    "nl": "De raad kwam in januari bijeen en besloot te betalen voor betere ramen in de huizen langs de weg.",
    "sv": "Rådet möttes i januari och beslutade att betala för bättre fönster i husen längs vägen som inte är klar.",
    "da": "Rådet mødtes i januar og besluttede at betale for bedre vinduer i husene langs vejen, som ikke er færdig "
    "efter planen af året.",
    "fi": "Neuvosto kokoontui tammikuussa ja päätti, että se maksaa paremmat ikkunat taloihin, mutta ei kaikkiin, "
    "jotka ovat tien varrella.",
    "is": "Ráðið kom saman í janúar og ákvað að greiða fyrir betri glugga í húsum sem standa við veginn og eru ekki "
    "ný.",
    "et": "Nõukogu tuli jaanuaris kokku ja otsustas, et ta maksab paremate akende eest, mis ei ole veel valmis või on "
    "vanad.",
    "pl": "Rada zebrała się w styczniu i zdecydowała, że zapłaci za lepsze okna w domach przy drodze, które nie są "
    "nowe.",
    "cs": "Rada se sešla v lednu a rozhodla, že zaplatí za lepší okna v domech u silnice, které nejsou nové a řeka je "
    "blízko.",
    "hu": "A tanács januárban ülésezett, és úgy döntött, hogy fizet a jobb ablakokért az út menti házakban, de nem "
    "minden házban.",
    "ro": "Consiliul s-a întrunit în ianuarie și a decis să plătească pentru ferestre mai bune în casele de pe drum.",
    "lt": "Taryba susirinko sausio mėnesį ir nusprendė, kad mokės už geresnius langus namuose, kurie yra prie kelio, "
    "bet ne visus.",
    "lv": "Padome sanāca janvārī un nolēma, ka maksās par labākiem logiem mājās, kas ir pie ceļa, bet ne visās.",
    "mt": "Il-kunsill iltaqa' f'Jannar u ddeċieda li jħallas għal twieqi aħjar fid-djar li huma ħdejn it-triq, iżda "
    "mhux kollha.",
    "ga": "Tháinig an chomhairle le chéile i mí Eanáir agus shocraigh sí go n-íocfadh sí as fuinneoga níos fearr do "
    "na tithe ar an mbóthar.",
    "tr": "Meclis ocak ayında toplandı ve yol boyunca olan evlerde daha iyi pencereler için ödeme yapmaya karar verdi "
    "ama her ev değil.",
    "bg": "Съветът се събра през януари и реши да плати за по-добри прозорци на къщите, които са край пътя.",
    "uk": "Рада зібралася у січні і вирішила, що заплатить за кращі вікна в будинках, які є біля дороги, та не для "
    "всіх.",
    "ru": "Совет собрался в январе и решил, что заплатит за лучшие окна в домах у дороги, но не для всех, как это "
    "было.",
    "el": "Το συμβούλιο συνεδρίασε τον Ιανουάριο και αποφάσισε να πληρώσει για καλύτερα παράθυρα.",
    "ja": "評議会は一月に集まり、道沿いの家の窓をよくするために支払うことを決めた。",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_enough_for_its_language(code):
    assert language.detect(SENTENCES[code]) == code


@pytest.mark.parametrize("text", ["", "12 34 56", "PX-400/2", "x = y(z); return q", "Müller Schmidt Weber", "🙂🙂"])
def test_what_is_no_prose_has_no_language(text):
    assert language.detect(text) == "und"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_has_a_known_language_or_none(text):
    assert language.detect(text) in {*language.KNOWN, "und"}


# ---- tokens


def test_a_language_that_the_tokenizer_does_not_know_is_dear(tiny_tokenizer):
    """The small tokenizer of the tests is made of English sentences: Greek falls into bytes, two tokens a letter."""
    backend = tiny_tokenizer.backend_tokenizer
    english = "The door number 3 is red. The boat number 7 is green and the lamp is white. " * 3
    facts = report.fertility(backend, [english] * 5 + [SENTENCES["el"] * 2] * 5)
    assert not facts["languages"]["en"]["dear"] and facts["languages"]["el"]["dear"]
    greek = facts["languages"]["el"]
    tokens = len(backend.encode(SENTENCES["el"] * 2, add_special_tokens=False).ids)
    assert greek["tokens_per_byte"] == pytest.approx(tokens / len((SENTENCES["el"] * 2).encode()), abs=1e-3)
    (warning,) = report.warnings_of({"fertility": facts, "sources": []})
    assert "'el'" in warning and f"{greek['tokens_per_word']:g} tokens a word" in warning


def test_numbers_make_no_language_dear(tiny_tokenizer):
    """Digits are single tokens for many tokenizers; a table of figures says nothing about the language around it."""
    prose = "The door is red and the boat is green. "
    facts = [
        report.fertility(tiny_tokenizer.backend_tokenizer, [t] * 9) for t in (prose, prose + "90210 48151 62342 " * 9)
    ]
    costs = [f["languages"]["en"] for f in facts]
    assert costs[0]["tokens_per_word"] == pytest.approx(costs[1]["tokens_per_word"], rel=0.35)
    assert not costs[1]["dear"]


# ---- the whole


def test_the_report_holds_figures_and_no_text():
    rows = texts(50) + texts(5) + [SENTENCES["de"] + " Ruf an: anna.berg@example.org, IBAN DE89 3704 0044 0532 0130 00"]
    facts = report.describe(rows, texts(2), licences=[("mine.csv", "unknown")])
    assert facts["rows"] == 58 and facts["duplicates"]["exact"] == 5 and facts["leakage"]["exact"] == 2
    assert facts["personal_data"]["counts"] == {"email": 1, "iban": 1}
    assert facts["licences"] == [{"source": "mine.csv", "licence": "MISSING"}]
    assert facts["characters"]["total"] == sum(map(len, rows))
    shown = (
        json.dumps(facts, ensure_ascii=False) + str(report.lines_of(facts)) + str(report.warnings_of({"own": facts}))
    )
    for secret in ("anna", "3704", "Straße", rows[0].split()[0] + " "):
        assert secret not in shown
