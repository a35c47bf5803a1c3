"""The technical part of an application for access: a form's questions, each answered from plan or measurement,
or named as missing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aifactory_train.advice.answers import ANSWERS, Case, Said
from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.sites.access import access_file
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.schema import Source

FORMS = Path(__file__).with_name("forms")
GENERIC = "generic"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FormQuestion(_Strict):
    """What a form asks. ``key``: what answers it here; ``who`` has to, where nothing does."""

    asks: str
    key: str | None = None
    who: str = "applicant"
    technical: bool = True


class FormSection(_Strict):
    title: str
    fields: list[FormQuestion] = Field(min_length=1)


class Form(_Strict):
    """The questions of a call, with where they were read. ``routes``: those whose own form it is."""

    id: str
    title: str
    source: Source
    routes: list[str] = []
    sections: list[FormSection] = Field(min_length=1)


@dataclass(frozen=True)
class Chosen:
    """The form for a route, and a sentence where it is not the call's own."""

    form: Form
    note: str | None


def read_form(path: Path) -> Form:
    """A form's file; refuses one of another shape, and keys that nothing answers."""
    try:
        form = Form.model_validate(read_yaml(path))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(k) for k in fault["loc"])
        raise UserError(fault["msg"], where=f"{path}: {where}", fix="compare it with forms/generic.yaml") from None
    for section in form.sections:
        for question in section.fields:
            if question.key is not None and question.key not in ANSWERS:
                raise UserError(
                    f"nothing answers '{question.key}'{did_you_mean(question.key, ANSWERS)}",
                    where=f"{path}: {section.title}",
                    fix=f"one of {', '.join(ANSWERS)}; or leave the key out, and the question is MISSING",
                )
    return form


@functools.lru_cache(maxsize=1)
def shipped_forms() -> dict[str, Form]:
    return {form.id: form for form in map(read_form, sorted(FORMS.glob("*.yaml")))}


def form_for(route: str, own: Path | None = None) -> Chosen:
    """The user's own form, else that of the route, else the generic one with a note that says so."""
    if own is not None:
        return Chosen(read_form(own), None)
    forms = shipped_forms()
    found = next((form for form in forms.values() if route in form.routes), None)
    if found is not None:
        return Chosen(found, None)
    generic, known = forms[GENERIC], access_file().routes[route]
    day = generic.source.retrieved or generic.source.date
    note = (
        f"The text of the form of {known.name} was not at hand on {day}: these are "
        f"the generic questions. The form is at {known.link}; --form FILE takes its questions."
    )
    return Chosen(generic, note)


def draft(case: Case, chosen: Chosen) -> dict[str, Any]:
    """The annex as plain values: ``{title, form, note, fields: [{section, key, asks, status, value, source}], filled,
    technical}``.

    ``status`` is ``from the plan``, ``measured`` or ``MISSING (who)``; ``value`` a text or ``{columns, rows}``.
    """
    fields = [
        _answered(case, section.title, question) for section in chosen.form.sections for question in section.fields
    ]
    technical = [field for field in fields if field["technical"]]
    return {
        "title": f"{chosen.form.title}: {case.recipe.about.title}",
        "recipe": case.recipe.id,
        "base": case.plan["base"],
        "route": case.route,
        "site": case.system.id,
        "form": {"id": chosen.form.id, **chosen.form.source.model_dump(mode="json", exclude_none=True)},
        "note": chosen.note,
        "fields": fields,
        "technical": len(technical),
        "filled": sum(field["value"] is not None for field in technical),
    }


def _answered(case: Case, section: str, question: FormQuestion) -> dict[str, Any]:
    said: Said = ANSWERS[question.key](case) if question.key else Said(None, "", question.who)
    return {
        "section": section,
        "key": question.key,
        "asks": question.asks,
        "technical": question.technical,
        "status": f"MISSING ({said.who or question.who})" if said.value is None else said.status,
        "value": said.value,
        "source": said.source or None,
    }
