"""What a user's own rows are: columns, task, labels, how they are split. Each guess is reported and can be set."""

from __future__ import annotations

import argparse
import collections
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.data.read_json import parse_lines
from aifactory_train.data.turns import turns_in_text

if TYPE_CHECKING:
    from aifactory_train.data.cells import Unused
    from aifactory_train.data.documents import Notes

#: Rows that are read for the guesses and the report; beyond, ``aifactory prepare --report`` looks at all.
MOST_ROWS = 200_000

#: What a column can be read as.
ROLES = ("prompt", "completion", "text", "system", "messages", "chosen", "rejected", "label", "id", "group")

#: Column names that people give to questions and answers, most telling first; compared without case.
_QUESTIONS = (
    *("prompt", "question", "instruction", "frage", "pregunta", "domanda", "pergunta", "vraag", "fråga"),
    *("spørgsmål", "spørsmål", "spurning", "kysymys", "küsimus", "klausimas", "jautājums", "pytanie"),
    *("otázka", "vprašanje", "pitanje", "kérdés", "întrebare", "ερώτηση", "въпрос", "mistoqsija", "ceist"),
    *("query", "request", "input", "source", "ticket", "message", "email", "body", "description"),
    *("utterance", "comment", "note", "report", "sentence", "text", "content"),
)

_ANSWERS = (
    *("completion", "answer", "response", "antwort", "respuesta", "réponse", "risposta", "resposta"),
    *("antwoord", "svar", "vastaus", "vastus", "atsakymas", "atbilde", "odpowiedź", "odpověď", "odgovor"),
    *("válasz", "răspuns", "απάντηση", "отговор", "tweġiba", "freagra", "reply", "output", "target", "label"),
    *("category", "class", "intent", "topic", "code", "summary", "translation", "kategorie", "categoría"),
    *("categoria", "catégorie", "klasse", "classe"),
)

#: Names of the better and of the worse of two answers to one question.
_PAIRS = (
    *(("chosen", "rejected"), ("preferred", "rejected"), ("preferred", "dispreferred"), ("accepted", "rejected")),
    ("preferred_output", "non_preferred_output"),
    *(("better", "worse"), ("good", "bad"), ("good_answer", "bad_answer"), ("better_answer", "worse_answer")),
)

#: Names of a column that says whether the answer is good; taken for one only where every value is true or false.
_RATINGS = (
    *("label", "rating", "rated", "thumb", "thumbs", "thumbs_up", "feedback", "helpful", "liked", "good", "desirable"),
    *("accepted", "approved", "correct"),
)

#: Recommended desirable answers x their weight over undesirable ones x theirs (Ethayarajh et al. 2024, arXiv
#: 2402.01306, section 4).
_BALANCE = (1.0, 4 / 3)

_TEXTS = ("text", "content", "document", "body", "article", "paragraph", "sentence")

_GROUPS = (
    *("customer", "patient", "client", "user", "author", "document", "doc", "case", "session"),
    *("conversation", "thread", "account", "machine", "device", "site", "project", "company", "kunde"),
    *("file", "dossier", "contract"),
)

_TIMES = (
    *("date", "time", "timestamp", "datetime", "created", "created_at", "updated", "updated_at", "day"),
    *("month", "year", "datum", "fecha", "data", "päivä", "dato"),
)


@dataclass
class Draft:
    """What becomes the recipe."""

    task: str = "qa"
    form: str = "prompt"
    columns: dict[str, str] = field(default_factory=dict)
    labels: list[str] | None = None
    split: tuple[str, str] | None = None
    #: ``kto``: weights of desirable and of undesirable answers.
    weights: tuple[float, float] = (1.0, 1.0)
    metrics: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    @property
    def preference(self) -> str | None:
        """``methods.preference.kind`` for rows that judge answers, None for rows that are to be imitated."""
        return {"preference": "dpo", "feedback": "kto"}.get(self.form)


def read(path: Path, notes: Notes) -> tuple[list[tuple[str, Any]], bool]:
    """``(place, raw row)`` of at most ``MOST_ROWS`` rows, and whether there are more."""
    from aifactory_train.data import readers

    raw: list[tuple[str, Any]] = []
    for block in readers.blocks(path, notes=notes):
        if block.lines is not None:
            raw += [(f"{block.file}:{number}", value) for number, value in parse_lines(block)]
        else:
            raw += [(f"{block.file}:{block.number(i)}", row) for i, row in enumerate(block.rows or [])]
        if len(raw) > MOST_ROWS:
            return raw[:MOST_ROWS], True
    if not raw:
        raise UserError("no rows", where=str(path), fix="give a file that holds some")
    return raw, False


