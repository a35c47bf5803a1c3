"""The public summary of training content."""

from __future__ import annotations

from typing import Any

from aifactory_train.core.missing import is_missing, missing
from aifactory_train.record import aiact
from aifactory_train.record.render.common import Field, get, names, text_of
from aifactory_train.record.render.statements import (
    answer_of,
    last_update,
    sources_from,
)


def public_summary(record: dict[str, Any]) -> list[Field]:
    """The template's fields for the content of this modification; the base model's own summary is linked, not
    repeated.
    """
    return [*_summary_general(record), *_summary_data(record), *_summary_sources(record)]


def _summary_general(record: dict[str, Any]) -> list[Field]:
    """Sections 0 to 1.2: the version of the summary, the provider, the model."""
    return [
        Field(
            "0.1",
            "Version of the summary, link to the earlier one",
            "auto",
            f"1.{record['log']['events']}; "
            f"{'earlier run: ' + str(get(record, 'lineage/run')) if get(record, 'lineage/start_from') and not is_missing(get(record, 'lineage/start_from')) else 'no earlier version'}",  # noqa: E501
        ),
        Field("0.2", "Last update", "auto", last_update(record)),
        Field(
            "1.1",
            "Provider name and contact",
            "person",
            f"{answer_of(record, 'provider_legal_name')}; {answer_of(record, 'contact')}"
            if not is_missing(answer_of(record, "provider_legal_name"))
            else missing("provider"),
        ),
        Field(
            "1.1b",
            "Authorised representative (outside the Union only)",
            "person",
            answer_of(record, "authorised_representative"),
        ),
        Field(
            "1.2a",
            "Versioned model names",
            "auto+person",
            f"{answer_of(record, 'model_name')}; run {get(record, 'run/id')}",
        ),
        Field(
            "1.2b",
            "Model dependencies and link to their summary",
            "base",
            f"{get(record, 'base/id')}: {get(record, 'base/public_summary_url')}",
        ),
        Field("1.2c", "Date of placement on the Union market", "person", answer_of(record, "union_market_date")),
    ]


def _summary_data(record: dict[str, Any]) -> list[Field]:
    """Section 1.3: size, kinds and languages of the data."""
    data = [d for d in record.get("data", []) if d["role"] == "train"]
    tokens = get(record, "data_sets/sets/train/tokens", "run")
    training = {d["name"]: d["collected_to"] for d in data}
    return [
        Field(
            "1.3a",
            "Size of the text data of this modification",
            "auto",
            aiact.bin_tokens(float(tokens)) if isinstance(tokens, (int, float)) else tokens,
        ),
        Field("1.3b", "Image, audio, video data", "auto", "none: text only"),
        Field("1.3c", "Types of content", "person", answer_of(record, "content_types")),
        Field(
            "1.3d",
            "Latest date of collection; continuously trained after?",
            "auto+person",
            {**training, "continuously trained": "no: each run has its own record"},
        ),
        Field("1.3e", "Linguistic characteristics", "auto", text_of(names(d["languages"] for d in data))),
        Field(
            "1.3f",
            "Other characteristics (regional, demographic)",
            "person",
            answer_of(record, "regional_characteristics"),
        ),
    ]


def _summary_sources(record: dict[str, Any]) -> list[Field]:
    """Sections 2 and 3: where the data came from, and how it was processed."""
    return [
        Field("2.1", "Publicly available datasets", "auto+person", sources_from(record, "public")),
        Field("2.2.1", "Commercially licensed data", "person", answer_of(record, "licensed_data")),
        Field(
            "2.2.2", "Private data from other third parties", "person", answer_of(record, "private_third_party_data")
        ),
        Field("2.3", "Data crawled and scraped", "auto+person", sources_from(record, "crawl")),
        Field("2.4", "User data", "person", answer_of(record, "user_data")),
        Field("2.5", "Synthetic data", "auto+person", sources_from(record, "synthetic")),
        Field("2.6", "Other sources", "person", answer_of(record, "other_data")),
        Field("3.1a", "Signatory of the Code of Practice", "person", answer_of(record, "code_signatory")),
        Field(
            "3.1b",
            "Measures for reservations of rights (text and data mining)",
            "person",
            answer_of(record, "tdm_statement"),
        ),
        Field("3.2", "Removal of illegal content", "auto+person", answer_of(record, "illegal_content_measures")),
        Field(
            "3.3",
            "Other information",
            "auto",
            f"duplicates removed: {text_of(get(record, 'data_sets/duplicates'))}; train and evaluation overlap: "
            f"{text_of(get(record, 'data_sets/overlap'))}; goldfish loss: {text_of(get(record, 'method/goldfish'))}; "
            f"differential privacy: {text_of(record.get('method', {}).get('dp'))}",
        ),
    ]
