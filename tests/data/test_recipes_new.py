"""``aifactory recipes new`` and what follows it: from a user's own files to an adapter, and what is refused on the
way.
"""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import helpers
import own_files
import pytest
import yaml

from aifactory_train.cli import main
from aifactory_train.config.loading import load_recipe


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def tickets(count: int = 120, **more: Any) -> list[dict[str, Any]]:
    draw = random.Random(4)
    return [
        {
            "customer_id": f"c{i % 15}",
            "created": f"2024-{1 + i % 12:02d}-{1 + i % 28:02d}",
            "ticket": f"The {draw.choice(own_files.PARTS)} number {i} {draw.choice(own_files.FAULTS)} since shift "
            f"{draw.randint(1, 90)}",
            "category": ("repair", "order", "question")[draw.randrange(3)],
        }
        | more
        for i in range(count)
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(capsys: pytest.CaptureFixture, *args: Any) -> dict[str, Any]:
    assert main(["recipes", "new", *map(str, args), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# ---- what is written


def test_classification_from_a_csv(here, capsys):
    write_csv(here / "tickets.csv", tickets())
    made = new(capsys, "acme/tickets", "--data", "tickets.csv", "--sector", "smes", "--licence", "own")
    assert made["columns"] == {"ticket": "prompt", "category": "completion"}
    assert made["labels"] == ["order", "question", "repair"] and made["metrics"][0] == "accuracy"
    assert made["split"] == {"group": "customer_id"} and made["report"]["rows"] == 120
    recipe = load_recipe(made["recipe"])
    assert recipe.id == "acme/tickets" and recipe.about.sector == "smes" and recipe.data.train[0].licence == "own"
    assert recipe.data.split_by is not None and recipe.data.split_by.group == "customer_id"
    assert recipe.data.train[0].source == str(here / "tickets.csv")
    text = Path(made["recipe"]).read_text()
    assert text.startswith("# yaml-language-server: $schema=") and len(text.splitlines()) < 60
    schema = json.loads(Path(text.splitlines()[0].partition("$schema=")[2]).read_text())
    import jsonschema

    jsonschema.validate(yaml.safe_load(text.replace("5e-4", "0.0005")), schema)
    assert json.loads(Path(made["report_file"]).read_text())["languages"] == made["report"]["languages"]
    assert len(made["next"]) == 2 and made["next"][1].startswith("aifactory train acme/tickets.yaml")


@pytest.mark.parametrize(
    ("rows", "task", "columns", "form"),
    [
        (
            [{"frage": f"Was ist {i}?", "antwort": f"Ein Ding mit der Nummer {i}"} for i in range(9)],
            "qa",
            True,
            "prompt",
        ),
        ([{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(9)], "qa", False, "prompt"),
        (
            [{"Body": f"running text number {i} that is long enough to be one", "no": i} for i in range(9)],
            "text",
            True,
            "text",
        ),
        ([{"text": f"text {i}", "page": i} for i in range(9)], "text", False, "text"),
        (
            [
                {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"a {i}"}]}
                for i in range(9)
            ],
            "chat",
            False,
            "messages",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_are_guessed_and_the_guess_is_said(here, capsys, rows, task, columns, form, kind):
    if kind == "jsonl":
        helpers.write_jsonl(here / "r.jsonl", rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), here / "r.parquet")
    made = new(capsys, "mine", "--data", f"r.{kind}")
    assert (made["task"], bool(made["columns"]), made["format"]) == (task, columns, form)
    assert made["assumed"] and made["licence"] == "MISSING"
    recipe = load_recipe("mine.yaml")
    assert recipe.data.train[0].columns == made["columns"] and recipe.data.train[0].licence == "unknown"
    assert "MISSING" in Path("mine.yaml").read_text()


def test_options_replace_every_guess(here, capsys, tiny_model_dir):
    write_csv(here / "t.csv", tickets())
    write_csv(here / "e.csv", tickets(9, customer_id="other"))
    options = [
        "--map",
        "ticket=text",
        "--task",
        "text",
        "--time",
        "created",
        "--base",
        tiny_model_dir,
        "--out",
        "sub/x.yaml",
    ]
    made = new(capsys, "x", "--data", "t.csv", *options)
    recipe = load_recipe("sub/x.yaml")
    assert made["task"] == "text" and recipe.data.split_by is not None and recipe.data.split_by.time == "created"
    assert recipe.model.base == str(tiny_model_dir) and recipe.data.long_documents == "paragraphs"
    assert recipe.data.sequence_length <= 512  # what this model has
    made = new(capsys, "y", "--data", "t.csv", "--eval", "e.csv", "--base", "language/icelandic")
    assert made["report"]["leakage"]["held_out_rows"] == 9 and load_recipe("y.yaml").data.eval is not None
    assert load_recipe("y.yaml").model.base == load_recipe("language/icelandic").model.base


def test_a_recipe_beside_its_rows_can_move_with_them(here, capsys):
    own_files.write_folder(here / "docs", 12)
    new(capsys, "mine", "--data", "docs")
    assert 'source: "./docs"' in Path("mine.yaml").read_text()
    (here / "elsewhere").mkdir()
    for name in ("docs", "mine.yaml"):
        (here / name).rename(here / "elsewhere" / name)
    assert load_recipe("elsewhere/mine.yaml").data.train[0].source == str(here / "elsewhere/docs")


# ---- rows that judge answers


def judged(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs of answers, and answers of which one in four is good."""
    asked = [row["ticket"] for row in tickets(count)]
    pairs = [
        {"customer": f"c{i % 9}", "question": q, "good": f"Thank you, {i} is noted.", "bad": f"No. {i}"}
        for i, q in enumerate(asked)
    ]
    rated = [
        {"question": q, "answer": f"Reply {i} of {i % 7}", "helpful": str(i % 4 == 0).lower()}
        for i, q in enumerate(asked)
    ]
    return pairs, rated


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_pairs_become_dpo_and_rated_answers_kto(here, capsys, tiny_model_dir, kind):
    pairs, rated = judged(80)
    for name, rows in (("pairs", pairs), ("rated", rated)):
        (write_csv if kind == "csv" else helpers.write_jsonl)(here / f"{name}.{kind}", rows)
    made = new(capsys, "pairs", "--data", f"pairs.{kind}", "--base", tiny_model_dir, "--licence", "own")
    assert made["columns"] == {"question": "prompt", "good": "chosen", "bad": "rejected"}
    assert (made["task"], made["method"], made["split"]) == ("preference", "dpo", {"group": "customer"})
    assert any("'good' is the better answer and 'bad' the worse one" in line for line in made["assumed"])
    recipe = load_recipe("pairs.yaml")
    how = recipe.methods.preference
    assert how is not None and how.kind == "dpo" and recipe.data.train[0].format == "preference"
    imitating = new(
        capsys,
        "sft",
        "--data",
        f"pairs.{kind}",
        "--base",
        tiny_model_dir,
        "--map",
        "question=prompt",
        "--map",
        "good=completion",
    )
    assert imitating["method"] is None and load_recipe("sft.yaml").methods.preference is None
    assert recipe.train.learning_rate == pytest.approx(load_recipe("sft.yaml").train.learning_rate / 10)

    made = new(capsys, "rated", "--data", f"rated.{kind}", "--base", tiny_model_dir)
    assert made["columns"] == {"question": "prompt", "answer": "completion", "helpful": "label"}
    how = load_recipe("rated.yaml").methods.preference
    assert how is not None and how.kind == "kto"
    assert 1.0 < how.desirable_weight * 20 / (how.undesirable_weight * 60) < 4 / 3  # as the paper recommends
    everything = new(capsys, "all", "--data", f"rated.{kind}", "--task", "qa", "--base", tiny_model_dir)
    assert everything["method"] is None and everything["format"] == "prompt"


def test_what_rejected_answers_hold_is_in_the_report(here, capsys, tiny_model_dir):
    """Both answers are trained on."""
    pairs, _ = judged(12)
    helpers.write_jsonl(
        here / "p.jsonl", [{**row, "bad": f"Ask person{i}@example.org."} for i, row in enumerate(pairs)]
    )
    made = new(capsys, "p", "--data", "p.jsonl", "--base", tiny_model_dir)
    assert made["report"]["personal_data"]["counts"] == {"email": 12} and made["report"]["rows"] == 12


def test_other_columns_of_the_same_names_change_nothing(here, capsys, tiny_model_dir):
    _, rated = judged(24)
    rows = [{"label": "printer", **row} for row in rated]
    helpers.write_jsonl(here / "r.jsonl", rows)
    made = new(capsys, "r", "--data", "r.jsonl", "--base", tiny_model_dir)
    assert made["method"] == "kto" and made["columns"]["helpful"] == "label" and made["columns"]["label"] != "label"
    helpers.write_jsonl(here / "good.jsonl", [{**row, "helpful": True} for row in rated])
    made = new(capsys, "g", "--data", "good.jsonl", "--base", tiny_model_dir)
    assert made["method"] is None and any("every answer is a good one" in line for line in made["assumed"])


def test_conversations_that_begin_alike_need_no_column_for_the_question(here, capsys, tiny_model_dir):
    def side(i: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Which part is number {i}?"}, {"role": "assistant", "content": answer}]

    helpers.write_jsonl(
        here / "p.jsonl", [{"chosen": side(i, f"Pump {i}"), "rejected": side(i, "No idea")} for i in range(12)]
    )
    made = new(capsys, "p", "--data", "p.jsonl", "--base", tiny_model_dir)
    assert made["method"] == "dpo" and made["columns"] == {}


def test_conversations_that_repeat_the_prompt_ask_it_once():
    """As in published preference data: a column with the question beside whole conversations."""
    from aifactory_train.data.rows import canonical

    asked, good = {"role": "user", "content": "Which part?"}, {"role": "assistant", "content": "The pump."}
    bad = {"role": "assistant", "content": "No idea."}
    reported = {"role": "system", "content": "Be brief."}
    for before in ([], [reported]):
        row = {"prompt": "Which part?", "chosen": [*before, asked, good], "rejected": [*before, asked, bad]}
        found = canonical(row, "preference", {})
        assert found["messages"] == row["chosen"] and found["rejected"] == row["rejected"]
    answers = canonical({"prompt": "Which part?", "chosen": [good], "rejected": [bad]}, "preference", {})
    assert answers["messages"] == [asked, good] and answers["rejected"] == [asked, bad]


def test_drafts_for_judged_answers_train(here, capsys, tiny_model_dir):
    pairs, rated = judged(48)
    quick: dict[str, Any] = {"train.max_steps": 2, "parallel.threads": 1}
    quick |= dict.fromkeys(("eval.before", "eval.forgetting", "export.automatic", "record.pack"), "false")
    overrides = [text for key, value in quick.items() for text in ("--set", f"{key}={value}")]
    for name, rows, figure in (("pairs", pairs, "reward_accuracy"), ("rated", rated, "kl")):
        helpers.write_jsonl(here / f"{name}.jsonl", rows)
        new(capsys, name, "--data", f"{name}.jsonl", "--base", tiny_model_dir, "--licence", "own")
        assert main(["train", f"{name}.yaml", "--name", name, *overrides]) == 0, capsys.readouterr().err
        assert "would make it 1" not in capsys.readouterr().err  # KTO's weights are balanced already
        steps = [json.loads(line) for line in (here / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        assert len(steps) == 2 and figure in steps[-1]
        assert "preference_loss" in json.loads((here / f"runs/{name}/eval.json").read_text())["after"]


# ---- what is refused


def _files(folder: Path) -> None:
    write_csv(folder / "t.csv", tickets(40))
    write_csv(folder / "odd.csv", [{"a": f"x{i}", "b": f"y{i}"} for i in range(5)])
    write_csv(
        folder / "dated.csv", [{**r, "created": "3/4/24" if i == 6 else r["created"]} for i, r in enumerate(tickets(9))]
    )
    write_csv(folder / "same.csv", tickets(9, customer_id="one"))
    helpers.write_jsonl(folder / "one.jsonl", [{"text": "a"}])
    helpers.write_jsonl(folder / "answers.jsonl", 2 * [{"why": "a", "chosen": "b", "rejected": "c"}])
    helpers.write_jsonl(folder / "alike.jsonl", 2 * [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    helpers.write_jsonl(folder / "bad.jsonl", 2 * [{"prompt": "a", "completion": "b", "label": False}])
    helpers.write_jsonl(folder / "stars.jsonl", [{"prompt": "a", "completion": "b", "label": n} for n in (1, 5)])
    (folder / "hole.csv").write_text("prompt,completion\nq1,a1\nq2,\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "latin.csv").write_bytes("prompt,completion\nwo,größe\n".encode("latin-1"))
    (folder / "empty").mkdir()
    (folder / "scans").mkdir()
    (folder / "scans/a.pdf").write_bytes(own_files.pdf([[]]))
    (folder / "mixed").mkdir()
    (folder / "mixed/a.txt").write_text("text")
    (folder / "mixed/b.csv").write_text("text\nx\n")
    (folder / "forms").mkdir()
    helpers.write_jsonl(folder / "forms/chats.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    helpers.write_jsonl(folder / "forms/alpaca.jsonl", 2 * [{"instruction": "a", "output": "b"}])
    (folder / "taken.yaml").write_text("mine: true\n")
    (folder / "noted.report.json").write_text("{}")
    (folder / "rows.docx").write_bytes(b"x")
    (folder / "rows.rtf").write_bytes(b"x")


NEW = [
    (["--data", "t.csv"], ["ID: the new recipe needs an id"]),
    (["x"], ["--data: no rows were named"]),
    (["x", "--data", "absent.csv"], ["--data: no such file or folder: absent.csv"]),
    (["Bad Id", "--data", "t.csv"], ["'Bad Id' is no recipe id"]),
    (["../x", "--data", "t.csv"], ["'../x' is no recipe id"]),
    (["health/phenotype-terms", "--data", "t.csv"], ["there is a recipe 'health/phenotype-terms' already"]),
    (["taken", "--data", "t.csv"], ["taken.yaml: exists already"]),
    (["noted", "--data", "t.csv"], ["noted.report.json: exists already"]),
    (["x", "--data", "t.csv", "--out", "x.json"], ["--out: a recipe file ends in .yaml"]),
    (["x", "--data", "t.csv", "--sector", "helth"], ["unknown sector 'helth' (did you mean 'health'?)"]),
    (["x", "--data", "t.csv", "--base", "no-such-model"], ["--base: 'no-such-model' is neither a recipe nor a model"]),
    (["x", "--data", "t.csv", "--map", "ticket"], ["--map ticket: a mapping has the form COLUMN=ROLE"]),
    (["x", "--data", "t.csv", "--map", "ticket=promt"], ["did you mean 'prompt'?"]),
    (["x", "--data", "t.csv", "--map", "tiket=prompt"], ["there is no column 'tiket' (did you mean 'ticket'?)"]),
    (["x", "--data", "t.csv", "--map", "ticket=text", "--map", "category=text"], ["two columns are mapped to 'text'"]),
    (["x", "--data", "t.csv", "--map", "ticket=prompt"], ["t.csv:2", "no known columns"]),
    (["x", "--data", "t.csv", "--group-by", "custommer_id"], ["t.csv:2", "did you mean 'customer_id'?"]),
    (
        ["x", "--data", "same.csv", "--group-by", "customer_id"],
        ["--group-by: all rows have the same value in 'customer_id'"],
    ),
    (["x", "--data", "dated.csv", "--time", "created"], ["dated.csv:8", "'3/4/24' in column 'created' is no date"]),
    (
        ["x", "--data", "t.csv", "--time", "created", "--group-by", "customer_id"],
        ["--time: rows are split by a group or by time"],
    ),
    (["x", "--data", "answers.jsonl"], ["answers.jsonl:1: 'chosen' and 'rejected' are answers", "--map COLUMN=prompt"]),
    (["x", "--data", "alike.jsonl"], ["alike.jsonl:1: 'chosen' and 'rejected' are the same"]),
    (["x", "--data", "bad.jsonl"], ["bad.jsonl:1: all 2 answers are rated bad"]),
    (
        ["x", "--data", "stars.jsonl", "--task", "feedback"],
        ["stars.jsonl:1: the task feedback needs columns for prompt"],
    ),
    (
        ["x", "--data", "t.csv", "--task", "preference"],
        ["t.csv:2: the task preference needs columns for prompt, chosen"],
    ),
    (["x", "--data", "odd.csv"], ["odd.csv:2: it is not clear which columns hold what: a, b", "--map COLUMN=prompt"]),
    (["x", "--data", "t.csv", "--task", "text"], ["it is not clear which columns hold what"]),
    (["x", "--data", "empty", "--task", "qa"], ["the folder holds no data file"]),
    (["x", "--data", "scans"], ["none of the 1 documents can be used: 1 x PDF without a text layer", "OCR"]),
    (["x", "--data", "mixed"], ["tables (1, the first one is b.csv) and documents (1"]),
    (
        ["x", "--data", "forms"],
        [
            "different forms: forms/alpaca.jsonl has instruction, output; forms/chats.jsonl has messages",
            "data.train: [",
        ],
    ),
    (["x", "--data", "one.jsonl"], ["one.jsonl:1: one row cannot be split"]),
    (["x", "--data", "hole.csv"], ["hole.csv:3: 'completion' is empty"]),
    (["x", "--data", "broken.jsonl"], ["broken.jsonl:2: not valid JSON"]),
    (["x", "--data", "latin.csv"], ["latin.csv:2: byte 0xf6", "not UTF-8"]),
    (["x", "--data", "rows.docx"], ["rows.docx", "no Word file, or a damaged one"]),
    (["x", "--data", "rows.rtf"], ["files of kind '.rtf' are not read", ".docx"]),
]


@pytest.mark.parametrize(("args", "words"), NEW, ids=[" ".join(c[0])[:60] for c in NEW])
def test_wrong_requests_end_in_one_message_and_leave_nothing(here, capsys, args, words):
    _files(here)
    before = sorted(here.rglob("*"))
    assert main(["recipes", "new", *args]) == 2
    out = capsys.readouterr()
    assert out.out == "" and "Traceback" not in out.err and out.err.count("aifactory recipes:") == 1
    for word in words:
        assert word in out.err, out.err
    assert sorted(here.rglob("*")) == before
    assert (here / "taken.yaml").read_text() == "mine: true\n"


RULES: list[tuple[dict[str, Any], list[str]]] = [
    ({"data.labels": "[repair, order]"}, ["r.csv:", "the label 'question' is not in data.labels"]),
    ({"data.split_by": "{group: custmer}"}, ["r.csv:2", "there is no column 'custmer'"]),
    ({"data.split_by": "{time: ticket}"}, ["r.csv:2", "in column 'ticket' is no date"]),
    ({"data.split_by": "{group: a, time: b}"}, ["data.split_by", "give one of group and time"]),
    ({"data.split_by": "{grup: a}"}, ["unknown key 'data.split_by.grup' (did you mean 'group'?)"]),
    (
        {"data.split_by": "{group: customer_id}", "data.eval": "e.csv"},
        ["the group 'c0' is in the training rows", "e.csv:"],
    ),
    ({"data.unreadable": "refuse", "data.train": "docs"}, ["docs/z.pdf: encrypted PDF"]),
    ({"data.labels": "[]"}, ["data.labels"]),
]


@pytest.mark.parametrize(("settings", "words"), RULES, ids=["+".join(c[0]) + str(i) for i, c in enumerate(RULES)])
def test_rules_are_enforced_through_the_command_line(here, capsys, tiny_model_dir, settings, words):
    write_csv(here / "r.csv", tickets(60))
    write_csv(here / "e.csv", tickets(1))
    own_files.write_folder(here / "docs", 8)
    (here / "docs/z.pdf").write_bytes(own_files.encrypted_pdf(["closed"], "x"))
    tree = {"source": "./r.csv", "columns": {"ticket": "prompt", "category": "completion"}}
    (here / "r.yaml").write_text(yaml.safe_dump({"model": {"base": str(tiny_model_dir)}, "data": {"train": tree}}))
    overrides = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    if "data.eval" in settings:
        overrides += ["--set", "data.eval.0.columns={ticket: prompt, category: completion}"]
    assert main(["prepare", "r.yaml", *overrides, "--cache-dir", "c"]) == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    for word in words:
        assert word in out.err, out.err


# ---- prepare --report


def test_report_of_large_data_is_made_when_asked_and_kept(here, capsys, tiny_model_dir, monkeypatch):
    from aifactory_train.data import report

    monkeypatch.setattr(report, "AT_ONCE", 1000)  # "large"
    rows = [{"text": f"{own_files.article(i)[1][0]} Write to user{i}@example.org or not."} for i in range(60)]
    helpers.write_jsonl(here / "r.jsonl", rows)
    (here / "r.yaml").write_text(
        yaml.safe_dump({"model": {"base": str(tiny_model_dir)}, "data": {"train": "./r.jsonl"}})
    )
    reports = []
    for extra in ([], ["--report"], []):
        assert main(["prepare", "r.yaml", "--json", "--cache-dir", "c", *extra]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["own"] is None and reports[0]["languages"]["shares"] == {"en": 1.0}
    assert (
        reports[1]["own"]["personal_data"]["counts"] == {"email": 60} and reports[1]["own"]["leakage"]["share"] == 0.0
    )
    assert reports[2]["own"] == reports[1]["own"] and reports[2]["reused"]  # a later run takes it into its record
    assert main(["prepare", "r.yaml", "--report", "--cache-dir", "c"]) == 0
    shown = capsys.readouterr()
    assert "60 x email in 60 rows" in shown.out and "warning: personal data found: 60 x email" in shown.err
    assert "user7@" not in shown.out + shown.err


# ---- the whole way


def test_two_hundred_documents_become_an_adapter_with_two_commands(tmp_path, tiny_model_dir):
    """As a user does it, in processes of their own: recipes new, train."""
    own_files.write_folder(tmp_path / "orders", 200)
    (tmp_path / "orders/scan.pdf").write_bytes(own_files.pdf([[]]))
    env = helpers.environment(AIFACTORY_CACHE=os.environ["AIFACTORY_CACHE"])
    first = helpers.cli(
        *("recipes", "new", "acme/orders", "--data", "orders", "--base", tiny_model_dir, "--licence", "own"),
        cwd=tmp_path,
        env=env,
    )
    assert first.returncode == 0, first.stderr[-3000:]
    assert "left out: scan.pdf: PDF without a text layer" in first.stderr
    quick = {"train.max_steps": 12, "parallel.threads": 1, "export.verify": "false", "eval.forgetting": "false"}
    overrides = [text for key, value in quick.items() for text in ("--set", f"{key}={value}")]
    second = helpers.cli("train", "acme/orders.yaml", "--name", "orders", *overrides, cwd=tmp_path, env=env)
    assert second.returncode == 0, second.stderr[-3000:]
    run = tmp_path / "runs/orders"
    assert (run / "export/adapter/adapter_model.safetensors").stat().st_size > 10_000
    figures = json.loads((run / "eval.json").read_text())
    assert figures["after"]["bits_per_byte"] < figures["before"]["bits_per_byte"]
    record = json.loads((run / "record.json").read_text())
    own = record["data_sets"]["own"]
    assert own["rows"] == 200 and own["leakage"]["share"] == 0.0 and own["licences"][0]["licence"] == "own"
    assert "scan.pdf" not in (run / "record.json").read_text()  # the record counts, it names no file


# ---- what stands beside the known columns


def test_text_with_numbers_as_labels_is_read_as_the_draft_says(here, capsys, tiny_model_dir):
    rows = [
        {"text": f"The part number {i} of the gate is {'loose' if i % 2 else 'tight'}.", "label": i % 2}
        for i in range(40)
    ]
    helpers.write_jsonl(here / "r.jsonl", rows)
    made = new(capsys, "r", "--data", "r.jsonl", "--base", tiny_model_dir, "--licence", "own")
    assert made["columns"] == {"text": "prompt", "label": "completion"} and made["labels"] == ["0", "1"]
    assert main(["prepare", "r.yaml", "--set", "data.overlap=allow", "--cache-dir", "c"]) == 0, capsys.readouterr().err


def test_judged_conversations_become_kto(here, capsys, tiny_model_dir):
    def row(i: int, **more: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": f"Part {i}?"}, {"role": "assistant", "content": f"It is {i * 3}."}]
        return {"messages": turns, **more}

    helpers.write_jsonl(here / "r.jsonl", [row(i, thumbs_up=i % 2 == 0) for i in range(24)])
    made = new(capsys, "r", "--data", "r.jsonl", "--base", tiny_model_dir)
    assert made["method"] == "kto" and made["columns"] == {"thumbs_up": "label"}
    made = new(capsys, "all", "--data", "r.jsonl", "--task", "chat", "--base", tiny_model_dir)
    assert made["method"] is None and made["report"]["unused"]["columns"] == {"thumbs_up": 24}
    helpers.write_jsonl(here / "topics.jsonl", [row(i, label=i % 2) for i in range(24)])
    assert new(capsys, "topics", "--data", "topics.jsonl", "--base", tiny_model_dir)["method"] is None


def test_what_a_draft_does_not_use_is_said(here, capsys, tiny_model_dir):
    (here / "ds").mkdir()
    rows = [{"prompt": f"Where is part {i}?", "completion": f"In box {i * 3}.", "shelf": "x"} for i in range(24)]
    helpers.write_jsonl(here / "ds" / "train.jsonl", rows)
    helpers.write_jsonl(here / "ds" / "test.jsonl", rows[:5])
    (here / "ds" / "dataset_infos.json").write_text("{}")
    assert main(["recipes", "new", "r", "--data", "ds", "--base", str(tiny_model_dir)]) == 0
    captured = capsys.readouterr()
    reported = captured.out + captured.err
    assert "not used: column 'shelf' (24 rows)" in reported and "24 rows" in reported
    assert "only the split 'train' is read; not read: test (1 file(s))" in reported and "dataset_infos.json" in reported
