"""The table of forms in the documentation is what the code makes of its examples, and none of them loses anything in
silence.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from forms_table import Example, examples, read_as, written

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_documentation_says_what_the_code_does():
    text = DOCS.read_text(encoding="utf-8")
    assert written(text) == text, "python tests/data/forms_table.py docs/data.md"


@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e[0])
def test_an_example_is_used_whole_or_named(example: Example):
    """The texts of the examples are capital letters: each is in what is read, or the row is refused, or its column is
    named.
    """
    reported = read_as(example)
    _, _, row, columns = example
    if reported.startswith("refused: "):
        return
    assert "**" in reported
    for name, value in row.items():
        for text in re.findall(r'"([A-Z]0?)\\?"', json.dumps(value)):
            assert (
                re.search(rf"(?<![a-z]){text}(?!\w)", reported)
                or name in reported.partition("; named: ")[2]
                or ("another system turn" in reported)
            ), text
    assert not columns or "named: prompt" in reported


def test_a_changed_form_changes_the_table(monkeypatch):
    from aifactory_train.data import turns

    before = written(DOCS.read_text(encoding="utf-8"))
    monkeypatch.setitem(turns.OTHER_ROLES, "bot", "user")
    assert written(before) != before
