"""What there is in a user's own rows: counts, lengths, languages, repetition, leakage, licence, personal data. Figures
only, never a piece of a row.

:func:`describe` works on texts and needs no tokenizer; ``prepare`` adds tokens, and :func:`fertility` how dearly the
base model's tokenizer writes each language.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aifactory_train.data import language, near, personal
from aifactory_train.data.matched import texts_in

#: Canonical rows (bytes) up to which ``prepare`` looks at everything by itself; beyond, ``prepare --report`` does when
#: asked.
AT_ONCE = 8 << 20
#: Texts whose language is looked at.
LANGUAGE_TEXTS = 1_000
#: Held-out rows that a training row may repeat, in exact or nearly the same words.
LEAK_LIMIT = 0.01
#: Text of a language that costs this many times the tokens of English (per byte; per word) is one that the tokenizer
#: hardly knows.
DEAR_PER_BYTE, DEAR_PER_WORD = 1.5, 2.5

#: Rows that a rule may drop, or a length may cut, before it is said as a warning.
DROP_LIMIT = 0.05
#: Why rows are missing: a phrase, and the settings that keep them.
REASONS = {
    "duplicate": ("the same as an earlier row", "data.deduplicate=false keeps them"),
    "group held out": (
        "of a held-out group, and not needed there",
        "a larger data.eval_rows or a smaller data.eval_fraction uses them",
    ),
    "overlap: same text": ("with the text of a held-out row", "data.overlap=allow keeps them"),
    "overlap: nearly same": (
        "nearly the same as a held-out row",
        "data.overlap=allow keeps them; where rows share a passage or a form, hold out whole ones of those: "
        "data.split_by={group: COLUMN}",
    ),
    "long": (
        "longer than data.sequence_length",
        "a larger data.sequence_length keeps them, or data.long_documents=truncate",
    ),
    "masked": (
        "cut before the answer begins",
        "a larger data.sequence_length keeps them",
    ),
    "empty": (
        "without anything of their answer in the rendered text",
        "a template that writes it keeps them: model.chat_template=FILE.jinja",
    ),
    "pair": ("with an answer (or one of its texts) that does not fit", "a larger data.sequence_length keeps them"),
}
#: The setting that decides, by reason.
KEYS = {
    "overlap: same text": "data.overlap",
    "overlap: nearly same": "data.overlap",
    "long": "data.sequence_length",
    "masked": "data.sequence_length",
    "empty": "model.chat_template",
}
#: What may be done about a part of the rows that the chat template leaves out.
_TEMPLATE_FIX = {
    "system text": "the answers are learnt without it. Name a template that writes it "
    "(model.chat_template=FILE.jinja), or "
    "put it before the question",
    "question text": "the answers are learnt without it. Name a template that writes it: "
    "model.chat_template=FILE.jinja",
    "tool answer": "the answers are learnt without it. Name a template that writes it: model.chat_template=FILE.jinja",
    "tool schema": "calls are learnt without it. Name a template that writes tools: model.chat_template=FILE.jinja",
    "tool call": "it is not learnt. Name a template that writes calls: model.chat_template=FILE.jinja",
    "reasoning of the last answer": "it is not learnt. A copy of the template that keeps it (without the lines that "
    "cut at "
    "</think>) trains it: model.chat_template=FILE.jinja; else take it out of the rows",
    "reasoning of earlier answers": "those answers are learnt as if nothing had been thought before. Make a row of "
    "each "
    "answer, or give the earlier ones weight: 0",
    "answer text": "it is not learnt as it is written. See it with prepare --inspect 3; another template: "
    "model.chat_template=FILE.jinja",
    "answer left empty": "such a turn carries no loss, or the model would learn to say nothing",
}

#: English prose that every tokenizer is measured on, for comparison.
_ENGLISH = (
    "The bridge over the river was closed for most of the winter because the old bearings had to be replaced. While "
    "the work "
    "was going on, traffic was sent through the next village, where people soon complained about noise and dust. The "
    "council "
    "met in January and decided to pay for better windows in the houses along the road. Nobody knew at that time how "
    "long it "
    "would take, and the engineers gave no date. In spring the first cars crossed again, slowly and one after "
    "another, and a "
    "small crowd had come to watch. What had looked like a simple repair turned out to be the largest public work in "
    "the "
    "region since the station was built, and its costs were still being counted two years later."
)


def text_of(row: dict[str, Any]) -> str:
    """The text of a canonical row: its ``text``, or its messages one under the other.

    Of a pair both answers: both are trained on and may hold what nobody should read.
    """
    if "positive" in row:
        return "\n".join(texts_in(row))
    if "text" in row:
        return row["text"]
    worse = [m for m in row.get("rejected") or () if m not in row["messages"]]
    return "\n".join(m["content"] for m in (*row["messages"], *worse))


def spoken(row: dict[str, Any]) -> tuple[str | None, str]:
    """The language code that a canonical row states in its column ``language`` (None without), and its text without
    system turns: an instruction in English before every row does not make the rows English."""
    stated = re.match(r"[A-Za-z]{2,3}(?![A-Za-z])", str(row.get("language") or ""))
    text = row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"] if m["role"] != "system")
    return (stated[0].lower() if stated else None), text


def describe(
    train: Sequence[str],
    held: Sequence[str] | None = None,
    *,
    licences: Sequence[tuple[str, str]] = (),
    spoken_in: dict[str, Any] | None = None,
    words: tuple[near.Shingles, np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Figures of training texts, and of what held-out texts they repeat.

    Args:
        held: held-out texts; None when the split is not made yet.
        licences: ``(source, licence)``; ``unknown`` is written down as MISSING.
        spoken_in: what :func:`languages` found, where it has looked already.
        words: shingles that are there already, and which of them are the training texts and the held-out texts (int64
        each).
    """
    if words is None:
        numbers = np.arange(len(train) + len(held or []))
        words = near.shingle([*train, *(held or [])]), numbers[: len(train)], numbers[len(train) :]
    shingles, ours, theirs = words
    looked = ours[: near.MOST_TEXTS]
    exact, nearly = near.within(shingles, looked)
    found = personal.scan([*train, *(held or [])])
    lengths = np.asarray([len(t) for t in train], dtype=np.int64)
    out: dict[str, Any] = {
        "rows": len(train) + len(held or []),
        "characters": {"total": int(lengths.sum())}
        | {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 50, 90, 99, 100) if len(lengths)},
        "languages": spoken_in or languages(train),
        "duplicates": {
            "exact": int(exact.sum()),
            "near": int(nearly.sum()),
            "share": _share(int((exact | nearly).sum()), len(looked)),
            "rows_looked_at": len(looked),
            "rule": near.RULE,
        },
        "leakage": leakage(shingles, ours, theirs) if held is not None else None,
        "licences": stated_licences(licences),
        "personal_data": {"counts": found.counts, "rows": found.rows, "possible": found.possible, "bytes": found.bytes},
    }
    return out


