"""The evidence pack: complete against the lists of the forms, honest about what is missing, valid for the official
validators.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aifactory_train.core.missing import has_missing, is_missing, missing, missing_places
from aifactory_train.record import fill
from aifactory_train.record.files import load_record
from aifactory_train.record.render import forms, machine
from aifactory_train.record.render.summary import public_summary
from aifactory_train.report.pack import render, write_pack

# number -> who fills it; the Model Documentation Form's list, in its order
MDF = {
    "0": "auto",
    "1.1": "person",
    "1.2": "auto+person",
    "1.3": "auto",
    "1.4": "person",
    "1.5": "person",
    "1.6": "auto",
    "2.1": "auto",
    "2.2": "auto+person",
    "2.3": "auto",
    "2.4": "auto",
    "2.5": "auto",
    "2.6": "auto",
    "2.7": "auto",
    "3.1": "person",
    "3.2": "auto+person",
    "4.1": "person",
    "4.2": "person",
    "4.3": "person",
    "4.4": "auto",
    "5.1": "auto",
    "5.2": "person",
    "6.1": "auto",
    "6.2": "auto+person",
    "6.3": "person",
    "6.4": "auto",
    "6.5": "auto+person",
    "6.6": "auto",
    "6.7": "auto+person",
    "6.8": "person",
    "7.1": "auto",
    "7.2": "auto",
    "7.3": "auto",
    "8.1": "auto",
    "8.2": "auto",
    "8.3": "auto",
    "8.4": "auto",
}
SUMMARY = {
    "0.1": "auto",
    "0.2": "auto",
    "1.1": "person",
    "1.1b": "person",
    "1.2a": "auto+person",
    "1.2b": "base",
    "1.2c": "person",
    "1.3a": "auto",
    "1.3b": "auto",
    "1.3c": "person",
    "1.3d": "auto+person",
    "1.3e": "auto",
    "1.3f": "person",
    "2.1": "auto+person",
    "2.2.1": "person",
    "2.2.2": "person",
    "2.3": "auto+person",
    "2.4": "person",
    "2.5": "auto+person",
    "2.6": "person",
    "3.1a": "person",
    "3.1b": "person",
    "3.2": "auto+person",
    "3.3": "auto",
}
FACTS = {
    "origin": "own",
    "personal_data": "none",
    "tdm_basis": "own",
    "obtained": "written for this",
    "collected_from": "2026-01",
    "collected_to": "2026-02",
    "url": "not public",
}


@pytest.fixture
def record(tell):
    return load_record(tell().path)


def test_forms_match_their_lists(record):
    assert {f.number: f.fill for f in forms.model_documentation(record)} == MDF
    assert {f.number: f.fill for f in public_summary(record)} == SUMMARY


def test_every_field_is_auto_person_or_missing(record):
    for field in [*forms.model_documentation(record), *public_summary(record), *forms.annex_iv(record)]:
        assert field.status in ("auto", "person", "partly MISSING", "MISSING"), field
        if field.fill in ("person", "base"):
            assert field.status in ("MISSING", "partly MISSING"), field.number  # nobody has filled anything in
        if field.status == "auto":
            assert not has_missing(field.value)


def test_a_person_fills_and_nothing_is_invented(tell, tiny_model_dir):
    from aifactory_train.record.people import PEOPLE

    fill.save(fill.organisation_file(None), {key: f"answer {key}" for key in PEOPLE})
    source = {"source": "./train.jsonl", "licence": "CC0-1.0", "facts": FACTS}
    held = {**source, "source": "./eval.jsonl"}
    run = tell({"data.train": [source], "data.eval": [held], "about.languages": ["en"], "record.base_flop": 1e22})
    record = load_record(run.path)
    form = {f.number: f for f in forms.model_documentation(record)}
    assert form["1.1"].status == "person" and form["1.1"].value == "answer provider_legal_name"
    owed = {place for place, _ in missing_places(record)}
    # what neither the organisation nor the program can know here: the site and its counters, the base's public summary
    assert {p.partition("/")[0] for p in owed} == {"run", "base", "energy"}, owed
    assert all(form[n].status != "MISSING" for n in MDF if not n.startswith("8."))
    assert form["8.1"].status == "MISSING"  # no counter could be read on this machine


def test_three_views(record):
    documents = render(record)
    views = {r: json.loads(documents[f"model-documentation-{r}.json"]) for r in ("aio", "nca", "dp")}
    numbers = {r: [f["number"] for f in v["fields"]] for r, v in views.items()}
    assert numbers["aio"] == list(MDF) == numbers["nca"]
    assert not [
        n for n in numbers["dp"] if n[0] in "78" or n in ("6.3", "6.4", "6.5", "6.7", "6.8", "5.1", "5.2", "2.2")
    ]
    value = {r: {f["number"]: f["value"] for f in v["fields"]} for r, v in views.items()}
    assert value["dp"]["2.7"] == "1-500M" and value["aio"]["2.7"] != "1-500M"
    assert value["nca"]["7.1"] == "<1 month" and "hardware-days" in value["aio"]["7.1"]
    assert re.fullmatch(r"order of magnitude 10\^\d+ FLOP", value["nca"]["7.2"]) and value["aio"]["7.2"].endswith(
        "FLOP"
    )


def test_every_document_says_what_it_is(record):
    for name, text in render(record).items():
        assert "not legal advice" in text or name in ("croissant.json",), name
        if name.endswith(".md") and name != "README.md":
            assert "Legal status as of 2026-11" in text and "Rule: " in text and "Text taken from: " in text, name
        if name.endswith(".json"):
            json.loads(text)


def test_origins_decide_the_summary(tell):
    def source(origin: str | None, name: str) -> dict:
        return {"source": "./train.jsonl", "name": name, "licence": "CC0-1.0", "facts": {**FACTS, "origin": origin}}

    held = {"source": "./eval.jsonl", "licence": "CC0-1.0", "facts": FACTS}
    run = tell({"data.train": [source("public", "pub")], "data.eval": [held]}, name="a")
    fields = {f.number: f for f in public_summary(load_record(run.path))}
    assert fields["2.1"].value.startswith("yes: train") and fields["2.3"].value == "no" and fields["2.5"].value == "no"
    run = tell({"data.train": [source(None, "pub")], "data.eval": [held]}, name="b")
    fields = {f.number: f for f in public_summary(load_record(run.path))}
    assert is_missing(fields["2.1"].value) and is_missing(fields["2.3"].value)  # an unknown origin excludes nothing


def test_markers_are_whole():
    assert is_missing(missing("data owner: a (b) c")) and not is_missing(missing("x") + " and more")
    assert has_missing({"a": ["x " + missing("y")]}) and missing_places({"a": ["x " + missing("y")]}) == [("a/0", "y")]


def test_stale_documents_go(tell):
    run = tell()
    (run.path / "evidence" / "old.md").write_text("from an earlier version")
    write_pack(run)
    assert not (run.path / "evidence" / "old.md").exists()


# ---- official validators


def test_hugging_face_card(tell):
    hub = pytest.importorskip("huggingface_hub")
    run = tell()
    card = hub.ModelCard((run.path / "evidence" / "model-card.md").read_text())
    data = card.data
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation" and data.license
    values = {r.metric_type: r.metric_value for r in data.eval_results}
    assert values == {"bits_per_byte": 2.6, "perplexity": 259.0}
    # and back again: nothing in the block is unknown to the card classes
    again = yaml.safe_load(data.to_yaml())
    assert again["model-index"][0]["results"][0]["metrics"]


def test_cyclonedx_schema(record):
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    validator = validation.JsonStrictValidator(SchemaVersion.V1_7)
    content = machine.bom(record)
    assert validator.validate_str(json.dumps(content)) is None
    card = content["metadata"]["component"]["modelCard"]
    assert card["quantitativeAnalysis"]["performanceMetrics"][0]["confidenceInterval"]
    assert "environmentalConsiderations" not in card["considerations"]  # nothing was measured: no number is made up
    record["energy"] = {"measured_kwh": 1.5, "method": "counters", "carbon_kg": 0.2}
    measured = machine.bom(record)
    assert validator.validate_str(json.dumps(measured)) is None
    energy = measured["metadata"]["component"]["modelCard"]["considerations"]["environmentalConsiderations"]
    assert energy["energyConsumptions"][0]["activityEnergyCost"] == {"value": 1.5, "unit": "kWh"}
    content["components"][0]["type"] = "nonsense"
    assert validator.validate_str(json.dumps(content)) is not None


def official(validators: str, kind: str, run: Path) -> subprocess.CompletedProcess:
    script = Path(__file__).with_name("official.py")
    return subprocess.run(
        [validators, str(script), kind, str(run)], capture_output=True, text=True, timeout=300, check=False
    )


def test_croissant(tell, validators):
    run = tell()
    done = official(validators, "croissant", run.path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "not standard" not in done.stderr
    path = run.path / "evidence" / "croissant.json"
    content = json.loads(path.read_text())
    del content["distribution"][0]["contentUrl"], content["name"]
    path.write_text(json.dumps(content))
    assert official(validators, "croissant", run.path).returncode != 0


def test_ro_crate(tell, validators):
    run = tell()
    done = official(validators, "crate", run.path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    path = run.path / "ro-crate-metadata.json"
    content = json.loads(path.read_text())
    action = next(e for e in content["@graph"] if e["@type"] == "CreateAction")
    del action["instrument"]
    path.write_text(json.dumps(content))
    broken = official(validators, "crate", run.path)
    assert broken.returncode == 1 and "process-run-crate" in broken.stdout


def test_nothing_is_imported_that_a_login_node_lacks():
    code = (
        "import sys; import aifactory_train.commands.record, aifactory_train.commands.verify, "
        "aifactory_train.record.check, aifactory_train.commands.private, aifactory_train.report.compare; print([m for "
        "m in ('torch', 'transformers', 'numpy', 'cryptography', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


HOSTILE = (
    "<script>alert(1)</script>\n\n# A new section\n\n[click](http://x.invalid) | `rm` | ![i](http://x.invalid/i.png)"
)


def test_texts_of_the_recipe_stay_texts(tell):
    """Whoever writes a recipe cannot write sections, links or tags into the documents that are read as the
    program's.
    """
    from aifactory_train.record.files import load_record

    run = tell({"about.title": HOSTILE, "model.licence": HOSTILE})
    record = load_record(run.path)
    for place in ("people", "base", "run"):
        record[place] = {key: HOSTILE if isinstance(value, str) else value for key, value in record[place].items()}
    for entry in record["data"]:
        entry.update(
            {key: HOSTILE for key, value in entry.items() if isinstance(value, str) and key not in ("role", "name")}
        )
    record["aiact"]["reasoning"] = HOSTILE
    clean = render(load_record(run.path))
    for name, text in render(record).items():
        if name.endswith(".md"):
            text = text.split("---\n", 2)[2] if name == "model-card.md" else text
            before = clean[name].split("---\n", 2)[2] if name == "model-card.md" else clean[name]
            assert "<script" not in text and "](http://x" not in text.replace("\\](", ""), name
            headings = [line for line in text.split("\n") if line.startswith("#")]
            assert len(headings) == sum(line.startswith("#") for line in before.split("\n")), name
            cells = [line.replace("\\|", "").count("|") for line in text.split("\n") if line.startswith("|")]
            assert cells == [
                line.replace("\\|", "").count("|") for line in before.split("\n") if line.startswith("|")
            ], name
