"""Figures of merit of one answer: how far it agrees with what was expected, or whether it is well formed."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from xml.etree import ElementTree


def normalise(text: str) -> str:
    """The form in which answers are compared: NFKC, case folded, punctuation to spaces, single spaces.

    SQuAD's normalisation without its removal of English articles, since answers come in every European language.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded).split())


def exact_match(answer: str, expected: str) -> float:
    """1.0 if both are equal after :func:`normalise`, else 0.0."""
    return float(normalise(answer) == normalise(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over the words (with multiplicity) of the normalised texts, as in SQuAD.

    Two empty texts agree (1.0); one empty text does not (0.0).
    """
    ours, theirs = normalise(answer).split(), normalise(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


# ---- likelihood


def bits_per_byte(nll: float, text_bytes: int) -> float | None:
    """NLL in nats over ``text_bytes`` UTF-8 bytes as bits per byte; None without text."""
    return nll / (math.log(2) * text_bytes) if text_bytes else None


def perplexity(loss: float) -> float | None:
    """exp of the mean NLL in nats per token; None where it overflows a double."""
    return math.exp(loss) if loss < 700 else None


# ---- numbers

#: Digits with separators of thousands and decimals as Europe writes them: 1234,5  1.234,5  1,234.5  1 234,5  1'234.5
#: 6.02e23
_NUMBER = re.compile(
    r"(?<![\w.,])[-+−]?(?:\d{1,3}(?:[.,'’ "
    r"\u00a0\u202f]\d{3})+(?:[.,]\d+)?|\d+(?:[.,]\d+)?|[.,]\d+)(?:[eE][-+]?\d+)?(?!\d)"
)


def readings(text: str) -> list[float]:
    """Values that the last number in ``text`` may have: two where one separator stands before three digits (``1.234``
    is 1234 to a Dane and 1.234 to an Irishman), none without a number."""
    found = _NUMBER.findall(text)
    if not found:
        return []
    raw = re.sub(r"['’ \u00a0\u202f]", "", found[-1].replace("−", "-"))
    mantissa, e, exponent = raw.replace("E", "e").partition("e")
    seen = [c for c in mantissa if c in ".,"]
    if len(set(seen)) == 2:  # the last one separates the decimals
        thousands = "," if seen[-1] == "." else "."
        forms = [mantissa.replace(thousands, "").replace(",", ".")]
    elif len(seen) > 1:
        forms = [mantissa.replace(seen[0], "")]
    elif len(seen) == 1:
        forms = [mantissa.replace(",", ".")]
        if re.fullmatch(r"[-+]?[1-9]\d{0,2}[.,]\d{3}", mantissa):
            forms.append(mantissa.replace(seen[0], ""))
    else:
        forms = [mantissa]
    return [float(form + e + exponent) for form in forms]


def numeric_match(answer: str, expected: str, tolerance: float = 1e-9) -> float:
    """1.0 if the last numbers of both texts are equal to a relative ``tolerance`` in any of their readings, else 0.0.

    The last number is the result where an answer shows its working. An expectation without a number is matched by
    nothing.
    """
    ours, theirs = readings(answer), readings(expected)
    return float(any(math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12) for a in ours for b in theirs))


# ---- form

_FENCE = re.compile(r"\A\s*```[\w+-]*\n(.*?)\n?```\s*\Z", re.DOTALL)


def _unfenced(text: str) -> str:
    found = _FENCE.match(text)
    return found.group(1) if found else text


def valid_json(answer: str) -> float:
    """1.0 if the answer, without a Markdown fence around all of it, is one JSON value as RFC 8259 has it (no NaN), else
    0.0.
    """

    def refuse(word: str) -> float:
        raise ValueError(word)

    try:
        json.loads(_unfenced(answer), parse_constant=refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def valid_xml(answer: str) -> float:
    """1.0 if the answer, without a Markdown fence around all of it, is one well-formed XML document, else 0.0.

    A document type declaration is refused unread: entities of a generated text are nothing to expand.
    """
    text = _unfenced(answer).strip()
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        return 0.0
    try:
        ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        return 0.0
    return 1.0
