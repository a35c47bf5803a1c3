"""Each converter on a few lines in its source's own format (written here): what is read, what is left out, how rows are
parted.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.core.errors import UserError
from aifactory_train.recipes import common, own_rows
from aifactory_train.recipes.agrifood import esco
from aifactory_train.recipes.code import docstrings
from aifactory_train.recipes.cybersecurity import attack, incidents, weakness
from aifactory_train.recipes.data import vocabularies
from aifactory_train.recipes.earth import standard_names
from aifactory_train.recipes.energy import cim
from aifactory_train.recipes.engineering import brick
from aifactory_train.recipes.finance import accounts
from aifactory_train.recipes.legal import licences
from aifactory_train.recipes.manufacturing import opcua
from aifactory_train.recipes.materials import nexus
from aifactory_train.recipes.media import drama
from aifactory_train.recipes.mobility import map_features
from aifactory_train.recipes.robotics import mavlink


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---- how rows are parted

WORDING = st.lists(
    st.sampled_from(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]),
    min_size=3,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDING, min_size=2, max_size=40))
def test_parts_share_no_wording(many):
    entries = [{"id": i, "wording": " ".join(w)} for i, w in enumerate(many)]
    train = list(common.parted([dict(e) for e in entries], "train", 0.4))
    held = list(common.parted([dict(e) for e in entries], "held_out", 0.4))
    assert not {e["id"] for e in train} & {e["id"] for e in held}
    assert not {e["group"] for e in train} & {e["group"] for e in held}
    assert not any(common.repeats([e["wording"] for e in held], [e["wording"] for e in train]))
    assert len(train) + len(held) <= len(entries)


def test_numbers_and_case_make_no_new_wording():
    assert common.fingerprint("Level 3 of the Tank.") == common.fingerprint("level 12 of the tank")
    assert common.fingerprint("level of the tank") != common.fingerprint("level of the pump")


def test_a_longer_text_that_holds_the_held_out_one_counts_as_repeating_it():
    held = "the pressure of the steam in the second boiler"
    assert common.repeats([held], [f"this is {held} of the plant"]) == [True]
    assert common.repeats([held], ["the pressure of the water in the first pump"]) == [False]
    assert common.repeats([""], ["anything"]) == [False]


@pytest.mark.parametrize(("part", "share"), [("test", 0.1), ("train", 0.0), ("train", 1.0)])
def test_wrong_part_or_share(part, share):
    with pytest.raises(UserError, match=r"part|held_out"):
        list(common.parted([{"wording": "a"}], part, share))


def both(rows, path, **options):
    """All rows of a converter, whichever part they fall into."""
    return list(rows(path, part="train", **options)) + list(rows(path, part="held_out", **options))


# ---- one source each


def test_attack(tmp_path):
    def technique(key, **more):
        base = {
            "external_id": key,
            "name": f"Name {key}",
            "tactics": ["impact", "execution"],
            "description": "Does harm to files.",
        }
        return {**base, **more}

    path = write(
        tmp_path,
        "a.json",
        json.dumps(
            {
                "attack_patterns": [
                    technique("T1"),
                    technique(
                        "T1.001", description="Uses [PowerShell](https://x) <code>a</code> (Citation: B) to run comm..."
                    ),
                    technique("T2", revoked=True),
                    technique("T3", deprecated=True),
                    technique("T4", tactics=["unknown-tactic"]),
                ]
            }
        ),
    )
    rows = {r["id"]: r for r in both(attack.rows, path)}
    assert set(rows) == {"T1", "T1.001"}
    assert rows["T1"]["completion"] == "execution, impact", "in the order of an attack"
    assert rows["T1.001"]["prompt"].endswith("Uses PowerShell a to run")
    assert rows["T1"]["group"] == rows["T1.001"]["group"] == "T1"


def test_weakness(tmp_path):
    path = write(
        tmp_path,
        "w.xml",
        '<Weakness_Catalog xmlns="http://x"><Weaknesses>'
        '<Weakness ID="1" Name="Wrong Sum" Status="Stable"><Description>The sum\n is wrong.</Description></Weakness>'
        '<Weakness ID="2" Name="Old" Status="Deprecated"><Description>Gone.</Description></Weakness>'
        "</Weaknesses></Weakness_Catalog>",
    )
    (row,) = both(weakness.rows, path)
    assert (row["prompt"], row["completion"]) == ("Describe: Wrong Sum", "The sum is wrong.")
    (row,) = both(weakness.rows, path, direction="description-to-name")
    assert row["completion"] == "Wrong Sum"


def test_incidents(tmp_path):
    def incident(key, **more):
        base = {"id": key, "title": f"Title {key}", "description": "Text.", "severity": "High", "cve_ids": ["CVE-1"]}
        return {**base, **more}

    path = write(tmp_path, "i.json", json.dumps({"incidents": [incident("A"), incident("B", cve_ids=[])]}))
    (row,) = both(incidents.rows, path)
    assert row["id"] == "A" and row["completion"] == "High" and row["prompt"] == "Title A. Text."
    path = write(tmp_path, "i.json", json.dumps({"incidents": [incident("C", severity="Severe")]}))
    with pytest.raises(UserError, match="label 'Severe' is not in the schema") as caught:
        both(incidents.rows, path)
    assert "incident C" in str(caught.value)


def test_standard_names(tmp_path):
    path = write(
        tmp_path,
        "cf.xml",
        "<t><entry id='air_temperature'><canonical_units>K</canonical_units><description>How warm\n air "
        "is.</description></entry>"
        "<entry id='no_text'><canonical_units>1</canonical_units><description/></entry></t>",
    )
    (row,) = both(standard_names.rows, path)
    assert (row["prompt"], row["completion"]) == ("Which name? How warm air is. [K]", "air_temperature")
    (row,) = both(standard_names.rows, path, direction="name-to-definition", topics=["temperature"])
    assert row["completion"] == "How warm air is."
    with pytest.raises(UserError, match="unknown direction"):
        both(standard_names.rows, path, direction="sideways")


def test_cim(tmp_path):
    path = write(
        tmp_path,
        "cim.md",
        "# Profile\n\n{#x-Pump}\n### Pump\n\nInheritance path = [Device]\n\n```mermaid\nclass Pump {\n}\n```\n\n"
        "A device that moves water through a pipe.\n\n#### Native Members\n\n| name | type | description | mapping "
        "|\n|---|---|---|---|\n"
        "| head [0..1] | [Length](#L) | Height to which the water is lifted. | |\n"
        "| `Owner [0..1]` (of) | [Owner](#O) | see [Device](#D) and all the rest of it | |\n\n"
        "#### Inherited Members\n\n| name [0..1] | [String](#S) | A name that a human being can read. | |\n",
    )
    rows = {r["completion"]: r["prompt"] for r in both(cim.rows, path)}
    assert rows == {
        "Pump": "Which element? A device that moves water through a pipe.",
        "Pump.head": "Which element? Height to which the water is lifted.",
    }


def test_opcua(tmp_path):
    write(
        tmp_path,
        "Opc.Ua.Pumps.NodeSet2.xml",
        '<UANodeSet xmlns="http://x"><UAVariable NodeId="ns=1;i=5" '
        'BrowseName="1:Speed"><DisplayName>Speed</DisplayName>'
        "<Description>Turns of the pump in a minute.</Description></UAVariable>"
        '<UAObject NodeId="ns=1;i=6" BrowseName="1:Short"><Description>Too short.</Description></UAObject></UANodeSet>',
    )
    write(tmp_path, "Opc.Ua.NodeSet2.xml", "<UANodeSet/>")
    (row,) = both(opcua.rows, tmp_path)
    assert (
        row["prompt"] == "Describe: Speed (Variable, Pumps)" and row["completion"] == "Turns of the pump in a minute."
    )
    assert row["id"] == "Pumps/ns=1;i=5/node-to-description"
    with pytest.raises(UserError, match="no node set"):
        both(opcua.rows, tmp_path, files=["robot"])
    with pytest.raises(UserError, match="no node with a description"):
        both(opcua.rows, tmp_path, min_words=40)


def test_mavlink(tmp_path):
    path = write(
        tmp_path,
        "common.ts",
        "/**\n * Speed and height of\n * the vehicle\n */\nexport class Hud extends MavLinkData {\n"
        "  /**\n   * How fast it climbs now\n   */\n  climb: float\n  /**\n   * Heading\n   */\n  heading: "
        "int16_t\n}\n",
    )
    rows = {r["completion"]: r["prompt"] for r in both(mavlink.rows, path)}
    assert rows == {
        "Hud": "Which element? Speed and height of the vehicle",
        "Hud.climb": "Which element? How fast it climbs now",
    }


def test_map_features(tmp_path):
    write(
        tmp_path,
        "presets.json",
        json.dumps({"highway/path": {"tags": {"highway": "path"}}, "shop/tea": {"tags": {"shop": "tea"}}}),
    )
    for language, name in (("en", "Path"), ("de", "Pfad")):
        names = {"highway/path": {"name": name, "terms": ["trail", "track"]}, "shop/tea": {"name": "Tea"}}
        write(tmp_path, f"translations/{language}.json", json.dumps({language: {"presets": {"presets": names}}}))
    rows = both(map_features.rows, tmp_path, languages=["en", "de"])
    assert [(r["prompt"], r["completion"]) for r in rows] == [
        ("en: Path (trail, track)", "highway=path"),
        ("de: Pfad (trail, track)", "highway=path"),
    ]
    with pytest.raises(UserError, match="no translation 'xx'"):
        list(map_features.rows(tmp_path, languages=["xx"]))


def test_brick(tmp_path):
    path = write(
        tmp_path,
        "Brick.ttl",
        'brick:Hot_Pump a owl:Class ;\n    rdfs:label "Hot Pump" ;\n    skos:definition "A pump for \\"hot\\" '
        'water"@en .\n\n'
        'brick:No_Text a owl:Class ;\n    rdfs:label "No" .\n',
    )
    (row,) = both(brick.rows, path)
    assert (row["prompt"], row["completion"]) == ('Which class? A pump for "hot" water', "Hot Pump")


def test_docstrings(tmp_path):
    write(
        tmp_path,
        "shapes/area.py",
        'def area(r, *, unit="m"):\n    """Area of a circle.\n\n    More.\n    """\n\ndef _hidden():\n    """Not to '
        'be read at all."""\n',
    )
    write(tmp_path, "shapes/tests/test_area.py", 'def test_area():\n    """This is a test file."""\n')
    write(tmp_path, "shapes/broken.py", "def (:\n")
    (row,) = both(docstrings.rows, tmp_path)
    assert (row["prompt"], row["completion"]) == ("Document: def area(r, *, unit='m')", "Area of a circle.")
    assert row["group"] == "shapes/area"


