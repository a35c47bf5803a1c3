"""``aifactory recipes new ID --data PATH``: a short annotated recipe for a user's own rows, with a report on them.

The rows are read as the training will read them; what was guessed (columns, task, labels, split) is said, and each guess can be
set by an option. Nothing is overwritten. Imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from aifactory_train.config import ModelConfig
    from aifactory_train.data.documents import Notes

#: Rows that are read for the guesses and the report; beyond, ``aifactory prepare --report`` looks at all.
MOST_ROWS = 200_000
_DEFAULT_BASE = "health/phenotype-terms"  # the recipe whose base model runs on a laptop
_ID = re.compile(r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*$")
_TARGETS = ("prompt", "completion", "text", "system", "messages", "id", "group")
#: Column names that people give to questions and answers, most telling first; compared without case.
_QUESTIONS = (
    *(
        "prompt",
        "question",
        "instruction",
        "frage",
        "pregunta",
        "domanda",
        "pergunta",
        "vraag",
        "fråga",
        "spørgsmål",
        "spørsmål",
    ),
    *(
        "spurning",
        "kysymys",
        "küsimus",
        "klausimas",
        "jautājums",
        "pytanie",
        "otázka",
        "vprašanje",
        "pitanje",
        "kérdés",
    ),
    *(
        "întrebare",
        "ερώτηση",
        "въпрос",
        "mistoqsija",
        "ceist",
        "query",
        "request",
        "input",
        "source",
        "ticket",
        "message",
    ),
    *("email", "body", "description", "utterance", "comment", "note", "report", "sentence", "text", "content"),
)
_ANSWERS = (
    *(
        "completion",
        "answer",
        "response",
        "antwort",
        "respuesta",
        "réponse",
        "risposta",
        "resposta",
        "antwoord",
        "svar",
    ),
    *(
        "vastaus",
        "vastus",
        "atsakymas",
        "atbilde",
        "odpowiedź",
        "odpověď",
        "odgovor",
        "válasz",
        "răspuns",
        "απάντηση",
        "отговор",
    ),
    *(
        "tweġiba",
        "freagra",
        "reply",
        "output",
        "target",
        "label",
        "category",
        "class",
        "intent",
        "topic",
        "code",
        "summary",
    ),
    *("translation", "kategorie", "categoría", "categoria", "catégorie", "klasse", "classe"),
)
_TEXTS = ("text", "content", "document", "body", "article", "paragraph", "sentence")
_GROUPS = (
    *(
        "customer",
        "patient",
        "client",
        "user",
        "author",
        "document",
        "doc",
        "case",
        "session",
        "conversation",
        "thread",
    ),
    *("account", "machine", "device", "site", "project", "company", "kunde", "file", "dossier", "contract"),
)
_TIMES = (
    *(
        "date",
        "time",
        "timestamp",
        "datetime",
        "created",
        "created_at",
        "updated",
        "updated_at",
        "day",
        "month",
        "year",
    ),
    *("datum", "fecha", "data", "päivä", "dato"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a short annotated recipe for your own rows, and a report on them."
    parser.add_argument("id", nargs="?", help="id of the new recipe, e.g. acme/tickets; written to ID.yaml here")
    parser.add_argument(
        "--data", metavar="PATH", help="CSV, JSON Lines, Parquet, or a folder of text, Markdown, HTML, PDF"
    )
    parser.add_argument("--eval", dest="held", metavar="PATH", help="rows that are held out; default: a part of --data")
    parser.add_argument("--sector", help="sector as the factories name it, e.g. health (default: general)")
    parser.add_argument("--base", metavar="RECIPE|MODEL", help="base model, or the recipe whose base model is taken")
    parser.add_argument("--task", choices=["chat", "qa", "text"], help="default: from the columns")
    parser.add_argument("--licence", metavar="L", help="licence of the rows: own, or an SPDX id")
    parser.add_argument(
        "--map", action="append", default=[], metavar="COLUMN=ROLE", help="e.g. question=prompt; repeatable"
    )
    parser.add_argument("--group-by", metavar="COLUMN", help="rows of one value are never divided")
    parser.add_argument("--time", metavar="COLUMN", help="the newest rows are held out")
    parser.add_argument("--out", metavar="FILE", help="where the recipe is written (default: ID.yaml)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


@dataclass
class Draft:
    """What becomes the recipe."""

    task: str = "qa"
    form: str = "prompt"
    columns: dict[str, str] = field(default_factory=dict)
    labels: list[str] | None = None
    split: tuple[str, str] | None = None
    metrics: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config import RECIPES_DIR, load_recipe
    from aifactory_train.data import report as own
    from aifactory_train.data.documents import Notes
    from aifactory_train.output import note, print_json, table
    from aifactory_train.runs import write_atomic

    out = _place(args)
    data = _local(args.data, "--data")
    sector = _sector(args.sector)
    columns = _mapping(args.map)
    notes = Notes()
    raw, more = _read(data, notes)
    draft, rows = _understand(raw, columns, args, data)
    held_rows: list[dict[str, Any]] | None = None
    if args.held:
        held_raw, _ = _read(_local(args.held, "--eval"), notes)
        held_rows = _canonical(held_raw, draft.form, draft.columns)
    _choose_split(draft, raw, rows, args)
    base, licence_missing = _base(args.base, sector)
    texts = [own.text_of(r) for r in rows]
    licence = args.licence or "unknown"
    facts = own.describe(
        texts, [own.text_of(r) for r in held_rows] if held_rows is not None else None, licences=[(args.data, licence)]
    )
    facts["rows_looked_at"] = len(rows)
    if notes.read or notes.left_out or notes.not_read:
        facts["files"] = notes.as_dict()
    answers = [r["messages"][-1]["content"] for r in rows if "messages" in r]
    draft.metrics = _metrics(draft, answers)
    text = _yaml(args, out, data, sector, draft, base, licence_missing, facts, texts, answers, RECIPES_DIR)
    report_file = out.with_name(f"{out.stem}.report.json")
    if report_file.exists():
        raise UserError("exists already, and nothing is overwritten", where=str(report_file), fix="--out another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "x", encoding="utf-8") as file:
        file.write(text)
    try:
        recipe = load_recipe(str(out))
    except UserError:
        out.unlink()
        raise
    write_atomic(report_file, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    following = _next(recipe.model, out)
    if args.json:
        print_json(
            {
                "id": recipe.id,
                "recipe": str(out),
                "report_file": str(report_file),
                "task": draft.task,
                "format": draft.form,
                "columns": draft.columns,
                "labels": draft.labels,
                "split": {draft.split[0]: draft.split[1]} if draft.split else None,
                "metrics": draft.metrics,
                "licence": licence if args.licence else "MISSING",
                "assumed": draft.assumed,
                "next": following,
                "report": facts,
            }
        )
        return 0
    table(
        f"{data}: {len(rows):,} rows{' (of more)' if more else ''}",
        ["", "found"],
        [list(x) for x in own.lines_of(facts)],
    )
    for line in draft.assumed:
        note(f"assumed: {line}")
    _tell_files(notes)
    if not args.licence:
        note(
            "licence of the rows: MISSING; whose are they? --licence own, or the SPDX id (data.train.licence in the recipe)"
        )
    if facts["personal_data"]["counts"]:
        note("personal data found: read docs/sensitive-data.md before training (privacy.profile)")
    note(f"recipe: {out}\nreport: {report_file}\nnext:")
    for command in following:
        note(f"  {command}")
    return 0


# ---- what was asked


def _place(args: argparse.Namespace) -> Path:
    from aifactory_train.config import recipe_ids

    if not args.id:
        raise UserError(
            "the new recipe needs an id", where="ID", fix="aifactory recipes new acme/tickets --data tickets.csv"
        )
    if not _ID.match(args.id):
        raise UserError(
            f"'{args.id}' is no recipe id",
            where="ID",
            fix="small letters, digits, '.', '_', '-' and '/', e.g. acme/tickets",
        )
    if args.id in recipe_ids():
        raise UserError(f"there is a recipe '{args.id}' already", where="ID", fix="choose another id")
    if args.group_by and args.time:
        raise UserError("rows are split by a group or by time, not both", where="--time", fix="give one of them")
    out = Path(args.out) if args.out else Path(f"{args.id}.yaml")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError("a recipe file ends in .yaml", where="--out")
    if out.exists():
        raise UserError(
            "exists already, and nothing is overwritten", where=str(out), fix="choose another id, or --out FILE"
        )
    return out


def _local(text: str | None, option: str) -> Path:
    if not text:
        raise UserError("no rows were named", where=option, fix="--data FILE_OR_FOLDER")
    path = Path(text).expanduser()
    if not path.exists():
        raise UserError(
            f"no such file or folder: {text}",
            where=option,
            fix="rows lie here; a data set of the hub goes into data.train",
        )
    return path


def _sector(name: str | None) -> str:
    from aifactory_train.config import recipe_ids
    from aifactory_train.sites import members

    if name is None:
        return "general"
    known = {"general", *(s for m in members() for s in m["sectors"]), *(i.partition("/")[0] for i in recipe_ids())}
    if name not in known:
        raise UserError(
            f"unknown sector '{name}'{did_you_mean(name, known)}",
            where="--sector",
            fix=f"sectors: {', '.join(sorted(known))}",
        )
    return name


def _mapping(given: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for text in given:
        column, separator, role = text.rpartition("=")
        if not separator or not column:
            raise UserError(
                "a mapping has the form COLUMN=ROLE", where=f"--map {text}", fix="e.g. --map question=prompt"
            )
        if role not in _TARGETS:
            raise UserError(
                f"'{role}' is no role of a column{did_you_mean(role, _TARGETS)}",
                where=f"--map {text}",
                fix=f"roles: {', '.join(_TARGETS)}",
            )
        if role in columns.values():
            raise UserError(f"two columns are mapped to '{role}'", where=f"--map {text}", fix="give each role once")
        columns[column] = role
    return columns


# ---- the rows


def _read(path: Path, notes: Notes) -> tuple[list[tuple[str, Any]], bool]:
    """``(place, raw row)`` of at most ``MOST_ROWS`` rows, and whether there are more."""
    from aifactory_train.data import readers

    raw: list[tuple[str, Any]] = []
    for block in readers.blocks(path, notes=notes):
        if block.lines is not None:
            raw += [(f"{block.file}:{number}", value) for number, value in readers.parse_lines(block)]
        else:
            raw += [(f"{block.file}:{block.number(i)}", row) for i, row in enumerate(block.rows or [])]
        if len(raw) > MOST_ROWS:
            return raw[:MOST_ROWS], True
    if not raw:
        raise UserError("no rows", where=str(path), fix="give a file that holds some")
    return raw, False


def _canonical(raw: list[tuple[str, Any]], form: str, columns: dict[str, str]) -> list[dict[str, Any]]:
    from aifactory_train.data.rows import RowError, canonical, to_user_error

    rows = []
    for place, value in raw:
        try:
            rows.append(canonical(value, form, columns))
        except RowError as error:
            raise to_user_error(error, place) from None
    return rows


def _understand(
    raw: list[tuple[str, Any]], columns: dict[str, str], args: argparse.Namespace, data: Path
) -> tuple[Draft, list[dict[str, Any]]]:
    place, first = raw[0]
    if not isinstance(first, dict):
        raise UserError("a row is an object of named columns", where=place)
    names = [str(c) for c in first]
    for column in columns:
        if column not in names:
            raise UserError(
                f"there is no column '{column}'{did_you_mean(column, names)}",
                where=f"--map {column}={columns[column]}",
                fix=f"columns of {place}: {', '.join(names[:20])}",
            )
    draft = Draft(columns=dict(columns))
    if not columns:
        _guess_columns(draft, names, first, args.task, place)
    roles = [draft.columns.get(n, n) for n in names]
    _form(draft, roles, args.task, place)
    rows = _canonical(raw, draft.form, draft.columns)
    if len(rows) < 2:
        raise UserError(
            "one row cannot be split into training and held-out rows", where=place, fix="give more rows, or --eval"
        )
    _guess_labels(draft, rows)
    return draft, rows


def _guess_columns(draft: Draft, names: list[str], first: dict[str, Any], task: str | None, place: str) -> None:
    """Which columns are the question and the answer, or the text, when their names are not the ones that rows have."""
    from aifactory_train.data.rows import RowError, detect_format

    lower = {n.casefold(): n for n in names}
    question = next((lower[n] for n in _QUESTIONS if n in lower and isinstance(first[lower[n]], str)), None)
    answer = next((lower[n] for n in _ANSWERS if n in lower and isinstance(first[lower[n]], (str, int, float))), None)
    try:
        form, why = detect_format(names)
    except RowError:
        form, why = "", ""
    if form in ("messages", "prompt") or (form == "text" and (answer is None or task == "text")):
        draft.assumed.append(f"rows are read as '{form}' because {why}")
        return
    if task != "text" and question and answer and question != answer:
        draft.columns = {n: r for n, r in ((question, "prompt"), (answer, "completion")) if n != r}
        draft.assumed.append(
            f"column '{question}' is the question and '{answer}' the answer (--map {question}=prompt --map {answer}=completion)"
        )
        return
    texts = [lower[n] for n in _TEXTS if n in lower and isinstance(first[lower[n]], str)]
    strings = [n for n in names if isinstance(first[n], str) and len(first[n]) > 40]
    text = texts[0] if texts else (strings[0] if len(strings) == 1 else None)
    if task not in ("qa", "chat") and text is not None and answer is None:
        draft.columns = {text: "text"} if text != "text" else {}
        draft.assumed.append(f"column '{text}' is text to learn from as it is (--map {text}=text)")
        return
    raise UserError(
        f"it is not clear which columns hold what: {', '.join(names[:20])}",
        where=place,
        fix="say it: --map COLUMN=prompt --map COLUMN=completion, or --map COLUMN=text",
    )


def _form(draft: Draft, roles: list[str], task: str | None, place: str) -> None:
    from aifactory_train.data.rows import RowError, detect_format, to_user_error

    if task == "text" and "text" not in roles:
        raise UserError("the task text needs a column of text", where=place, fix="--map COLUMN=text, or another --task")
    try:
        draft.form = "text" if task == "text" else detect_format(roles)[0]
    except RowError as error:
        raise to_user_error(RowError(error.what, "say which column is what with --map COLUMN=ROLE"), place) from None
    if task in ("qa", "chat") and draft.form == "text":
        raise UserError(
            f"the task {task} needs questions and answers, and the rows are plain text",
            where=place,
            fix="--task text, or --map COLUMN=prompt --map COLUMN=completion",
        )
    draft.task = task or {"messages": "chat", "prompt": "qa", "text": "text"}[draft.form]


def _guess_labels(draft: Draft, rows: list[dict[str, Any]]) -> None:
    """Few short answers that repeat are labels."""
    if draft.form == "text" or any(len(r["messages"]) > 3 for r in rows):
        return
    found = collections.Counter(r["messages"][-1]["content"].strip() for r in rows)
    if (
        len(rows) >= 20
        and 2 <= len(found) <= min(50, len(rows) // 5)
        and all(len(a) <= 60 and "\n" not in a for a in found)
    ):
        draft.labels = sorted(found)
        draft.assumed.append(
            f"the {len(found)} different answers are labels; any other answer will be refused (data.labels)"
        )


def _choose_split(
    draft: Draft, raw: list[tuple[str, Any]], rows: list[dict[str, Any]], args: argparse.Namespace
) -> None:
    """The split that was asked for, checked on every row; else a column that looks like a group or a time."""
    from aifactory_train.data.rows import RowError, to_user_error
    from aifactory_train.data.split import RowRules

    if args.held:
        draft.assumed.append("held-out rows are those of --eval")
        return
    if args.group_by or args.time:
        rules = RowRules(args.group_by, args.time)
        seen = set()
        for (place, value), row in zip(raw, rows, strict=True):
            try:
                moment = rules.apply(value, row)
            except RowError as error:
                raise to_user_error(error, place) from None
            seen.add(moment if moment is not None else row["group"])
        draft.split = ("group", args.group_by) if args.group_by else ("time", args.time)
        if len(seen) < 2:
            raise UserError(
                f"all rows have the same value in '{draft.split[1]}': nothing could be held out",
                where="--group-by" if args.group_by else "--time",
                fix="name a column with at least two values",
            )
        return
    if "group" in rows[0]:
        what = (
            "the file"
            if "group" not in {str(c).casefold() for c in raw[0][1]} or _documents(raw)
            else "the column 'group'"
        )
        draft.assumed.append(f"rows of one group ({what}) are never divided between training and held-out rows")
        return
    names = [str(c) for c in raw[0][1]]
    for name in names:
        word = re.sub(r"[_ -]?(id|no|nr|number|name)$", "", name.casefold())
        values = [value.get(name) for _, value in raw]
        if word in _GROUPS and name not in draft.columns and all(isinstance(v, (str, int)) and v != "" for v in values):
            distinct = len(set(map(str, values)))
            if 5 <= distinct <= 0.8 * len(values):
                draft.split = ("group", name)
                draft.assumed.append(
                    f"rows of one '{name}' belong together: {distinct} of them, never divided (--group-by)"
                )
                return
    for name in names:
        if name.casefold() in _TIMES and _is_time(name, raw):
            draft.split = ("time", name)
            draft.assumed.append(f"the newest rows by '{name}' are held out, as in use (--time)")
            return
    draft.assumed.append(
        "a tenth of the questions (or texts) is held out; --group-by or --time if rows belong together"
    )


def _documents(raw: list[tuple[str, Any]]) -> bool:
    return set(raw[0][1]) == {"text", "group"} and all(place.endswith(":1") for place, _ in raw[:5])


def _is_time(name: str, raw: list[tuple[str, Any]]) -> bool:
    from aifactory_train.data.rows import RowError
    from aifactory_train.data.split import moment

    try:
        return len({moment(value[name], name) for _, value in raw}) >= 10
    except (RowError, KeyError):
        return False


def _metrics(draft: Draft, answers: list[str]) -> list[str]:
    if draft.form == "text":
        return ["bits_per_byte", "perplexity"]
    if draft.labels:
        return ["accuracy", "macro_f1", "bits_per_byte"]
    median = sorted(map(len, answers))[len(answers) // 2]
    return ["exact_match", "token_f1", "bits_per_byte"] if median <= 60 else ["bits_per_byte", "rouge_l", "chrf"]


# ---- the base model


def _base(asked: str | None, sector: str) -> tuple[ModelConfig, bool]:
    """The base model, and whether its licence is not known."""
    from aifactory_train import licences, sources
    from aifactory_train.config import ModelConfig, load_recipe, recipe_ids

    ids = recipe_ids()
    if asked is None:
        asked = next((i for i in ids if i.startswith(f"{sector}/")), _DEFAULT_BASE)
    if asked in ids or asked.endswith((".yaml", ".yml")):
        model = load_recipe(asked).model
        return ModelConfig.model_validate({**model.model_dump(), "start_from": None}), model.licence == "unknown"
    spec = sources.parse(asked)
    if spec.kind == "local":
        path = Path(asked).expanduser()
        if not path.exists():
            raise UserError(
                f"'{asked}' is neither a recipe nor a model{did_you_mean(asked, ids)}",
                where="--base",
                fix="a recipe id, a Hugging Face id (org/name), or a model folder",
            )
        return ModelConfig(base=str(path.resolve())), True
    entry = licences.known()["sources"].get(asked.partition("#")[0])
    licence = entry["licence"] if entry else "unknown"
    return ModelConfig(base=asked, licence=licence), licence == "unknown"


def _context(base: str) -> int:
    """Positions that the model has, where its configuration lies here."""
    file = Path(base) / "config.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings") or 1 << 20)
    except (OSError, ValueError):
        return 1 << 20


def _next(model: ModelConfig, out: Path) -> list[str]:
    """The two commands that come next."""
    import shlex

    from aifactory_train import sources

    name = shlex.quote(str(out))
    train = f"aifactory train {name} --name {shlex.quote(out.stem)}"
    try:
        sources.resolve_model(model)
    except UserError:
        return [f"aifactory fetch {name}", train]
    return [f"aifactory prepare {name} --report", train]


# ---- the file


def _quoted(text: str) -> str:
    """A YAML scalar on one line."""
    return json.dumps(text, ensure_ascii=False)


def _yaml(
    args: argparse.Namespace,
    out: Path,
    data: Path,
    sector: str,
    draft: Draft,
    base: ModelConfig,
    licence_missing: bool,
    facts: dict[str, Any],
    texts: list[str],
    answers: list[str],
    recipes: Path,
) -> str:
    small = "135M" in base.base or "135m" in base.base
    total = facts["characters"]
    length = _length(draft, total, base.base)
    rows = len(texts)
    parts = sum(1 + len(t) // (3 * length) for t in texts) if draft.form == "text" else rows
    batch = 4 if parts < 400 else (16 if parts < 4000 else 32)
    epochs = {"text": 1, "labels": 3}.get("labels" if draft.labels else draft.task, 2)
    rate, why_rate = _rate(draft, small)
    shares = [name for name in facts["languages"]["shares"] if name != "und"][:6]
    told = {
        "chat": "chat as in the rows",
        "qa": "answer as in the rows",
        "text": "continued pre-training on plain text",
    }
    task = "classify: one of the labels" if draft.labels else told[draft.task]
    metric = draft.metrics[0]
    lines = [
        f"# yaml-language-server: $schema={recipes / 'recipe.schema.json'}",
        f"# Written by 'aifactory recipes new' from {rows:,} rows of {data.name}; change what you like, docs/data.md explains the keys.",
        f"id: {args.id}",
        "",
        "about:",
        f"  title: {_quoted(args.id.rpartition('/')[2].replace('-', ' ').replace('_', ' '))}",
        f"  sector: {sector}",
        f"  task: {_quoted(task)}",
        f"  metric: {metric}",
        f"  languages: [{', '.join(shares)}]   # found in the rows"
        if shares
        else "  languages: []   # none was recognised: say it",
        "",
        "model:",
        f"  base: {_quoted(base.base)}",
        f"  licence: {base.licence}" + ("   # MISSING: read it where the model comes from" if licence_missing else ""),
    ]
    if base.options:
        lines.append("  options:          # larger ones, for a factory: --set model.base=ID")
        for option in base.options[:3]:
            lines.append(
                f"    - {{base: {_quoted(option.base)}, parameters: {_quoted(option.parameters)}, licence: {option.licence}}}"
            )
    rank = 64 if draft.form == "text" else 16
    why_rank = "plain text has more to learn than a style of answers" if draft.form == "text" else "enough for a task"
    lines += [
        "",
        "adapter:            # LoRA on every linear layer",
        "  kind: lora",
        f"  rank: {rank}          # {why_rank}",
        f"  alpha: {2 * rank}",
        "",
        "data:",
        "  train:",
        f"    source: {_quoted(_beside(data, out))}",
    ]
    if draft.columns:
        pairs = ", ".join(f"{_quoted(k)}: {v}" for k, v in draft.columns.items())
        lines.append(f"    columns: {{{pairs}}}   # yours: what it is read as")
    lines.append(f"    format: {draft.form}")
    if args.licence:
        lines.append(f"    licence: {_quoted(args.licence)}")
    else:
        lines.append(
            "    licence: unknown   # MISSING: own, or the SPDX id of the licence under which you have the rows"
        )
    lines.append(
        "    # facts: {origin: own, personal_data: none, obtained: ...}   # for the record; unset is written down as MISSING"
    )
    if args.held:
        lines.append(
            f"  eval: {{source: {_quoted(_beside(Path(args.held).expanduser(), out))}, licence: {_quoted(args.licence or 'unknown')}}}"
        )
    elif draft.split:
        kind, column = draft.split
        why = "rows of one value are never divided" if kind == "group" else "the newest rows are held out, as in use"
        lines.append(f"  split_by: {{{kind}: {_quoted(column)}}}   # {why}")
    if not args.held:
        lines.append(
            "  eval_fraction: 0.1  # held out and never trained on; rows that repeat them are taken out of the training"
        )
    if draft.labels:
        lines.append(f"  labels: [{', '.join(map(_quoted, draft.labels))}]   # any other answer is refused")
    lines.append(
        f"  sequence_length: {length}   # tokens; 99 % of your rows have at most {total.get('p99', 0):,} characters"
    )
    if draft.form == "text":
        lines.append("  long_documents: paragraphs   # longer texts are cut between paragraphs; nothing is lost")
    steps = max(1, -(-int(parts * 0.9) // batch)) * epochs
    lines += ["", "train:"]
    if small and steps > 120:
        lines.append("  max_steps: 120    # a first look on a laptop; on a GPU: --set train.max_steps=null")
    lines += [
        f"  epochs: {epochs}         # about {steps:,} steps",
        f"  batch_rows: {batch}",
        f"  learning_rate: {rate}   # {why_rate}",
        "  schedule: cosine",
        "  warmup_ratio: 0.05",
        "",
        "eval:",
        f"  metrics: [{', '.join(draft.metrics)}]",
    ]
    if draft.form != "text":
        longest = max((len(a) for a in answers), default=64)
        lines.append(f"  max_new_tokens: {min(256, max(8, _power(longest // 3 + 4)))}")
    return "\n".join(lines) + "\n"


def _beside(path: Path, out: Path) -> str:
    """``./...`` where the rows lie beside the recipe or below (both can move then), else the whole path."""
    whole, folder = path.resolve(), out.resolve().parent
    return f"./{whole.relative_to(folder).as_posix()}" if whole.is_relative_to(folder) else str(whole)


def _power(value: int) -> int:
    return 1 << max(0, (value - 1).bit_length())


def _length(draft: Draft, total: dict[str, int], base: str) -> int:
    """A power of two that holds 99 of 100 rows at three characters a token; text is cut anyway, so the median decides."""
    text = draft.form == "text"
    wanted = total.get("p50" if text else "p99", 0) // 3 + 32
    return min(max(256 if text else 128, _power(wanted)), 1024 if text else 2048, _context(base))


def _rate(draft: Draft, small: bool) -> tuple[str, str]:
    if small:
        return "5e-4", "high, for a short run of a small model; 2e-4 for models of 1 to 8 billion parameters"
    if draft.form == "text":
        return "1e-4", "half of what questions and answers take: the model keeps more of what it knows"
    return (
        ("1e-4", "few labels are soon learnt by heart")
        if draft.labels
        else ("2e-4", "LoRA on up to 8 billion parameters")
    )


def _tell_files(notes: Notes) -> None:
    from aifactory_train.output import note

    for file, why in notes.left_out[:10]:
        note(f"left out: {file}: {why}")
    if len(notes.left_out) > 10:
        note(f"left out: {len(notes.left_out) - 10} more, all named in the report")
    for suffix, count in sorted(notes.not_read.items()):
        note(f"not read: {count} file(s) of kind {suffix}")