def stated_licences(licences: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """``(source, licence)`` as the report lists them."""
    return [{"source": s, "licence": licence if licence != "unknown" else "MISSING"} for s, licence in licences]


def languages(texts: Sequence[str], stated: Sequence[str | None] | None = None) -> dict[str, Any]:
    """Shares by language over a sample of evenly spaced texts; ``stated`` is what their rows say of it
    (:func:`spoken`).
    """
    sample = _sample(list(zip(texts, stated or [None] * len(texts), strict=True)), LANGUAGE_TEXTS)
    return {"shares": language.shares(*_unzip(sample)), "rows_looked_at": len(sample), "limits": language.LIMITS}


def leakage(shingles: near.Shingles, train: np.ndarray, held: np.ndarray) -> dict[str, Any]:
    """Held-out texts that a training text repeats."""
    _, _, exact, nearly = near.between(shingles, train, held)
    return {
        "held_out_rows": len(held),
        "exact": int(exact.sum()),
        "near": int(nearly.sum()),
        "share": _share(int((exact | nearly).sum()), len(held)),
        "limit": LEAK_LIMIT,
        "rule": near.RULE,
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _sample(values: Sequence[Any], most: int) -> list[Any]:
    if len(values) <= most:
        return list(values)
    return [values[i * len(values) // most] for i in range(most)]


def _unzip(pairs: Sequence[tuple[str, str | None]]) -> tuple[list[str], list[str | None]]:
    return [text for text, _ in pairs], [stated for _, stated in pairs]


# ---- the tokenizer


def fertility(
    tokenizer: Any,
    texts: Sequence[str],
    stated: Sequence[str | None] | None = None,
    *,
    count: Callable[[list[str]], int] | None = None,
) -> dict[str, Any]:
    """Tokens per word and per UTF-8 byte for each language with at least a tenth of the texts, against English prose.

    ``tokenizer``: a ``tokenizers.Tokenizer``. ``stated``: the language codes that rows state, None where detection
    decides. ``count``: how many tokens texts have, where that is known faster than by tokenising them
    (``Encoder.count``). Only prose is measured: digits, identifiers, tags and markup
    (:func:`aifactory_train.data.language.prose`) cost the same in every language. A language is *dear* when it takes
    1.5 times the tokens of English per byte, or 2.5 times per word: the model sees it in small pieces, trains slower on
    it and knows it little (Rust et al. 2021, "How good is your tokenizer?", take tokens per word as the sign of a
    language that a model serves badly).
    """
    count = count or (lambda some: sum(map(len, tokenizer.encode_batch_fast(some, add_special_tokens=False))))
    english = _cost(count, [_ENGLISH])
    by_language: dict[str, list[str]] = {}
    sample = _sample(list(zip(texts, stated or [None] * len(texts), strict=True)), 200)
    for text, said in sample:
        spoken_text = re.sub(r"\s*\d+", "", language.prose(text[: language.MOST]))
        if re.search(r"[^\W\d_]", spoken_text):
            by_language.setdefault(said or language.detect(text), []).append(spoken_text)
    out: dict[str, Any] = {"english": english, "languages": {}}
    for name, own in sorted(by_language.items(), key=lambda item: -len(item[1])):
        if name == "und" or len(own) < 0.1 * len(sample):
            continue
        cost = _cost(count, own)
        per_byte = cost["tokens_per_byte"] / english["tokens_per_byte"]
        per_word = cost["tokens_per_word"] / english["tokens_per_word"] if name not in language.UNSPACED else None
        out["languages"][name] = {
            **cost,
            "against_english_per_byte": round(per_byte, 2),
            "against_english_per_word": round(per_word, 2) if per_word is not None else None,
            # English is the measure: technical English is dear as well, and yet no foreign language.
            "dear": name != "en"
            and (per_byte >= DEAR_PER_BYTE or (per_word is not None and per_word >= DEAR_PER_WORD)),
        }
    return out


def _cost(count: Callable[[list[str]], int], texts: list[str]) -> dict[str, float]:
    tokens = count(texts)
    return {
        "tokens_per_word": round(tokens / max(1, sum(len(re.findall(r"\w+", t)) for t in texts)), 3),
        "tokens_per_byte": round(tokens / max(1, sum(len(t.encode("utf-8", "surrogatepass")) for t in texts)), 4),
    }


def _dearness(f: dict[str, Any]) -> str:
    """Tokens of a language in words; per word only where words are written apart."""
    per_byte = f"{f['tokens_per_byte']:g} tokens a byte ({f['against_english_per_byte']:g} times English)"
    if f["against_english_per_word"] is None:
        return per_byte
    return f"{f['tokens_per_word']:g} tokens a word ({f['against_english_per_word']:g} times English), {per_byte}"


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What a person should know before training, from the report of a preparation."""
    out = []
    dear = {n: f for n, f in report.get("fertility", {}).get("languages", {}).items() if f["dear"]}
    if dear:
        out.append(
            f"the base model's tokenizer hardly knows {'the language' if len(dear) == 1 else 'the languages'} "
            + ", ".join(f"'{name}': {_dearness(f)}" for name, f in dear.items())
            + "; choose a base for this language, or expect slow and shallow learning"
        )
    for source in report.get("sources", []):
        left_out = source.get("files", {}).get("left_out", [])
        if left_out:
            shown = ", ".join(f"{entry['file']}: {entry['why']}" for entry in left_out[:3])
            more = f", and {len(left_out) - 3} more (prepare --json names all)" if len(left_out) > 3 else ""
            out.append(f"{source['name']}: {len(left_out)} document(s) left out ({shown}{more})")
        others = source.get("files", {}).get("other_splits", {})
        if others and source["files"]["split_guessed"]:
            named = ", ".join(
                f"{name} ({len(files)} file{'s' if len(files) > 1 else ''})" for name, files in others.items()
            )
            out.append(
                f"{source['name']}: of the folder only the split '{source['files']['split']}' is read; not read: "
                f"{named}; "
                f"data.{source['role']}.N.split=NAME chooses another one, split=all reads every file"
            )
        out += [
            f"{source['name']}: {count} x {what}"
            for what, count in source["counts"].items()
            if what.startswith(("a turn holds <", "system column left out", "left out: repeated header"))
        ]
        cut = source["counts"].get("truncated", 0)
        if source["format"] == "text" and cut:
            out.append(
                f"{source['name']}: {cut} text(s) lose what is beyond data.sequence_length; "
                "data.long_documents=paragraphs keeps all of them"
            )
        elif cut > DROP_LIMIT * source["rows"]:
            out.append(
                f"{source['name']}: {cut:,} of {source['rows']:,} rows ({cut / source['rows']:.0%}) are cut at "
                f"data.sequence_length, most "
                "of them inside an answer; a larger one keeps them whole, data.long_documents=drop leaves them out"
            )
        if source["licence"] == "unknown":
            out.append(f"{source['name']}: the licence of the data is MISSING (data.{source['role']}.N.licence)")
    out += _missing(report)
    leak = (report.get("own") or {}).get("leakage")
    if leak and leak["share"] > LEAK_LIMIT:
        out.append(
            f"{leak['exact'] + leak['near']} of {leak['held_out_rows']} held-out rows are repeated in the training "
            f"rows, exactly or nearly "
            f"({leak['share']:.1%}, the limit is {LEAK_LIMIT:.0%}): the held-out figures will look better than they are"
        )
    kinds = (report.get("own") or {}).get("personal_data", {}).get("counts", {})
    if kinds:
        out.append(
            f"personal data found: {', '.join(f'{n} x {kind}' for kind, n in kinds.items())} (counts only); "
            "see privacy.profile and data.train.N.facts.personal_data"
        )
    return out


def _missing(report: dict[str, Any]) -> list[str]:
    """Warnings of rows that a rule drops, of what the chat template leaves out, and of special tokens in what people
    wrote.
    """
    out = []
    fate = report.get("rows", {"given": 0, "dropped": {}})
    for why, n in fate["dropped"].items():
        if n > DROP_LIMIT * fate["given"]:
            what, keep = REASONS[why]
            out.append(f"{n:,} of {fate['given']:,} rows ({n / fate['given']:.0%}) are not trained on: {what}; {keep}")
    total = sum(source["rows"] for source in report.get("sources", []))
    for what, found in found_in(report, "template").items():
        part, _, verdict = what.rpartition(" ")
        part = what if what in _TEMPLATE_FIX else part
        if part not in _TEMPLATE_FIX:
            continue  # names, and the reasoning of turns that are not learnt: reported in the line of the rows
        did = {"dropped": "drops the", "changed": "rewrites the"}.get(verdict)
        reported = f"{did} {part} in" if did else f"leaves an {part.replace(' left', '')} in"
        often = f" ({found['times']:,} times)" if found["times"] != found["rows"] else ""
        out.append(f"the chat template {reported} {found['rows']:,} of {total:,} rows{often}: {_TEMPLATE_FIX[part]}")
    for read_as, reported in _CONTROL_TOKENS.items():
        controls = found_in(report, "control_tokens", read_as)
        if controls:
            named = sorted(controls.items(), key=lambda item: -item[1]["rows"])
            shown = ", ".join(f"{token!r} in {found['rows']:,} rows" for token, found in named[:5])
            more = f", and {len(named) - 5} more (prepare --json names all)" if len(named) > 5 else ""
            out.append(f"special tokens stand in what the rows say ({shown}{more}): {reported}")
    return out


#: How special tokens in what people wrote are read, and what to do about it.
_CONTROL_TOKENS = {
    "text": "they are encoded as the text that they are; data.control_tokens_in_content=as_tokens reads them as the "
    "template's own marks",
    "tokens": "they are read as marks of the template, as if a turn began or ended there; write them otherwise, or "
    "leave such rows out",
}


def found_in(report: dict[str, Any], key: str, read_as: str | None = None) -> dict[str, dict[str, int]]:
    """``template`` or ``control_tokens`` of all sources of a report together, or of those whose special tokens are read
    as ``read_as``.
    """
    out: dict[str, dict[str, int]] = {}
    for source in report.get("sources", []):
        if read_as not in (None, source.get("control_tokens_read_as", "tokens")):
            continue
        for what, found in source.get(key, {}).items():
            before = out.get(what, {"rows": 0, "times": 0})
            out[what] = {unit: before[unit] + found[unit] for unit in before}
    return out


# ---- for people


def rows_line(report: dict[str, Any]) -> tuple[str, str]:
    """What became of the rows that were given for training: how many are used, and why the others are not."""
    fate = report["rows"]
    parts = [f"{fate['held_out']:,} held out"] if fate["held_out"] else []
    parts += [f"{n:,} {REASONS[why][0]}" for why, n in fate["dropped"].items()]
    cut = sum(source["counts"].get("truncated", 0) for source in report["sources"])
    parts += [f"{cut:,} cut at data.sequence_length"] if cut else []
    parts += [f"template: {what} in {found['rows']:,}" for what, found in found_in(report, "template").items()]
    parts += [f"{token} inside {found['rows']:,}" for token, found in found_in(report, "control_tokens").items()][:5]
    unused = report.get("unused") or {}
    for key, kind in (("columns", "columns"), ("turn_keys", "keys of turns")):
        if unused.get(key):
            parts.append(f"unused {kind}: " + ", ".join(f"{name} ({n:,})" for name, n in unused[key].items()))
    remarks: collections.Counter = collections.Counter()
    for source in report["sources"]:
        remarks.update(source.get("remarks", {}))
    parts += [f"{what} ({n:,})" for what, n in remarks.items()]
    return f"{fate['given']:,} given, {fate['used']:,} used", "; ".join(parts)


def lines_of(own: dict[str, Any]) -> list[tuple[str, str]]:
    """``(what, figures)`` of :func:`describe`, for a table."""
    lengths, repeats, leak, found = own["characters"], own["duplicates"], own["leakage"], own["personal_data"]
    spread = " / ".join(f"{lengths.get(q, 0):,}" for q in ("p50", "p90", "p100"))
    shares = ", ".join(f"{name} {share:.0%}" for name, share in list(own["languages"]["shares"].items())[:6])
    out = [
        ("rows", f"{own['rows']:,}"),
        ("characters", f"{lengths['total']:,}; a row (median / 90 % / longest): {spread}"),
        ("languages", f"{shares or 'none found'} (of {own['languages']['rows_looked_at']:,} rows)"),
        ("repeated rows", f"{repeats['exact']:,} exactly, {repeats['near']:,} nearly ({repeats['share']:.1%})"),
    ]
    if leak is not None:
        figures = (
            f"{leak['exact']:,} exactly, {leak['near']:,} nearly, of {leak['held_out_rows']:,} "
            f"({leak['share']:.1%}; limit {leak['limit']:.0%})"
        )
        out.append(("held-out rows that training rows repeat", figures))
    out.extend((f"licence of {entry['source']}", entry["licence"]) for entry in own["licences"])
    kinds = ", ".join(f"{n:,} x {kind} in {found['rows'].get(kind, 0):,} rows" for kind, n in found["counts"].items())
    weak = sum(found["possible"].values())
    out.append(
        ("personal data", (kinds or "none found") + (f"; {weak:,} more numbers that may be such" if weak else ""))
    )
    return out


def print_own(own: dict[str, Any]) -> None:
    from aifactory_train.core.output import note, table

    table("the rows", ["", "found"], [list(line) for line in lines_of(own)])
    note(f"  nearly: {own['duplicates']['rule']}")
    note(f"  languages: {own['languages']['limits']}")
