"""CSV as spreadsheets write it: semicolons, a byte-order mark, line breaks inside cells; other encodings are refused by
name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from aifactory_train.core.errors import UserError
from aifactory_train.data import readers
from aifactory_train.data.read_csv import separator

ROWS = [
    {"Frage": "Wie groß?\nBitte „M“", "Antwort": "5 €; pro Stück, bar"},
    {"Frage": "a|b\tc", "Antwort": 'sagt "ja"'},
]


def written(separator: str, ending: str = "\r\n") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(["Frage", "Antwort"]), *(separator.join(map(cell, row.values())) for row in ROWS)]
    return ending.join(lines) + ending


def read(path: Path) -> list[dict[str, str]]:
    return [row for block in readers.blocks(path) for row in block.rows or []]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_columns_are_found_whatever_separates_them(tmp_path: Path, separator: str, encoding: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(written(separator).encode(encoding))
    assert read(path) == ROWS


@pytest.mark.parametrize(
    ("header", "found"),
    [("a", ","), ("a;b,c;d", ";"), ("a,b;c,d", ","), ('"x;y",b', ","), ('"x,y";b', ";"), ('"open;', ","), ("", ",")],
)
def test_names_in_quotes_do_not_count(header: str, found: str) -> None:
    assert separator(header) == found


@pytest.mark.parametrize(("encoding", "reported"), [("cp1252", "windows-1252"), ("utf-16", "utf-16")])
def test_another_encoding_is_refused_with_the_command_that_keeps_every_character(
    tmp_path: Path, encoding, reported
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(written(";").encode(encoding))
    with pytest.raises(UserError, match=rf"iconv -f {reported} -t utf-8"):
        read(path)