def test_esco(tmp_path):
    path = write(
        tmp_path,
        "skills.csv",
        'id,description\nhttp://x/skill/1,"milk cows milking of cows Take milk from cows by hand or machine."\n'
        'http://x/skill/2,"without a description that begins"\n',
    )
    (row,) = both(esco.rows, path)
    assert row["prompt"] == "Describe: milk cows milking of cows" and row["id"].startswith("skill/1/")
    assert row["completion"] == "Take milk from cows by hand or machine."
    with pytest.raises(UserError, match="no concept"):
        both(esco.rows, path, topics=["wine"])


def test_accounts(tmp_path):
    path = write(
        tmp_path,
        "a.xml",
        '<t><data><record model="account.account.type.template" id="t1"><field name="name">Vorräte</field></record>'
        '<record model="account.account.template" id="a1"><field name="name">Waren</field><field '
        'name="code">3980</field>'
        '<field name="type" ref="t1"/></record>'
        '<record model="account.account.template" id="a2"><field name="name">Ohne</field></record></data></t>',
    )
    (row,) = both(accounts.rows, path)
    assert (row["prompt"], row["completion"]) == ("3980 Waren", "Vorräte")


def test_licence_paragraphs(tmp_path):
    long = (
        "You may copy this text as often as you like if every copy carries this very line and nobody is told "
        "otherwise by you or by them ever."
    )
    write(tmp_path, "A.json", json.dumps({"licenseText": f"TITLE\n\n{long}\n\nshort"}))
    write(tmp_path, "B.json", json.dumps({"licenseText": long.upper().lower()}))
    (row,) = both(licences.rows, tmp_path)
    assert row["id"] == "A/1" and row["text"] == long
    write(tmp_path, "C.json", "[1]")
    with pytest.raises(UserError, match="not a licence"):
        both(licences.rows, tmp_path)