def canonical_rows(
    raw: list[tuple[str, Any]], form: str, columns: dict[str, str], unused: Unused | None = None
) -> list[dict[str, Any]]:
    """The rows as training reads them; one that does not fit is a :class:`UserError` with its place. ``unused`` gathers
    what they hold and training does not use."""
    from aifactory_train.data.cells import RowError, to_user_error
    from aifactory_train.data.rows import canonical

    rows = []
    for place, value in raw:
        try:
            rows.append(canonical(value, form, columns, unused))
        except RowError as error:
            raise to_user_error(error, place) from None
    return rows


def understand(
    raw: list[tuple[str, Any]], columns: dict[str, str], task: str | None, unused: Unused | None = None
) -> tuple[Draft, list[dict[str, Any]]]:
    """The draft (task, columns, labels) and the rows read accordingly; ``columns`` and ``task`` are what the user said;
    ``unused`` as for :func:`canonical_rows`."""
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
    rated = _rated(draft, raw, names, task)
    if not columns and not rated:
        _guess_columns(draft, names, first, task, place)
    roles = [draft.columns.get(n, n) for n in names]
    if not rated:
        _form(draft, roles, task, place)
    try:
        rows = canonical_rows(raw, draft.form, draft.columns, unused)
    except UserError as error:
        raise _forms_differ(raw) or error from None
    if len(rows) < 2:
        what = "one row cannot be split into training and held-out rows"
        raise UserError(what, where=place, fix="give more rows, or --eval")
    if draft.form == "feedback":
        _weigh(draft, rows, place)
    _guess_labels(draft, rows)
    return draft, rows


def _forms_differ(raw: list[tuple[str, Any]]) -> UserError | None:
    """The refusal for files whose rows have other columns than those of the first; None where all are alike."""
    columns: dict[str, list[str]] = {}
    for place, row in raw:
        columns.setdefault(place.rpartition(":")[0], sorted(map(str, row)) if isinstance(row, dict) else [])
    if len(set(map(tuple, columns.values()))) < 2:
        return None
    reported = [f"{file} has {', '.join(names[:6]) or 'no columns'}" for file, names in columns.items()]
    more = f"; and {len(reported) - 6} more" if len(reported) > 6 else ""
    return UserError(
        f"the files have different forms: {'; '.join(reported[:6])}{more}",
        where="--data",
        fix=f"--data {next(iter(columns))}, then name the others as sources of their own: data.train: "
        f"[{', '.join(list(columns)[:3])}]",
    )


def _is_talk(value: Any) -> bool:  # an answer that is turns, the question among them
    return isinstance(value, list) or (isinstance(value, str) and bool(turns_in_text(value)))


def _rated(draft: Draft, raw: list[tuple[str, Any]], names: list[str], task: str | None) -> bool:
    """Whether the rows judge answers; sets form, columns and task of ``draft`` then.

    Pairs are known by the names of two columns, single judgements by a column of nothing but true and false beside an
    answer. Columns that were mapped to something to imitate are imitated, and so is everything under another
    ``--task``.
    """
    place, first = raw[0]
    if task not in (None, "preference", "feedback"):
        return False
    said = set(draft.columns.values())
    roles = {draft.columns.get(n, n).casefold(): n for n in names}
    question = next((roles[n] for n in _QUESTIONS if n in roles and isinstance(first[roles[n]], (str, list))), None)
    pair = next(((roles[a], roles[b]) for a, b in _PAIRS if a in roles and b in roles), None)
    if pair and task != "feedback" and (task or not said & {"completion", "text", "messages"}):
        if question is None and not isinstance(first.get("input"), dict) and not all(_is_talk(first[n]) for n in pair):
            raise UserError(
                f"'{pair[0]}' and '{pair[1]}' are answers, but which column is the question? {', '.join(names[:20])}",
                where=place,
                fix=f"say it: --map COLUMN=prompt --map {pair[0]}=chosen --map {pair[1]}=rejected",
            )
        asked = f"--map {question}=prompt " if question not in (None, *pair) else ""
        _take(draft, "preference", {pair[0]: "chosen", pair[1]: "rejected"}, question, names)
        draft.assumed.append(
            f"'{pair[0]}' is the better answer and '{pair[1]}' the worse one: training makes the better one likelier "
            f"(DPO); to learn "
            f"the better ones as they are: {asked}--map {pair[0]}=completion"
        )
        return True
    answer = next((roles[n] for n in _ANSWERS if n in roles and isinstance(first[roles[n]], (str, list))), None)
    rating = next((roles[n] for n in _RATINGS if n in roles and _ratings(roles[n], raw)), None)
    if (
        rating
        and question
        and answer
        and rating != answer
        and task != "preference"
        and (task or not said or "label" in said)
    ):
        if not task and not said and _ratings(rating, raw) == {True}:
            draft.assumed.append(f"every answer is a good one, says '{rating}': all are learnt as they are")
            return False
        _take(draft, "feedback", {answer: "completion", rating: "label"}, question, names)
        draft.assumed.append(
            f"'{rating}' says whether '{answer}' is a good answer to '{question}' (KTO); to learn every answer, good "
            f"or bad: --task qa"
        )
        return True
    talk = next((roles[n] for n in ("messages", "conversations") if n in roles and first[roles[n]]), None)
    if rating and talk and task != "preference" and (task or all(isinstance(row[rating], bool) for _, row in raw)):
        if not task and _ratings(rating, raw) == {True}:
            draft.assumed.append(f"every conversation is a good one, says '{rating}': all are learnt as they are")
            return False
        _take(draft, "feedback", {rating: "label"}, None, names)
        draft.assumed.append(
            f"'{rating}' says whether the last answer of '{talk}' is a good one (KTO); to learn every answer, good or "
            f"bad: --task chat"
        )
        return True
    if task is None:
        return False
    wanted = {
        "preference": "prompt, chosen and rejected",
        "feedback": "prompt, completion, and label (true or false in every row)",
    }
    raise UserError(
        f"the task {task} needs columns for {wanted[task]}: {', '.join(names[:20])}",
        where=place,
        fix="say it: --map COLUMN=ROLE for each",
    )


