"""The Model Documentation Form in its three views, and the fields of the annexes."""

from __future__ import annotations

from typing import Any

from aifactory_train.core.figures import significant
from aifactory_train.core.missing import is_missing, missing
from aifactory_train.record import aiact
from aifactory_train.record.render.common import ALL, AUTHORITIES, Field, get, names, text_of
from aifactory_train.record.render.statements import (
    answer_of,
    curation,
    data_points,
    digest_of_files,
    energy_used,
    flop_of,
    last_update,
    licence_parents,
    parameters,
    training_process,
    training_time,
)


def model_documentation(record: dict[str, Any]) -> list[Field]:
    """All fields of the form, in its order."""
    return [
        *_general(record),
        *_properties(record),
        *_distribution_and_use(record),
        *_training_and_data(record),
        *_resources(record),
    ]


def _general(record: dict[str, Any]) -> list[Field]:
    """Section 1: who provides which model."""
    base_id = get(record, "base/id")
    return [
        Field(
            "0",
            "Date last updated, document version",
            "auto",
            f"{last_update(record)}, version 1.{record['log']['events']}",
        ),
        Field("1.1", "Legal name of the model provider", "person", answer_of(record, "provider_legal_name")),
        Field(
            "1.2",
            "Model name, unique identifier, public versions covered",
            "auto+person",
            f"{answer_of(record, 'model_name')}; run {get(record, 'run/id')}",
        ),
        Field("1.3", "Model authenticity: secure hash or endpoint", "auto", digest_of_files(record)),
        Field("1.4", "Release date", "person", answer_of(record, "release_date")),
        Field("1.5", "Date of placing on the Union market", "person", answer_of(record, "union_market_date")),
        Field(
            "1.6",
            "Model dependencies",
            "auto",
            f"{base_id}, revision {get(record, 'base/revision')}, licence {get(record, 'base/licence')}, SHA-256 "
            f"{get(record, 'base/tree_sha256', 'run: digests of the base model')}",
        ),
    ]


def _properties(record: dict[str, Any]) -> list[Field]:
    """Section 2: what the model is and takes."""
    weights = get(record, "base/params_total")
    context = get(record, "base/context", "base model's provider: context length")
    window = f"trained on up to {get(record, 'hparams/max_len')} tokens; context length {text_of(context)}"
    return [
        Field(
            "2.1",
            "Model architecture",
            "auto",
            f"decoder-only transformer {get(record, 'base/architecture')}: {get(record, 'base/layers')} layers, width "
            f"{get(record, 'base/hidden_size')}, vocabulary {get(record, 'base/vocabulary')}",
        ),
        Field(
            "2.2",
            "Design specifications, rationale, assumptions",
            "auto+person",
            f"{training_process(record)}. Rationale: {answer_of(record, 'design_rationale')}",
            AUTHORITIES,
        ),
        Field("2.3", "Input modalities", "auto", "text (no image, audio, video or other)"),
        Field("2.4", "Maximum size of inputs", "auto", window),
        Field("2.5", "Output modalities", "auto", "text (no image, audio, video or other)"),
        Field("2.6", "Maximum size of outputs", "auto", f"inputs and outputs together: {window}"),
        Field(
            "2.7",
            "Total model size",
            "auto",
            parameters(record),
            ALL,
            (("DP", aiact.bin_parameters(float(weights)) if isinstance(weights, (int, float)) else weights),),
        ),
    ]


def _distribution_and_use(record: dict[str, Any]) -> list[Field]:
    """Sections 3 and 4: how it is handed on, and for what."""
    software = (
        ", ".join(f"{k} {v}" for k, v in get(record, "run/versions").items()) if "run" in record else missing("run")
    )
    weights = get(record, "base/params_total")
    memory = (
        f"about {2 * weights / 2**30:.2g} GiB for weights in bf16"
        if isinstance(weights, (int, float))
        else missing("run")
    )
    return [
        Field("3.1", "Methods and channels of distribution", "person", answer_of(record, "distribution_channels")),
        Field(
            "3.2",
            "Licence: link, category, additional assets",
            "auto+person",
            f"{answer_of(record, 'licence_of_result')}. Inherited from {licence_parents(record)}",
        ),
        Field("4.1", "Acceptable use policy", "person", answer_of(record, "acceptable_use_policy")),
        Field(
            "4.2",
            "Intended uses, restricted uses",
            "person",
            f"intended: {answer_of(record, 'intended_use')}; restricted: {answer_of(record, 'restricted_use')}"
            if not (is_missing(answer_of(record, "intended_use")) and is_missing(answer_of(record, "restricted_use")))
            else missing("provider"),
        ),
        Field("4.3", "Type and nature of AI systems for integration", "person", answer_of(record, "integration")),
        Field(
            "4.4",
            "Technical means for integration, hardware, software",
            "auto",
            f"load with transformers{' and peft' if get(record, 'method/kind') != 'full' else ''} (safetensors); "
            f"{memory}; {software}",
        ),
    ]


