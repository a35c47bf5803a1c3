"""The Hugging Face model card, from the record alone: metadata block and text, no package needed."""

from __future__ import annotations

import re
from typing import Any

from aifactory_train.core import yaml_text
from aifactory_train.core.figures import FIGURES
from aifactory_train.core.missing import is_missing
from aifactory_train.record.render.common import footer, get, inline, markdown, names

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_LICENCES = {
    "apache-2.0",
    "mit",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-3.0",
    "cc-by-sa-4.0",
    "cc-by-sa-3.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "bsd-3-clause",
    "bsd-2-clause",
    "gpl-3.0",
    "lgpl-3.0",
    "mpl-2.0",
    "eupl-1.2",
    "odbl",
    "unlicense",
    "isc",
    "openrail",
}


def card(record: dict[str, Any]) -> str:
    """YAML front matter that the hub reads, and the sections people look for."""
    return f"---\n{yaml_text.dump(metadata(record))}---\n\n{_body(record)}"


def metadata(record: dict[str, Any]) -> dict[str, Any]:
    base = str(get(record, "base/id"))
    licence = get(record, "people/licence_of_result", "provider")
    data = record.get("data", [])
    languages = [x for x in names(d["languages"] for d in data) if not is_missing(x)]
    found: dict[str, Any] = {
        "library_name": "peft" if get(record, "method/kind") != "full" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["aifactory-train", str(get(record, "method/kind"))],
    }
    if _HUB_ID.match(base):
        found["base_model"] = base
    hub_data = [d["source"] for d in data if d["role"] == "train" and _HUB_ID.match(str(d["source"]))]
    if hub_data:
        found["datasets"] = names(hub_data)
    if languages:
        found["language"] = languages
    if not is_missing(licence) and str(licence).lower() in _HUB_LICENCES:
        found["license"] = str(licence).lower()
    else:
        found["license"] = "other"
        found["license_name"] = "missing" if is_missing(licence) else str(licence)
    results = []
    after = record.get("eval", {}).get("after", {})
    for name, (label, _) in FIGURES.items():
        if isinstance(after.get(name), (int, float)):
            results.append({"type": name, "value": float(f"{after[name]:.6g}"), "name": label})
    model_name = get(record, "people/model_name", "provider")
    if results:
        found["model-index"] = [
            {
                "name": str(get(record, "run/id")) if is_missing(model_name) else str(model_name),
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "held-out", "name": "held-out rows of this run"},
                        "metrics": results,
                    }
                ],
            }
        ]
    carbon = record.get("energy", {}).get("carbon_kg")
    if isinstance(carbon, (int, float)):
        found["co2_eq_emissions"] = {
            "emissions": round(carbon * 1000, 3),
            "source": "hardware energy counters, PUE and grid intensity of the site",
            "training_type": "fine-tuning",
            "hardware_used": f"{get(record, 'compute/device/count')} x {get(record, 'compute/device/model')}",
        }
    return found


def _body(record: dict[str, Any]) -> str:
    data = record.get("data", [])
    before, after = record.get("eval", {}).get("before", {}), record.get("eval", {}).get("after", {})

    def say(place: str, who: str = "run: not recorded") -> str:
        return inline(get(record, place, who))

    text = markdown(
        "card",
        say=say,
        is_missing=is_missing,
        title=get(record, "people/model_name", "provider"),
        data=data,
        settings={**record.get("method", {}), **record.get("hparams", {})},
        figures=[(name, label) for name, (label, _) in FIGURES.items() if isinstance(after.get(name), (int, float))],
        before=before,
        after=after,
        totals=record.get("compute", {}).get("totals", {}),
        licences=names(d["licence"] for d in data if d["role"] == "train"),
    )
    return text + footer("mdf", record)
