"""The Model Documentation Form in its three views, the public summary of training content, and the annexes' fields."""

from __future__ import annotations

from typing import Any

from aifactory_train.core.figures import significant
from aifactory_train.core.missing import is_missing, missing
from aifactory_train.record import aiact
from aifactory_train.record.render.common import ALL, AUTHORITIES, Field, get, names, text_of


def _people(record: dict[str, Any], key: str) -> Any:
    from aifactory_train.record.people import PEOPLE

    return get(record, f"people/{key}", PEOPLE[key][0])


def _licence_parents(record: dict[str, Any]) -> str:
    data = names(d["licence"] for d in record.get("data", []) if d["role"] == "train")
    return f"base model: {get(record, 'base/licence')}; training data: {text_of(data)}"


def _digest(record: dict[str, Any]) -> Any:
    tree = get(record, "artefact/tree_sha256", "run: nothing was exported")
    files = get(record, "artefact/files")
    if is_missing(tree):
        return tree
    return f"SHA-256 over the manifest of {len(files)} files: {tree} (files and signature: evidence/manifest.json)"


def _parameters(record: dict[str, Any]) -> Any:
    total = get(record, "base/params_total")
    if is_missing(total):
        return total
    extra = get(record, "method/trainable_params", "run")
    text = significant(float(total), 3)
    if get(record, "method/kind") != "full":
        text += f" in the base, {significant(float(extra), 3)} in the adapter"
    return text


def _points(record: dict[str, Any], digits: int | None) -> Any:
    """Rows and tokens per set; to ``digits`` significant figures, or exactly."""
    sets = get(record, "data_sets/sets", "run")
    if is_missing(sets):
        return sets

    def shown(value: float) -> str:
        return f"{value:,}" if digits is None else significant(float(value), digits)

    return {name: f"{shown(s['rows'])} rows, {shown(s['tokens'])} tokens" for name, s in sets.items()}


def _curation(record: dict[str, Any]) -> str:
    parts = []
    for entry in record.get("data", []):
        rows = entry.get("rows")
        counts: Any = next((s.get("counts") for s in entry.get("pipeline", []) if s.get("counts")), {})
        parts.append(
            f"{entry['name']}: {rows} rows read and validated, {entry.get('documents')} documents after rendering"
            + (f" ({text_of(counts)})" if counts else "")
        )
    sets = record.get("data_sets", {})
    for key in ("rows", "unused", "duplicates", "overlap", "split"):
        if key in sets:
            parts.append(f"{key}: {text_of({k: v for k, v in sets[key].items() if k != 'groups'})}")
    return "; ".join(parts) or missing("run")


def _process(record: dict[str, Any]) -> str:
    method, h = record.get("method", {}), record.get("hparams", {})
    kind = (
        "all weights trained"
        if method.get("kind") == "full"
        else (
            f"{method.get('kind')} adapters of rank {method.get('rank')} on {text_of(method.get('targets'))}, base frozen"
        )
    )
    return (
        f"{kind}; objective: {method.get('objective')}; {h.get('optimiser')} at a peak rate of {h.get('learning_rate')}, {h.get('schedule')} "
        f"schedule, warm-up {h.get('warmup')}; batch {text_of(h.get('batch'))}; {h.get('steps')} steps planned; sequences up to "
        f"{h.get('max_len')} tokens, {h.get('packing')}; {h.get('precision')}; {text_of(h.get('parallelism'))}"
    )


def _days(record: dict[str, Any]) -> Any:
    totals = get(record, "compute/totals", "run")
    if is_missing(totals):
        return totals
    return f"{significant(totals['wall_days'])} wall-clock days, {significant(totals['device_days'])} hardware-days"


def _flop(record: dict[str, Any]) -> Any:
    value = get(record, "compute/totals/flop_model", "run: FLOPs were not counted")
    return missing("run: FLOPs were not counted") if not is_missing(value) and not value else value