def test_drama(tmp_path):
    play = (
        "# A Play\n\n**ANN**  \nWho is there in the dark?\n\n_Enter BOB_\n\n**BOB**  \nOnly I,  \nwith a "
        "lamp.\n\n**ANN**  \nCome in.\n"
    )
    write(tmp_path, "comedies/a-play.md", play)
    write(tmp_path, "comedies/other.md", play)
    (row,) = list(drama.rows(tmp_path, part="held_out", held_out=["a-play"]))
    assert row["prompt"] == "Ann: Who is there in the dark?\nBob:" and row["completion"] == "Only I,\nwith a lamp."
    assert row["system"] == "A Play, a play." and row["group"] == "a-play"
    assert {r["group"] for r in drama.rows(tmp_path, part="train", held_out=["a-play"])} == {"other"}
    with pytest.raises(UserError, match="no play 'gone'"):
        list(drama.rows(tmp_path, part="held_out", held_out=["gone"]))


def test_vocabularies(tmp_path):
    write(
        tmp_path,
        "_DCAT.py",
        "class DCAT:\n    Dataset: URIRef  # A collection of data.\\n\\nMore.\n    none: URIRef\n    x: URIRef  # "
        "Short\n",
    )
    (row,) = both(vocabularies.rows, tmp_path, vocabularies=["DCAT"])
    assert (row["prompt"], row["completion"]) == ("Which term? A collection of data. More.", "dcat:Dataset")
    with pytest.raises(UserError, match="unknown vocabularies"):
        both(vocabularies.rows, tmp_path, vocabularies=["../x"])