def _training_and_data(record: dict[str, Any]) -> list[Field]:
    """Sections 5 and 6: how it was trained, and on which data."""
    data = record.get("data", [])
    return [
        Field("5.1", "Design specification of the training process", "auto", training_process(record), AUTHORITIES),
        Field("5.2", "Decision rationale", "person", answer_of(record, "training_rationale"), AUTHORITIES),
        Field("6.1", "Data type and modality", "auto", "text"),
        Field("6.2", "Data provenance", "auto+person", {d["name"]: d["origin"] for d in data} or missing("data owner")),
        Field(
            "6.3",
            "How data was obtained and selected",
            "person",
            {d["name"]: d["obtained"] for d in data} or missing("data owner"),
            AUTHORITIES,
        ),
        Field(
            "6.4",
            "Number of data points",
            "auto",
            data_points(record, None),
            AUTHORITIES,
            (("AIO", data_points(record, 3)), ("NCA", data_points(record, 1))),
        ),
        Field(
            "6.5",
            "Scope and main characteristics",
            "auto+person",
            f"languages: {text_of(names(d['languages'] for d in data))}; content: {answer_of(record, 'content_types')}",
            AUTHORITIES,
        ),
        Field("6.6", "Data curation methodologies", "auto", curation(record)),
        Field(
            "6.7",
            "Measures to detect unsuitability of sources",
            "auto+person",
            f"licences recorded per source ({licence_parents(record)}); "
            f"{answer_of(record, 'unsuitable_data_measures')}",
            AUTHORITIES,
        ),
        Field(
            "6.8", "Measures to detect identifiable biases", "person", answer_of(record, "bias_measures"), AUTHORITIES
        ),
    ]


def _resources(record: dict[str, Any]) -> list[Field]:
    """Sections 7 and 8: computation and energy."""
    flop = flop_of(record)
    days = get(record, "compute/totals/wall_days", "run")
    inference = get(record, "deployment/inference/flop", "run: the architecture's FLOPs are not counted")
    return [
        Field(
            "7.1",
            "Training time",
            "auto",
            training_time(record),
            AUTHORITIES,
            (("NCA", aiact.bin_months(days) if isinstance(days, (int, float)) else days),),
        ),
        Field(
            "7.2",
            "Amount of computation",
            "auto",
            f"{significant(flop, 3)} FLOP" if isinstance(flop, (int, float)) else flop,
            AUTHORITIES,
            (
                (
                    "NCA",
                    f"order of magnitude 10^{len(f'{int(flop)}') - 1} FLOP" if isinstance(flop, (int, float)) else flop,
                ),
            ),
        ),
        Field(
            "7.3",
            "Methodology of the compute figure",
            "auto",
            get(record, "compute/totals/flop_method", "run"),
            AUTHORITIES,
        ),
        Field("8.1", "Energy used for training (MWh)", "auto", energy_used(record), AUTHORITIES),
        Field("8.2", "Methodology of the energy figure", "auto", get(record, "energy/method", "run"), AUTHORITIES),
        Field(
            "8.3",
            "Benchmarked computation for inference (FLOP)",
            "auto",
            f"{significant(inference, 3)} FLOP" if isinstance(inference, (int, float)) else inference,
            AUTHORITIES,
        ),
        Field(
            "8.4",
            "Methodology of the inference figure",
            "auto",
            get(record, "deployment/inference/method", "run"),
            AUTHORITIES,
        ),
    ]


