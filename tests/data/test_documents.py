"""Folders of text, Markdown, HTML and PDF: the text comes out whole, and what cannot be read is named and counted."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import own_files
import pytest
from chat_families import byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import documents, prepare, readers


def recipe(path: Path, **data) -> Recipe:
    return Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": str(path), **data}})


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_every_kind_gives_the_words_of_the_document_in_order(tmp_path):
    own_files.write_folder(tmp_path, 40)
    read = {Path(b.file).name: b.rows[0] for b in readers.blocks(tmp_path)}
    assert len(read) == 40
    for number in range(40):
        title, paragraphs = own_files.article(number)
        (name,) = [n for n in read if n.startswith(f"order-{number:03d}.")]
        assert words(read[name]["text"]) == words(" ".join([title, *paragraphs])), name
        assert read[name]["group"] == f"hall-{number % 3}/{name}"
        if not name.endswith(".pdf"):  # a PDF has lines, no paragraphs
            assert read[name]["text"].count("\n\n") == 3, name


def test_html_keeps_its_text_and_nothing_else():
    page = """<html><head><title>T</title><script>x()</script></head><body><nav>Menu</nav><!-- no -->
    <h1>A  heading</h1><p>One <b>bold</b>
    word &amp; an <i>entity</i>.</p><ul><li>first</li><li>second</li></ul><table><tr><td>a</td><td>b</td></tr></table>
    <pre>def f():
        return 1</pre><style>p {}</style></body></html>"""
    text = documents.html_text(page.encode(), Path("p.html"))
    assert text == "A heading\n\nOne bold word & an entity.\n\n- first\n- second\n\na b\n\ndef f():\n        return 1"


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="iso-8859-1">', "cp1252"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=windows-1250">', "cp1250"),
        ("<meta charset=utf-8>", "utf-8"),
        ("", "utf-16"),
    ],
)
def test_html_is_read_in_the_encoding_that_it_states(tmp_path, head, encoding):
    path = tmp_path / "p.html"
    path.write_bytes(own_files.html("Größe", ["müßig – “schön”"], head=head).encode(encoding))
    assert "müßig – “schön”" in documents.text_of(path)


def test_pdf_joins_divided_words_and_drops_running_heads(tmp_path):
    pages = [
        ["Annual report 2024", f"Chapter {i} begins with a sen-", "tence of its own and", "goes on.", f"page {i} of 5"]
        for i in range(1, 6)
    ]
    path = tmp_path / "r.pdf"
    path.write_bytes(own_files.pdf(pages))
    text = documents.text_of(path)
    assert "Annual report" not in text and "page 3" not in text
    assert "Chapter 4 begins with a sentence of its own and goes on." in text


def test_gzip_and_front_matter(tmp_path):
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"---\ntitle: x\n---\n# Head\n\nBody --- with dashes\n"))
    assert documents.text_of(tmp_path / "a.md.gz") == "# Head\n\nBody --- with dashes"


UNUSABLE = {
    "scan.pdf": (lambda: own_files.pdf([[], []]), "PDF without a text layer"),
    "locked.pdf": (lambda: own_files.encrypted_pdf(["nobody reads this"], "secret"), "encrypted PDF"),
    "torn.pdf": (lambda: own_files.pdf([["some text that is long enough"]])[:60], "damaged PDF"),
    "not.pdf": (lambda: b"hello", "damaged PDF"),
    "latin.txt": (lambda: "größe\n".encode("latin-1"), "not UTF-8"),
    "binary.txt": (lambda: b"a\0b", "binary data"),
    "empty.md": (lambda: b" \n\n", "empty"),
    "front.md": (lambda: b"---\nonly: this\n---\n", "empty"),
    "script.html": (lambda: b"<html><script>x()</script></html>", "HTML without text"),
    "strange.html": (lambda: b"<meta charset=klingon><p>x", "unknown encoding"),
    "liar.html": (lambda: b"<meta charset=ascii><p>caf\xe9", "not UTF-8"),
    "utf16.html": (lambda: b"<meta charset=utf-16><p>caf\xe9", "not UTF-8"),
    "torn.txt.gz": (lambda: gzip.compress(b"hello" * 99)[:-9], "damaged gzip file"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_documents_are_left_out_by_name_or_refused(tmp_path, name):
    content, why = UNUSABLE[name]
    folder = own_files.write_folder(tmp_path / "d", 8)
    (folder / name).write_bytes(content())
    notes = documents.Notes()
    assert len(list(readers.blocks(folder, notes=notes))) == 8
    ((file, reason),) = notes.left_out
    assert file == name and reason.startswith(why)
    assert [n for k, n in notes.counts().items() if k.startswith("left out: ")] == [1]
    with pytest.raises(UserError) as caught:
        list(readers.blocks(folder, notes=documents.Notes("refuse")))
    assert str(caught.value).startswith(f"{folder / name}: {why}")
    with pytest.raises(UserError, match=re.escape(why)):  # the only file
        list(readers.blocks(folder / name))


def test_owner_password_alone_does_not_lock_a_pdf(tmp_path):
    (tmp_path / "a.pdf").write_bytes(own_files.encrypted_pdf(["open to every reader"], ""))
    assert documents.text_of(tmp_path / "a.pdf") == "open to every reader"


def test_pages_without_text_are_counted(tmp_path):
    (tmp_path / "a.pdf").write_bytes(own_files.pdf([["a page with some text"], [], []]))
    notes = documents.Notes()
    list(readers.blocks(tmp_path, notes=notes))
    assert notes.counts()["PDF pages without text"] == 2


def test_a_folder_of_which_nothing_can_be_used_says_why(tmp_path):
    for name in ("scan.pdf", "locked.pdf", "latin.txt"):
        (tmp_path / name).write_bytes(UNUSABLE[name][0]())
    with pytest.raises(UserError, match=r"none of the 3 documents can be used: 1 x PDF without a text layer"):
        list(readers.blocks(tmp_path))


def test_the_report_of_the_preparation_names_and_counts(tmp_path):
    folder = own_files.write_folder(tmp_path / "d", 40)
    for name in ("scan.pdf", "locked.pdf", "latin.txt", "front.md"):
        (folder / name).write_bytes(UNUSABLE[name][0]())
    (folder / "logo.png").write_bytes(b"x")
    settings = {"sequence_length": 128, "long_documents": "paragraphs"}
    prepared = prepare(recipe(folder, **settings), byte_tokenizer(), cache_dir=tmp_path / "c")
    (source,) = prepared.report["sources"]
    assert source["format"] == "text" and source["rows"] == 40
    assert source["counts"]["read: PDF"] == 10 and source["counts"]["left out: encrypted PDF"] == 1
    assert source["counts"]["not read: files of kind .png"] == 1 and source["counts"]["split"] == 40
    assert {entry["file"] for entry in source["files"]["left_out"]} == {
        "scan.pdf",
        "locked.pdf",
        "latin.txt",
        "front.md",
    }
    assert any("4 document(s) left out" in w and "encrypted" in w for w in prepared.report["warnings"])
    (held,) = prepared.evals.values()
    files = [{s.place(i) for i in range(len(s))} for s in (prepared.train, held)]
    assert not files[0] & files[1] and len(files[0] | files[1]) == 40  # a document is on one side, all its parts


def test_tables_and_documents_in_one_folder_are_refused_but_a_readme_is_not(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "LICENSE.txt").write_text("licence")
    assert len(list(readers.blocks(tmp_path))) == 1
    (tmp_path / "chapter.md").write_text("a chapter")
    with pytest.raises(UserError, match=r"tables \(1, the first one is rows.jsonl\) and documents \(1"):
        list(readers.blocks(tmp_path))


def test_missing_parser_names_the_extra(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.pdf").write_bytes(own_files.pdf([["text"]]))
    (tmp_path / "b.html").write_text("<p>text")
    for module, file in (("pypdf", "a.pdf"), ("bs4", "b.html")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError) as caught:
            list(readers.blocks(tmp_path / file))
        assert "aifactory-train[documents]" in (caught.value.fix or "")


@settings(max_examples=60, deadline=None)
@example(text=" aaaaa", most=5)  # a part of blanks alone is no row
@given(text=st.text("ab .\n\t—é", max_size=400), most=st.integers(5, 80))
def test_parts_of_a_document_hold_every_word_once(text, most):
    parts = list(documents.paragraphs(text, most))
    assert all(0 < len(part) <= most for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_a_long_document_by_itself_becomes_rows_at_paragraphs(tmp_path):
    paragraphs = [" ".join(own_files.article(i)[1]) for i in range(200)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    (block,) = readers.blocks(tmp_path / "book.txt")
    assert len(block.rows) > 4 and max(len(r["text"]) for r in block.rows) <= documents.ALONE // 2
    assert [p for r in block.rows for p in r["text"].split("\n\n")] == paragraphs


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), limit=st.integers(24, 64))
def test_cut_between_paragraphs_predicts_every_token_once(tmp_path_factory, lengths, limit):
    """As ``split`` does, with better places: nothing is lost, and a paragraph that fits is not divided."""
    import json

    tmp_path = tmp_path_factory.mktemp("cut")
    text = "\n\n".join("x" * (n - 1) + str(i % 10) for i, n in enumerate(lengths))
    rows = [{"text": text}, {"text": "another row"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "e.jsonl").write_text('{"text": "held out"}\n')
    options = {"eval": str(tmp_path / "e.jsonl"), "overlap": "allow"}
    tokenizer = byte_tokenizer()
    whole, parts = (
        prepare(recipe(tmp_path / "r.jsonl", **options, **o), tokenizer, cache_dir=tmp_path / "c").train
        for o in ({"sequence_length": 4096}, {"sequence_length": limit, "long_documents": "paragraphs"})
    )
    assert max(parts.lengths) <= limit
    assert int(parts.supervised.sum()) == int(whole.supervised.sum())
    assert sum(parts.text_bytes(i) for i in range(len(parts))) == sum(whole.text_bytes(i) for i in range(len(whole)))


# ---- links


def test_links_that_lead_out_of_the_folder_are_left_out_named_and_counted(tmp_path):
    """Another user's file must not come into the model because somebody put a link to it into the folder."""
    folder = own_files.write_folder(tmp_path / "d", 8)
    (tmp_path / "private").mkdir()
    (tmp_path / "private/salaries.txt").write_text("confidential canary words")
    (folder / "out.txt").symlink_to(tmp_path / "private/salaries.txt")
    (folder / "up.txt").symlink_to("../private/salaries.txt")
    (folder / "folder").symlink_to(tmp_path / "private")
    (folder / "twice.txt").symlink_to("out.txt")  # inside, but it leads on
    (folder / "self.txt").symlink_to("self.txt")
    (folder / "gone.txt").symlink_to("was-here.txt")
    (folder / "round").symlink_to(".")
    os.mkfifo(folder / "pipe.txt")
    (folder / "same.txt").symlink_to("hall-0/order-000.txt")
    prepared = prepare(recipe(folder, sequence_length=128), byte_tokenizer(), cache_dir=tmp_path / "c")
    (source,) = prepared.report["sources"]
    assert source["rows"] == 9 and "canary" not in "".join(
        p.read_bytes().decode("latin-1") for p in _all(tmp_path / "c")
    )
    left_out = {entry["file"]: entry["why"] for entry in source["files"]["left_out"]}
    assert left_out == {
        **dict.fromkeys(("out.txt", "up.txt", "folder", "twice.txt"), "a link that leads out of the folder"),
        **dict.fromkeys(("self.txt", "gone.txt"), "a link that leads nowhere"),
        "round": "a link to a folder",
        "pipe.txt": "neither file nor folder",
    }
    assert source["counts"]["left out: a link that leads out of the folder"] == 4
    assert any("8 document(s) left out" in w and "leads out" in w for w in prepared.report["warnings"])
    with pytest.raises(UserError, match="a link that leads out of the folder"):
        list(readers.blocks(folder, notes=documents.Notes("refuse")))


