"""The machine-readable documents: CycloneDX 1.7 ML-BOM, Process Run RO-Crate, Croissant. Plain JSON written here; the
official validators check it in the tests, so that an air-gapped installation needs none of their packages."""

from __future__ import annotations

import datetime
import uuid
from typing import Any

from aifactory_train.core.missing import is_missing
from aifactory_train.record.render.common import get, legal_basis, names, text_of

# ---- CycloneDX


def _licence(value: Any) -> dict[str, Any]:
    """SPDX ids go to ``id``, everything else to ``name``; a missing one is said as such."""
    if not is_missing(value) and str(value) in _SPDX:
        return {"license": {"id": str(value)}}
    return {"license": {"name": str(value)}}


#: The SPDX ids that training data and base models come under; others are given by name.
_SPDX = {
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-SA-4.0",
    "EUPL-1.2",
    "GPL-3.0-only",
    "LGPL-3.0-only",
    "MPL-2.0",
    "ODbL-1.0",
    "ODC-By-1.0",
    "PDDL-1.0",
    "Unlicense",
    "ISC",
    "CC-BY-ND-4.0",
    "CC-BY-NC-ND-4.0",
    "CC-BY-NC-3.0",
    "etalab-2.0",
    "OGL-UK-3.0",
    "DL-DE-BY-2.0",
}


def bom(record: dict[str, Any]) -> dict[str, Any]:
    """CycloneDX 1.7: the model with its card, the base model, the data sets, the software."""
    run_id = str(get(record, "run/id"))
    head = record["log"]["head_sha256"]
    data = record.get("data", [])
    components: list[dict[str, Any]] = [
        {
            "type": "machine-learning-model",
            "bom-ref": "base-model",
            "name": str(get(record, "base/id")),
            "version": str(get(record, "base/revision")),
            "licenses": [_licence(get(record, "base/licence"))],
            **_hashes(record.get("base", {}).get("tree_sha256")),
        }
    ]
    for i, entry in enumerate(data):
        components.append(
            {
                "type": "data",
                "bom-ref": f"data-{i}",
                "name": str(entry["name"]),
                "licenses": [_licence(entry["licence"])],
                **_hashes(entry.get("sha256")),
                "data": [
                    {
                        "type": "dataset",
                        "name": str(entry["name"]),
                        "description": f"{entry['role']} rows from {entry['source']}: {entry.get('rows')} rows, "
                        f"{entry.get('tokens')} tokens",
                        "classification": _classification(entry["personal_data"]),
                        "sensitiveData": [f"personal data: {entry['personal_data']}"],
                    }
                ],
            }
        )
    for name, version in (get(record, "run/versions") if "run" in record else {}).items():
        components.append(
            {
                "type": "platform" if name == "python" else "library",
                "bom-ref": f"pypi-{name}",
                "name": name,
                "version": version,
                **({} if name == "python" else {"purl": f"pkg:pypi/{name.lower()}@{version}"}),
            }
        )
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": run_id,
        "version": head[:16],
        "description": f"{get(record, 'run/title')}: {get(record, 'method/kind')} fine-tuning of "
        f"{get(record, 'base/id')}",
        **_hashes(record.get("artefact", {}).get("tree_sha256")),
        "modelCard": _model_card(record, data),
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'aifactory-train:{run_id}:{head}')}",
        "version": 1,
        "metadata": {
            "timestamp": _created(record),
            "lifecycles": [{"phase": "build"}],
            "tools": {
                "components": [
                    {"type": "application", "name": "aifactory-train", "version": str(get(record, "run/code/version"))}
                ]
            },
            "component": model,
            "properties": [{"name": "aifactory-train:notice", "value": legal_basis()["footer"]}],
        },
        "components": components,
        "dependencies": [
            {"ref": "model", "dependsOn": ["base-model", *(f"data-{i}" for i in range(len(data)))]},
        ],
    }


def _hashes(digest: Any) -> dict[str, Any]:
    return {"hashes": [{"alg": "SHA-256", "content": digest}]} if digest and not is_missing(digest) else {}


def _classification(personal: Any) -> str:
    return {"none": "no personal data", "special": "special categories of personal data"}.get(
        str(personal), str(personal)
    )