def annex_xi_xii(record: dict[str, Any]) -> list[Field]:
    """Annex XI section 1 and Annex XII, with the same values as the form. ``recipients``: DP marks what Annex XII asks
    too.
    """
    form = {f.number: f for f in model_documentation(record)}

    def as_field(number: str, title: str, source: str, both: bool) -> Field:
        return Field(number, title, form[source].fill, form[source].value, ALL if both else AUTHORITIES)

    return [
        as_field("1(a)", "Tasks and systems for integration", "4.3", True),
        as_field("1(b)", "Acceptable use policies", "4.1", True),
        as_field("1(c)", "Release date and methods of distribution", "3.1", True),
        as_field("1(d)", "Architecture", "2.1", True),
        as_field("1(d')", "Number of parameters", "2.7", True),
        as_field("1(e)", "Modality and format of inputs and outputs, maximum size", "2.4", True),
        as_field("1(f)", "Licence", "3.2", True),
        as_field("2(a)", "Technical means for integration", "4.4", True),
        as_field("2(b)", "Design specification, training process, what is optimised", "5.1", False),
        as_field("2(b')", "Rationale", "5.2", False),
        as_field("2(c)", "Data: type and provenance", "6.2", True),
        as_field("2(c')", "Data: curation", "6.6", True),
        as_field("2(c'')", "Data: number of data points, scope", "6.4", False),
        as_field("2(c''')", "Data: how obtained and selected", "6.3", False),
        as_field("2(c'''')", "Data: measures against unsuitable sources and biases", "6.7", False),
        as_field("2(d)", "Compute", "7.2", False),
        as_field("2(d')", "Training time", "7.1", False),
        as_field("2(e)", "Energy, known or estimated", "8.1", False),
        Field(
            "s.2",
            "Section 2 (models with systemic risk)",
            "auto",
            "N/A unless the base model has systemic risk; this program makes no such claim",
        ),
    ]


def annex_iv(record: dict[str, Any]) -> list[Field]:
    """The parts of Annex IV that a training can document; the rest is the system provider's."""
    return [*_system_and_design(record), *_performance_and_changes(record)]


def _system_and_design(record: dict[str, Any]) -> list[Field]:
    """Numbers 1 and 2: the system, its design and its data."""
    system = missing("provider of the system")
    device = get(record, "compute/device")
    evaluation = {
        k: {m: v for m, v in e.items() if isinstance(v, (int, float))}
        for k, e in record.get("eval", {}).items()
        if k in ("before", "after")
    }
    return [
        Field(
            "1",
            "General description: versions, hardware, forms of delivery",
            "auto+person",
            f"{text_of(get(record, 'run/versions'))}; container {text_of(get(record, 'run/container'))}; "
            f"{text_of(device)}. Intended purpose: {answer_of(record, 'intended_use')}",
        ),
        Field(
            "2(a)",
            "Methods, recourse to pre-trained systems",
            "auto",
            f"{get(record, 'base/id')}, revision {get(record, 'base/revision')}; {training_process(record)}",
        ),
        Field(
            "2(b)",
            "Design, what is optimised, relevance of parameters",
            "auto+person",
            f"{training_process(record)}. Rationale: {answer_of(record, 'design_rationale')}",
        ),
        Field(
            "2(c)",
            "Architecture and computational resources",
            "auto",
            f"{get(record, 'base/architecture')}, {parameters(record)} parameters; {text_of(device)}; "
            f"{training_time(record)}; {text_of(flop_of(record))} FLOP",
        ),
        Field(
            "2(d)",
            "Data requirements as datasheets (see croissant.json)",
            "auto+person",
            {
                d["name"]: f"{d['rows']} rows, {d['licence']}, origin {d['origin']}, SHA-256 {d['sha256']}"
                for d in record.get("data", [])
            },
        ),
        Field(
            "2(g)",
            "Validation and testing: metrics, logs, dated and signed",
            "auto+person",
            f"{text_of(evaluation) if evaluation else missing('run: no evaluation')}; signed by: "
            f"{answer_of(record, 'signed_by')}",
        ),
        Field(
            "2(h)",
            "Cybersecurity",
            "auto+person",
            f"weights as safetensors only, none unpickled; manifest of digests and signature; privacy profile "
            f"{get(record, 'run/privacy_profile')}. System measures: {system}",
        ),
    ]


def _performance_and_changes(record: dict[str, Any]) -> list[Field]:
    """Numbers 3 to 9: limits, metrics, changes."""
    system = missing("provider of the system")
    return [
        Field(
            "3",
            "Accuracy for groups, limits, foreseeable outcomes",
            "auto+person",
            f"input limit {get(record, 'hparams/max_len')} tokens; languages "
            f"{text_of(names(d['languages'] for d in record.get('data', [])))}. Foreseeable outcomes: "
            f"{answer_of(record, 'foreseeable_risks')}",
        ),
        Field("4", "Appropriateness of the metrics", "person", missing("provider of the system")),
        Field(
            "6",
            "Changes over the lifecycle",
            "auto",
            f"started from {text_of(get(record, 'lineage/start_from', 'run')) if record.get('lineage', {}).get('start_from') else 'the base model'}; {text_of(get(record, 'compute/totals/restarts', 'run'))} restarts; changes of configuration: {text_of(list(record.get('run', {}).get('config_changes', {})))}",  # noqa: E501
        ),
        Field(
            "5, 7, 8, 9",
            "Risk management, standards, declaration, post-market monitoring",
            "person",
            f"risk class: {answer_of(record, 'risk_class')}; {system}",
        ),
    ]