def _all(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_tables_behind_links_are_left_out_too_and_nothing_else_is_said_to_be_there(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "d/rows.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"no data file .*; 1 x a link that leads out of the folder\n.*copy the files"):
        list(readers.blocks(tmp_path / "d"))
    (tmp_path / "alias").symlink_to("d")  # the folder that the user names may be a link
    (tmp_path / "d/more.jsonl").write_text('{"text": "c"}\n')
    notes = documents.Notes()
    (block,) = readers.blocks(tmp_path / "alias", notes=notes)
    assert block.file == str(tmp_path / "alias/more.jsonl") and notes.left_out == [
        ("rows.jsonl", "a link that leads out of the folder")
    ]


def test_a_snapshot_of_the_hugging_face_cache_is_links_to_its_blobs(tmp_path):
    snapshot = tmp_path / "datasets--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--a--b/blobs").mkdir()
    (tmp_path / "datasets--a--b/blobs/77").write_text('{"text": "a"}\n')
    (snapshot / "rows.jsonl").symlink_to("../../blobs/77")
    (snapshot / "other.jsonl").symlink_to("../../refs")
    notes = documents.Notes()
    assert len(list(readers.blocks(snapshot, notes=notes))) == 1
    assert [name for name, _ in notes.left_out] == ["other.jsonl"]


def test_a_converter_is_not_given_a_folder_with_links_out_of_it(tmp_path):
    (tmp_path / "secret.py").write_text("def f(): pass")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").symlink_to(tmp_path / "secret.py")
    source = {
        "source": str(tmp_path / "code"),
        "converter": "code.docstrings:rows",
        "options": {"direction": "describe"},
    }
    with pytest.raises(UserError, match="a link that leads out of the folder, and a converter would follow it"):
        prepare(recipe(tmp_path, train=source), byte_tokenizer(), cache_dir=tmp_path / "c")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = own_files.write_folder(tmp_path / "d", 4)
    listed = os.scandir

    def refusing(path):
        if Path(path).name == "hall-1":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="hall-1: the folder cannot be read: Permission denied"):
        list(readers.blocks(folder))