def _model_card(record: dict[str, Any], data: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = []
    for when in ("before", "after"):
        figures = record.get("eval", {}).get(when, {})
        intervals = figures.get("ci") or {}
        for name in ("bits_per_byte", "perplexity", "exact_match", "token_f1"):
            if isinstance(figures.get(name), (int, float)):
                metric: dict[str, Any] = {
                    "type": name,
                    "value": f"{figures[name]:.6g}",
                    "slice": f"held-out rows, {when} training",
                }
                low_high = intervals.get(name)
                if isinstance(low_high, (list, tuple)) and len(low_high) == 2 and None not in low_high:
                    metric["confidenceInterval"] = {
                        "lowerBound": f"{low_high[0]:.6g}",
                        "upperBound": f"{low_high[1]:.6g}",
                    }
                metrics.append(metric)
    considerations: dict[str, Any] = {
        "useCases": [str(get(record, "people/intended_use", "provider"))],
        "technicalLimitations": [
            f"trained on sequences of up to {get(record, 'hparams/max_len')} tokens; languages: "
            f"{text_of(names(d['languages'] for d in data))}",
            str(get(record, "people/foreseeable_risks", "provider")),
        ],
    }
    energy = _energy_consumption(record)
    if energy:
        considerations["environmentalConsiderations"] = energy
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": str(get(record, "base/architecture")),
            "datasets": [{"ref": f"data-{i}"} for i in range(len(data))],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        "considerations": considerations,
        "properties": [
            {"name": "aifactory-train:flop_model", "value": text_of(get(record, "compute/totals/flop_model", "run"))},
            {
                "name": "aifactory-train:flop_executed",
                "value": text_of(get(record, "compute/totals/flop_executed", "run")),
            },
            {
                "name": "aifactory-train:device_hours",
                "value": text_of(get(record, "compute/totals/device_hours", "run")),
            },
            {
                "name": "aifactory-train:trainable_parameters",
                "value": text_of(get(record, "method/trainable_params", "run")),
            },
        ],
    }


def _energy_consumption(record: dict[str, Any]) -> dict[str, Any] | None:
    """Measured (or clearly estimated) energy; nothing at all where neither is known: the schema wants a number."""
    energy = record.get("energy", {})
    value = energy.get("measured_kwh")
    estimated = is_missing(value) and isinstance(energy.get("estimated_kwh"), (int, float))
    kwh = energy["estimated_kwh"] if estimated else value
    if not isinstance(kwh, (int, float)):
        return None
    entry: dict[str, Any] = {
        "activity": "fine-tuning",
        "energyProviders": [
            {
                "organization": {"name": str(get(record, "run/host_site"))},
                "energySource": "unknown",
                "energyProvided": {"value": kwh, "unit": "kWh"},
                "description": "the site's electricity; its mix is not recorded",
            }
        ],
        "activityEnergyCost": {"value": kwh, "unit": "kWh"},
        "properties": [
            {"name": "aifactory-train:method", "value": str(energy.get("method"))},
            {"name": "aifactory-train:kind", "value": "estimate" if estimated else "measured"},
        ],
    }
    carbon = energy.get("carbon_kg")
    if isinstance(carbon, (int, float)):
        entry["co2CostEquivalent"] = {"value": carbon / 1000, "unit": "tCO2eq"}
    return {"energyConsumptions": [entry]}


def _created(record: dict[str, Any]) -> str:
    created = get(record, "run/created")
    return (
        created
        if not is_missing(created)
        else datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    )


# ---- RO-Crate