def _take(draft: Draft, form: str, columns: dict[str, str], question: str | None, names: list[str]) -> None:
    """Read ``columns`` and the question as said. A column that bears the name of a role which another one has now is
    read under a name that means nothing."""
    roles = {**({question: "prompt"} if question is not None and question not in columns else {}), **columns}
    aside = {n: f"other_{n}" for n in names if n in roles.values() and n not in roles}
    draft.columns = {**draft.columns, **{n: role for n, role in {**roles, **aside}.items() if n != role}}
    draft.form = draft.task = form


def _ratings(name: str, raw: list[tuple[str, Any]]) -> set[bool]:
    """What a column says of answers; empty where it holds anything but true and false."""
    from aifactory_train.data.cells import RowError
    from aifactory_train.data.rows import desirable

    try:
        return {desirable({"label": row[name]}) for _, row in raw}
    except (RowError, KeyError, TypeError):
        return set()


def _weigh(draft: Draft, rows: list[dict[str, Any]], place: str) -> None:
    """KTO's weights: 1, or what brings the two kinds of answers to the middle of the recommended ratio (held-out rows
    shift it).
    """
    good = sum(row["desirable"] for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        raise UserError(
            f"all {len(rows):,} answers are rated {'good' if good else 'bad'}: KTO weighs good answers against bad "
            f"ones",
            where=place,
            fix="to learn every answer: --task qa" if good else "add answers that are good",
        )
    low, high = _BALANCE
    wanted = (low + high) / 2
    if good / bad < low:
        draft.weights = (round(wanted * bad / good, 2), 1.0)
    elif good / bad > high:
        draft.weights = (1.0, round(good / bad / wanted, 2))


def _guess_columns(draft: Draft, names: list[str], first: dict[str, Any], task: str | None, place: str) -> None:
    """Which columns are the question and the answer, or the text, when their names are not the ones that rows have."""
    from aifactory_train.data.cells import RowError
    from aifactory_train.data.rows import detect_format

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
            f"column '{question}' is the question and '{answer}' the answer (--map {question}=prompt --map "
            f"{answer}=completion)"
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
    from aifactory_train.data.cells import RowError, to_user_error
    from aifactory_train.data.rows import detect_format

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
    if draft.form == "text" or draft.preference or any(len(r["messages"]) > 3 for r in rows):
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


def choose_split(
    draft: Draft, raw: list[tuple[str, Any]], rows: list[dict[str, Any]], args: argparse.Namespace
) -> None:
    """The split that was asked for, checked on every row; else a column that looks like a group or a time."""
    from aifactory_train.data.cells import RowError, to_user_error
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
    """Whether the rows are the parts of a folder's documents, each document a group."""
    return set(raw[0][1]) == {"text", "group"} and all(place.endswith(":1") for place, _ in raw[:5])


def _is_time(name: str, raw: list[tuple[str, Any]]) -> bool:
    from aifactory_train.data.cells import RowError
    from aifactory_train.data.split import moment

    try:
        return len({moment(value[name], name) for _, value in raw}) >= 10
    except (RowError, KeyError):
        return False


def metrics_of(draft: Draft, answers: list[str]) -> list[str]:
    """What the rows are judged by, the main one first."""
    if draft.form == "text":
        return ["bits_per_byte", "perplexity"]
    if draft.preference:
        return ["bits_per_byte"]  # the method's own figures (loss, rewards) come by themselves
    if draft.labels:
        return ["accuracy", "macro_f1", "bits_per_byte"]
    median = sorted(map(len, answers))[len(answers) // 2]
    return ["exact_match", "token_f1", "bits_per_byte"] if median <= 60 else ["bits_per_byte", "rouge_l", "chrf"]
