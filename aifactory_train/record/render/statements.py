"""Statements that several documents make, each from the record alone."""

from __future__ import annotations

from typing import Any

from aifactory_train.core.figures import significant
from aifactory_train.core.missing import is_missing, missing
from aifactory_train.record.render.common import get, names, text_of


def answer_of(record: dict[str, Any], key: str) -> Any:
    from aifactory_train.record.people import PEOPLE

    return get(record, f"people/{key}", PEOPLE[key][0])


def licence_parents(record: dict[str, Any]) -> str:
    data = names(d["licence"] for d in record.get("data", []) if d["role"] == "train")
    return f"base model: {get(record, 'base/licence')}; training data: {text_of(data)}"


def digest_of_files(record: dict[str, Any]) -> Any:
    tree = get(record, "artefact/tree_sha256", "run: nothing was exported")
    files = get(record, "artefact/files")
    if is_missing(tree):
        return tree
    return f"SHA-256 over the manifest of {len(files)} files: {tree} (files and signature: evidence/manifest.json)"


def parameters(record: dict[str, Any]) -> Any:
    total = get(record, "base/params_total")
    if is_missing(total):
        return total
    extra = get(record, "method/trainable_params", "run")
    text = significant(float(total), 3)
    if get(record, "method/kind") != "full":
        text += f" in the base, {significant(float(extra), 3)} in the adapter"
    return text


def data_points(record: dict[str, Any], digits: int | None) -> Any:
    """Rows and tokens per set; to ``digits`` significant figures, or exactly."""
    sets = get(record, "data_sets/sets", "run")
    if is_missing(sets):
        return sets

    def shown(value: float) -> str:
        return f"{value:,}" if digits is None else significant(float(value), digits)

    return {name: f"{shown(s['rows'])} rows, {shown(s['tokens'])} tokens" for name, s in sets.items()}


def curation(record: dict[str, Any]) -> str:
    parts = []
    for entry in record.get("data", []):
        rows = entry.get("rows")
        counts: Any = next((s.get("counts") for s in entry.get("pipeline", []) if s.get("counts")), {})
        parts.append(
            f"{entry['name']}: {rows} rows read and validated, {entry.get('documents')} documents after rendering"
            + (f" ({text_of(counts)})" if counts else "")
        )
    sets = record.get("data_sets", {})
    parts.extend(
        f"{key}: {text_of({k: v for k, v in sets[key].items() if k != 'groups'})}"
        for key in ("rows", "unused", "duplicates", "overlap", "split")
        if key in sets
    )
    return "; ".join(parts) or missing("run")


def training_process(record: dict[str, Any]) -> str:
    method, h = record.get("method", {}), record.get("hparams", {})
    kind = (
        "all weights trained"
        if method.get("kind") == "full"
        else (
            f"{method.get('kind')} adapters of rank {method.get('rank')} on {text_of(method.get('targets'))}, base "
            f"frozen"
        )
    )
    return (
        f"{kind}; objective: {method.get('objective')}; {h.get('optimiser')} at a peak rate of "
        f"{h.get('learning_rate')}, {h.get('schedule')} "
        f"schedule, warm-up {h.get('warmup')}; batch {text_of(h.get('batch'))}; {h.get('steps')} steps planned; "
        f"sequences up to "
        f"{h.get('max_len')} tokens, {h.get('packing')}; {h.get('precision')}; {text_of(h.get('parallelism'))}"
    )


def training_time(record: dict[str, Any]) -> Any:
    totals = get(record, "compute/totals", "run")
    if is_missing(totals):
        return totals
    return f"{significant(totals['wall_days'])} wall-clock days, {significant(totals['device_days'])} hardware-days"


def flop_of(record: dict[str, Any]) -> Any:
    value = get(record, "compute/totals/flop_model", "run: FLOPs were not counted")
    return missing("run: FLOPs were not counted") if not is_missing(value) and not value else value


def energy_used(record: dict[str, Any]) -> Any:
    value = get(record, "energy/mwh_2sf", "site: energy counters")
    if is_missing(value):
        return value
    label = (
        "estimated" if get(record, "energy/estimate") and not is_missing(get(record, "energy/estimate")) else "measured"
    )
    return f"{value} MWh ({label})"


def last_update(record: dict[str, Any]) -> str:
    attempts = record.get("compute", {}).get("attempts", {})
    return attempts[max(attempts)]["updated"][:10] if attempts else get(record, "run/created")[:10]


def sources_from(record: dict[str, Any], *origins: str) -> Any:
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