def _energy(record: dict[str, Any]) -> Any:
    value = get(record, "energy/mwh_2sf", "site: energy counters")
    if is_missing(value):
        return value
    label = (
        "estimated" if get(record, "energy/estimate") and not is_missing(get(record, "energy/estimate")) else "measured"
    )
    return f"{value} MWh ({label})"


def model_documentation(record: dict[str, Any]) -> list[Field]:
    """All fields of the form, in its order."""
    base_id, data = get(record, "base/id"), record.get("data", [])
    flop = _flop(record)
    days = get(record, "compute/totals/wall_days", "run")
    software = (
        ", ".join(f"{k} {v}" for k, v in get(record, "run/versions").items()) if "run" in record else missing("run")
    )
    weights = get(record, "base/params_total")
    memory = (
        f"about {2 * weights / 2**30:.2g} GiB for weights in bf16"
        if isinstance(weights, (int, float))
        else missing("run")
    )
    context = get(record, "base/context", "base model's provider: context length")
    window = f"trained on up to {get(record, 'hparams/max_len')} tokens; context length {text_of(context)}"
    inference = get(record, "deployment/inference/flop", "run: the architecture's FLOPs are not counted")
    return [
        Field(
            "0", "Date last updated, document version", "auto", f"{_last(record)}, version 1.{record['log']['events']}"
        ),
        Field("1.1", "Legal name of the model provider", "person", _people(record, "provider_legal_name")),
        Field(
            "1.2",
            "Model name, unique identifier, public versions covered",
            "auto+person",
            f"{_people(record, 'model_name')}; run {get(record, 'run/id')}",
        ),
        Field("1.3", "Model authenticity: secure hash or endpoint", "auto", _digest(record)),
        Field("1.4", "Release date", "person", _people(record, "release_date")),
        Field("1.5", "Date of placing on the Union market", "person", _people(record, "union_market_date")),
        Field(
            "1.6",
            "Model dependencies",
            "auto",
            f"{base_id}, revision {get(record, 'base/revision')}, licence {get(record, 'base/licence')}, SHA-256 {get(record, 'base/tree_sha256', 'run: digests of the base model')}",
        ),
        Field(
            "2.1",
            "Model architecture",
            "auto",
            f"decoder-only transformer {get(record, 'base/architecture')}: {get(record, 'base/layers')} layers, width {get(record, 'base/hidden_size')}, vocabulary {get(record, 'base/vocabulary')}",
        ),
        Field(
            "2.2",
            "Design specifications, rationale, assumptions",
            "auto+person",
            f"{_process(record)}. Rationale: {_people(record, 'design_rationale')}",
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
            _parameters(record),
            ALL,
            (("DP", aiact.bin_parameters(float(weights)) if isinstance(weights, (int, float)) else weights),),
        ),
        Field("3.1", "Methods and channels of distribution", "person", _people(record, "distribution_channels")),
        Field(
            "3.2",
            "Licence: link, category, additional assets",
            "auto+person",
            f"{_people(record, 'licence_of_result')}. Inherited from {_licence_parents(record)}",
        ),
        Field("4.1", "Acceptable use policy", "person", _people(record, "acceptable_use_policy")),
        Field(
            "4.2",
            "Intended uses, restricted uses",
            "person",
            f"intended: {_people(record, 'intended_use')}; restricted: {_people(record, 'restricted_use')}"
            if not (is_missing(_people(record, "intended_use")) and is_missing(_people(record, "restricted_use")))
            else missing("provider"),
        ),
        Field("4.3", "Type and nature of AI systems for integration", "person", _people(record, "integration")),
        Field(
            "4.4",
            "Technical means for integration, hardware, software",
            "auto",
            f"load with transformers{' and peft' if get(record, 'method/kind') != 'full' else ''} (safetensors); {memory}; {software}",
        ),
        Field("5.1", "Design specification of the training process", "auto", _process(record), AUTHORITIES),
        Field("5.2", "Decision rationale", "person", _people(record, "training_rationale"), AUTHORITIES),
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
            _points(record, None),
            AUTHORITIES,
            (("AIO", _points(record, 3)), ("NCA", _points(record, 1))),
        ),
        Field(
            "6.5",
            "Scope and main characteristics",
            "auto+person",
            f"languages: {text_of(names(d['languages'] for d in data))}; content: {_people(record, 'content_types')}",
            AUTHORITIES,
        ),
        Field("6.6", "Data curation methodologies", "auto", _curation(record)),
        Field(
            "6.7",
            "Measures to detect unsuitability of sources",
            "auto+person",
            f"licences recorded per source ({_licence_parents(record)}); {_people(record, 'unsuitable_data_measures')}",
            AUTHORITIES,
        ),
        Field("6.8", "Measures to detect identifiable biases", "person", _people(record, "bias_measures"), AUTHORITIES),
        Field(
            "7.1",
            "Training time",
            "auto",
            _days(record),
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
        Field("8.1", "Energy used for training (MWh)", "auto", _energy(record), AUTHORITIES),
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


def _last(record: dict[str, Any]) -> str:
    attempts = record.get("compute", {}).get("attempts", {})
    return attempts[max(attempts)]["updated"][:10] if attempts else get(record, "run/created")[:10]


def _uses(record: dict[str, Any], *origins: str) -> Any:
    """Sources of these origins; MISSING as long as any source's origin is."""
    data = record.get("data", [])
    named = [d for d in data if d["origin"] in origins]
    if any(is_missing(d["origin"]) for d in data):
        open_ones = text_of([d["name"] for d in data if is_missing(d["origin"])])
        return missing(f"data owner: origin of {open_ones}")
    if not named:
        return "no"
    return "yes: " + "; ".join(
        f"{d['name']} ({d['source']}), text, collected {d['collected_from']} to {d['collected_to']}" for d in named
    )


def public_summary(record: dict[str, Any]) -> list[Field]:
    """The template's fields for the content of this modification; the base model's own summary is linked, not repeated."""
    data = [d for d in record.get("data", []) if d["role"] == "train"]
    tokens = get(record, "data_sets/sets/train/tokens", "run")
    training = {d["name"]: d["collected_to"] for d in data}
    return [
        Field(
            "0.1",
            "Version of the summary, link to the earlier one",
            "auto",
            f"1.{record['log']['events']}; {'earlier run: ' + str(get(record, 'lineage/run')) if get(record, 'lineage/start_from') and not is_missing(get(record, 'lineage/start_from')) else 'no earlier version'}",
        ),
        Field("0.2", "Last update", "auto", _last(record)),
        Field(
            "1.1",
            "Provider name and contact",
            "person",
            f"{_people(record, 'provider_legal_name')}; {_people(record, 'contact')}"
            if not is_missing(_people(record, "provider_legal_name"))
            else missing("provider"),
        ),
        Field(
            "1.1b",
            "Authorised representative (outside the Union only)",
            "person",
            _people(record, "authorised_representative"),
        ),
        Field(
            "1.2a",
            "Versioned model names",
            "auto+person",
            f"{_people(record, 'model_name')}; run {get(record, 'run/id')}",
        ),
        Field(
            "1.2b",
            "Model dependencies and link to their summary",
            "base",
            f"{get(record, 'base/id')}: {get(record, 'base/public_summary_url')}",
        ),
        Field("1.2c", "Date of placement on the Union market", "person", _people(record, "union_market_date")),
        Field(
            "1.3a",
            "Size of the text data of this modification",
            "auto",
            aiact.bin_tokens(float(tokens)) if isinstance(tokens, (int, float)) else tokens,
        ),
        Field("1.3b", "Image, audio, video data", "auto", "none: text only"),
        Field("1.3c", "Types of content", "person", _people(record, "content_types")),
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
            _people(record, "regional_characteristics"),
        ),
        Field("2.1", "Publicly available datasets", "auto+person", _uses(record, "public")),
        Field("2.2.1", "Commercially licensed data", "person", _people(record, "licensed_data")),
        Field("2.2.2", "Private data from other third parties", "person", _people(record, "private_third_party_data")),
        Field("2.3", "Data crawled and scraped", "auto+person", _uses(record, "crawl")),
        Field("2.4", "User data", "person", _people(record, "user_data")),
        Field("2.5", "Synthetic data", "auto+person", _uses(record, "synthetic")),
        Field("2.6", "Other sources", "person", _people(record, "other_data")),
        Field("3.1a", "Signatory of the Code of Practice", "person", _people(record, "code_signatory")),
        Field(
            "3.1b",
            "Measures for reservations of rights (text and data mining)",
            "person",
            _people(record, "tdm_statement"),
        ),
        Field("3.2", "Removal of illegal content", "auto+person", _people(record, "illegal_content_measures")),
        Field(
            "3.3",
            "Other information",
            "auto",
            f"duplicates removed: {text_of(get(record, 'data_sets/duplicates'))}; train and evaluation overlap: {text_of(get(record, 'data_sets/overlap'))}; goldfish loss: {text_of(get(record, 'method/goldfish'))}; differential privacy: {text_of(record.get('method', {}).get('dp'))}",
        ),
    ]