def test_nexus(tmp_path):
    write(
        tmp_path,
        "NXpump.nxdl.xml",
        '<definition xmlns="http://x" name="NXpump"><doc>All of it, which is not a field.</doc>'
        '<group type="NXlog"><field name="speed"><doc>How fast the pump turns.</doc>'
        '<attribute name="unit"><doc>Unit in which it is given.</doc></attribute></field></group></definition>',
    )
    rows = {r["completion"]: r["prompt"] for r in both(nexus.rows, tmp_path)}
    assert rows == {
        "NXpump/NXlog/speed": "Which field? How fast the pump turns.",
        "NXpump/NXlog/speed@unit": "Which field? Unit in which it is given.",
    }


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (attack.rows, {}),
        (weakness.rows, {}),
        (incidents.rows, {}),
        (standard_names.rows, {}),
        (cim.rows, {}),
        (mavlink.rows, {}),
        (brick.rows, {}),
        (accounts.rows, {}),
        (esco.rows, {}),
    ],
)
def test_a_file_of_another_kind_is_named(rows, options, tmp_path):
    suffix = {attack.rows: "{}", incidents.rows: "{}"}.get(rows, "<a/>")
    path = write(tmp_path, "other.txt", suffix)
    with pytest.raises(UserError, match="holds no") as caught:
        both(rows, path, **options)
    assert "other.txt" in str(caught.value)


# ---- rows of your own

SCHEMA = "smes/customer-mail"