def crate(record: dict[str, Any], files: list[dict[str, Any]]) -> dict[str, Any]:
    """Process Run Crate of the run folder. ``files``: ``{path, bytes, sha256, media}`` of what lies in it."""
    run_id = str(get(record, "run/id"))
    attempts = record.get("compute", {}).get("attempts", {})
    person = get(record, "people/provider_legal_name", "provider")
    licence = get(record, "people/licence_of_result", "provider")
    inputs = [{"@id": "#base-model"}] + [{"@id": f"#data-{i}"} for i in range(len(record.get("data", [])))]
    outputs = [{"@id": f["path"]} for f in files if f["path"].startswith("export/")] or [{"@id": "record.json"}]
    graph: list[dict[str, Any]] = [
        {
            "@id": "ro-crate-metadata.json",
            "@type": "CreativeWork",
            "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
            "about": {"@id": "./"},
        },
        {
            "@id": "./",
            "@type": "Dataset",
            "name": f"Training run {run_id}",
            "description": f"{get(record, 'run/title')}: fine-tuning of {get(record, 'base/id')} with "
            f"aifactory-train. {legal_basis()['footer']}",
            "datePublished": _created(record)[:10],
            "license": {"@id": "#licence"},
            "conformsTo": {"@id": "https://w3id.org/ro/wfrun/process/0.5"},
            "hasPart": [{"@id": f["path"]} for f in files],
            "mentions": [{"@id": f"#attempt-{n}"} for n in sorted(attempts)],
            "author": {"@id": "#provider"},
        },
        {
            "@id": "https://w3id.org/ro/wfrun/process/0.5",
            "@type": "CreativeWork",
            "name": "Process Run Crate",
            "version": "0.5",
        },
        {"@id": "#licence", "@type": "CreativeWork", "name": str(licence), "description": "licence of the result"},
        {"@id": "#provider", "@type": "Organization", "name": str(person)},
        {
            "@id": "https://pypi.org/project/aifactory-train/",
            "@type": "SoftwareApplication",
            "name": "aifactory-train",
            "softwareVersion": str(get(record, "run/code/version")),
            "url": {"@id": "https://pypi.org/project/aifactory-train/"},
        },
        {
            "@id": "#base-model",
            "@type": "CreativeWork",
            "name": str(get(record, "base/id")),
            "version": str(get(record, "base/revision")),
            "identifier": str(get(record, "base/tree_sha256", "run")),
        },
    ]
    for i, entry in enumerate(record.get("data", [])):
        graph.append(
            {
                "@id": f"#data-{i}",
                "@type": "CreativeWork",
                "name": str(entry["name"]),
                "description": f"{entry['role']} rows: {entry.get('rows')} rows, licence {entry['licence']}, origin "
                f"{entry['origin']}",
                "identifier": str(entry.get("sha256")),
            }
        )
    for number in sorted(attempts):
        attempt = attempts[number]
        finished = attempt["state"] == "finished"
        action: dict[str, Any] = {
            "@id": f"#attempt-{number}",
            "@type": "CreateAction",
            "name": f"attempt {int(number)}: steps {attempt['first_step']} to {attempt['last_step']}",
            "description": f"{attempt['state']}" + (f": {attempt['cause']}" if attempt.get("cause") else ""),
            "startTime": attempt["started"],
            "endTime": attempt["updated"],
            "instrument": {"@id": "https://pypi.org/project/aifactory-train/"},
            "object": inputs,
            "result": outputs if finished else [{"@id": "record.json"}],
            "agent": {"@id": "#provider"},
            "actionStatus": {
                "@id": "http://schema.org/CompletedActionStatus" if finished else "http://schema.org/FailedActionStatus"
            },
        }
        if not finished and attempt.get("cause"):
            action["error"] = str(attempt["cause"])
        graph.append(action)
    graph.extend(
        {
            "@id": file["path"],
            "@type": "File",
            "name": file["path"],
            "encodingFormat": file["media"],
            "contentSize": str(file["bytes"]),
            "sha256": file["sha256"],
        }
        for file in files
    )
    return {
        "@context": [
            "https://w3id.org/ro/crate/1.1/context",
            {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"},
        ],
        "@graph": graph,
    }


# ---- Croissant

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataBiases": "cr:dataBiases",
    "dataCollection": "cr:dataCollection",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "personalSensitiveInformation": "cr:personalSensitiveInformation",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(record: dict[str, Any]) -> dict[str, Any]:
    """The training data as a Croissant data set with its responsible-AI fields: what was used, not the rows
    themselves.
    """
    data = record.get("data", [])
    url = next((str(d["url"]) for d in data if not is_missing(d["url"]) and str(d["url"]).startswith("http")), None)
    manifest = record.get("data_manifest", {})
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": f"data-of-{get(record, 'run/id')}".replace("/", "-"),
        "description": "Rows that the run was trained and evaluated on: "
        + "; ".join(
            f"{d['name']} ({d['role']}): {d.get('rows')} rows, {d.get('tokens')} tokens, from {d['source']}"
            for d in data
        ),
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "license": [str(x) for x in names(d["licence"] for d in data)] or ["MISSING (data owner)"],
        "url": url or "urn:aifactory-train:not-public",
        "version": "1.0.0",
        "datePublished": _created(record)[:10],
        "creator": {"@type": "Organization", "name": str(get(record, "people/provider_legal_name", "provider"))},
        "citeAs": f"Training data of run {get(record, 'run/id')}, manifest SHA-256 {manifest.get('sha256')}",
        "inLanguage": [str(x) for x in names(d["languages"] for d in data)],
        "rai:dataCollection": "; ".join(f"{d['name']}: {d['obtained']}" for d in data),
        "rai:dataCollectionTimeframe": [f"{d['name']}: {d['collected_from']} to {d['collected_to']}" for d in data],
        "rai:dataPreprocessingProtocol": [
            f"{d['name']}: {s['step']}: {text_of({k: v for k, v in s.items() if k != 'step'})}"
            for d in data
            for s in d["pipeline"]
        ],
        "rai:dataBiases": [str(get(record, "people/bias_measures", "provider"))],
        "rai:personalSensitiveInformation": [f"{d['name']}: {d['personal_data']}" for d in data],
        "rai:dataUseCases": [str(get(record, "people/intended_use", "provider"))],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "data_manifest.json",
                "name": "data_manifest.json",
                "description": "digests, counts and licences of every source",
                "contentUrl": "../data_manifest.json",
                "encodingFormat": "application/json",
                "sha256": str(manifest.get("sha256")),
            }
        ],
    }