def annex_xi_xii(record: dict[str, Any]) -> list[Field]:
    """Annex XI section 1 and Annex XII, with the same values as the form. ``recipients``: DP marks what Annex XII asks too."""
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
            f"{text_of(get(record, 'run/versions'))}; container {text_of(get(record, 'run/container'))}; {text_of(device)}. Intended purpose: {_people(record, 'intended_use')}",
        ),
        Field(
            "2(a)",
            "Methods, recourse to pre-trained systems",
            "auto",
            f"{get(record, 'base/id')}, revision {get(record, 'base/revision')}; {_process(record)}",
        ),
        Field(
            "2(b)",
            "Design, what is optimised, relevance of parameters",
            "auto+person",
            f"{_process(record)}. Rationale: {_people(record, 'design_rationale')}",
        ),
        Field(
            "2(c)",
            "Architecture and computational resources",
            "auto",
            f"{get(record, 'base/architecture')}, {_parameters(record)} parameters; {text_of(device)}; {_days(record)}; {text_of(_flop(record))} FLOP",
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
            f"{text_of(evaluation) if evaluation else missing('run: no evaluation')}; signed by: {_people(record, 'signed_by')}",
        ),
        Field(
            "2(h)",
            "Cybersecurity",
            "auto+person",
            f"weights as safetensors only, none unpickled; manifest of digests and signature; privacy profile {get(record, 'run/privacy_profile')}. System measures: {system}",
        ),
        Field(
            "3",
            "Accuracy for groups, limits, foreseeable outcomes",
            "auto+person",
            f"input limit {get(record, 'hparams/max_len')} tokens; languages {text_of(names(d['languages'] for d in record.get('data', [])))}. Foreseeable outcomes: {_people(record, 'foreseeable_risks')}",
        ),
        Field("4", "Appropriateness of the metrics", "person", missing("provider of the system")),
        Field(
            "6",
            "Changes over the lifecycle",
            "auto",
            f"started from {text_of(get(record, 'lineage/start_from', 'run')) if record.get('lineage', {}).get('start_from') else 'the base model'}; {text_of(get(record, 'compute/totals/restarts', 'run'))} restarts; changes of configuration: {text_of(list(record.get('run', {}).get('config_changes', {})))}",
        ),
        Field(
            "5, 7, 8, 9",
            "Risk management, standards, declaration, post-market monitoring",
            "person",
            f"risk class: {_people(record, 'risk_class')}; {system}",
        ),
    ]