def test_own_rows_from_jsonl_and_csv_are_alike(tmp_path):
    json_file = write(tmp_path, "m.jsonl", '{"mail": "Where is my parcel?", "label": "delivery", "customer": "7"}\n\n')
    csv_file = write(tmp_path, "m.csv", "mail,label,customer\nWhere is my parcel?,delivery,7\n")
    (first,), (second,) = list(own_rows.rows(json_file, schema=SCHEMA)), list(own_rows.rows(csv_file, schema=SCHEMA))
    assert first["prompt"] == second["prompt"] == "Where is my parcel?"
    assert first["completion"] == second["completion"] == "delivery" and first["group"] == second["group"] == "7"


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        (
            '{"mail": "Where is my parcel?", "label": "delivry"}',
            "the label 'delivry' is not in the schema (did you mean 'delivery'?)",
        ),
        ('{"mail": "Where is my parcel?"}', "the field 'label' is missing"),
        ('{"mail": "short", "label": "order"}', "mail is shorter than 10 characters"),
        ('{"mail": 5, "label": "order"}', "mail: 5 is not text"),
        ('["a"]', "a row is an object"),
        ("{oops", "not valid JSON"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_line(text, reported, tmp_path):
    path = write(tmp_path, "m.jsonl", '{"mail": "Where is my parcel?", "label": "delivery"}\n' + text + "\n")
    with pytest.raises(UserError) as caught:
        list(own_rows.rows(path, schema=SCHEMA))
    assert reported in str(caught.value) and "m.jsonl:2" in str(caught.value)


def test_a_number_must_be_one(tmp_path):
    path = write(tmp_path, "w.jsonl", '{"question": "How many?", "steps": "Count.", "answer": "seven"}\n')
    with pytest.raises(UserError, match="answer: 'seven' is not a number"):
        list(own_rows.rows(path, schema="education/word-problems"))


def test_only_schemas_of_recipes_are_read(tmp_path):
    path = write(tmp_path, "m.jsonl", "{}\n")
    for name in ("../../etc/passwd", "smes/custmer-mail", "/etc/passwd"):
        with pytest.raises(UserError, match="no schema"):
            list(own_rows.rows(path, schema=name))


TICKETS = {
    "properties": {"text": {"type": "string", "minLength": 3}, "team": {"type": "string", "enum": ["red", "green"]}},
    "required": ["text", "team"],
    "x-prompt": "Which team? {text}",
    "x-completion": "{team}",
}


def test_a_schema_of_your_own(tmp_path):
    """Beside the rows or from the current folder; no system turn unless the schema has one."""
    write(tmp_path, "tickets.schema.json", json.dumps(TICKETS))
    rows = write(tmp_path, "tickets.csv", "text,team\nThe door is stuck,red\nNo light,green\n")
    found = list(own_rows.rows(rows, schema="tickets.schema.json"))
    assert [(r["prompt"], r["completion"]) for r in found] == [
        ("Which team? The door is stuck", "red"),
        ("Which team? No light", "green"),
    ]
    assert list(own_rows.rows(rows, schema=str(tmp_path / "tickets.schema.json"))) == found
    rows.write_text("text,team\nThe door is stuck,red\nNo light,gren\n")
    with pytest.raises(UserError, match=r"the label 'gren' is not in the schema.*did you mean 'green'") as refused:
        list(own_rows.rows(rows, schema="tickets.schema.json"))
    assert "tickets.csv:3" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({"properties": {}}, "names no fields"),
        ({"properties": {"text": "string"}}, "names no fields"),
        ({"x-prompt": "Which team?"}, "'x-prompt' is missing"),
        ({"x-completion": None}, "'x-completion' is missing"),
        ({"x-completion": "{taem}"}, "'taem'.*did you mean 'team'"),
        ({"properties": {**TICKETS["properties"], "team": {"enum": "red"}}}, "no list of labels"),
        ({"properties": {**TICKETS["properties"], "team": {"enum": ["red"], "minLength": "3"}}}, "no number"),
        ({"required": ["text", "colour"]}, "'required' names 'colour'"),
        ({"required": 3}, "'required' names '3'"),
    ],
)
def test_a_schema_of_your_own_that_is_wrong_is_named(change, reported, tmp_path):
    write(tmp_path, "s.json", json.dumps({**TICKETS, **change}))
    with pytest.raises(UserError, match=reported) as refused:
        own_rows.own_schema("s.json", tmp_path)
    assert "s.json" in str(refused.value)


def test_a_schema_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"no schema 'absent\.json'"):
        own_rows.own_schema("absent.json", tmp_path)
    write(tmp_path, "s.json", "{]")
    with pytest.raises(UserError, match="not JSON"):
        own_rows.own_schema("s.json", tmp_path)
