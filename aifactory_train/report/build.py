"""``report.html``: what a run did, for people. One file without scripts or pictures from anywhere else, made from the
record, ``metrics.jsonl`` and ``eval.json``."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from aifactory_train.core.figures import FIGURES
from aifactory_train.core.files import object_or_nothing, reading, write_atomic
from aifactory_train.core.missing import is_missing, missing_places
from aifactory_train.record.render.common import legal_basis
from aifactory_train.report.curves import curves
from aifactory_train.report.page_parts import brief, page, show, table
from aifactory_train.report.svg import duration, short, timeline
from aifactory_train.run.folder import RunFolder


def write_report(run: RunFolder, record: dict[str, Any]) -> Path:
    """Write ``report.html`` into the run folder."""
    target = run.path / "report.html"
    write_atomic(target, build(run, record))
    return target


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``; what is none (a torn last line) is left out."""
    found = []
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # the line that is being written
                if isinstance(row, dict):
                    found.append(row)
    return found


def build(run: RunFolder, record: dict[str, Any], *, live: bool = False) -> str:
    """The page as text. ``live``: it asks its own server for news every few seconds (``aifactory report --serve``).

    Raises :class:`UserError` where record, metrics or figures are not as this program writes them.
    """
    with reading(run.path / "record.json", "the record, or what lies beside it, is damaged", "aifactory verify RUN"):
        return _page(run, record, live)


def _page(run: RunFolder, record: dict[str, Any], live: bool) -> str:
    metrics = read_metrics(run.metrics_file)
    results = object_or_nothing(run.eval_file)
    plan = object_or_nothing(run.path / "plan.json")
    title = str(record.get("run", {}).get("title") or "untitled")
    if title == "untitled":
        title = str(record.get("run", {}).get("recipe") or run.path.name)
    sections = [
        ("curves", "Curves", curves(metrics, record, plan)),
        ("evaluation", "Held-out evaluation", _evaluation(record, results)),
        ("compute", "Compute and energy", _compute(record)),
        ("attempts", "Attempts", _attempts(record)),
        ("data", "Data card", _data(record)),
        ("choices", "Where each choice came from", _choices(record)),
        ("evidence", "Evidence and open questions", _evidence(run, record)),
    ]
    sections = [s for s in sections if s[2]]
    navigation = "".join(f'<li><a href="#{anchor}">{html.escape(name)}</a></li>' for anchor, name, _ in sections)
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="h-{anchor}"><h2 '
        f'id="h-{anchor}">{html.escape(name)}</h2>{content}</section>\n'
        for anchor, name, content in sections
    )
    attempts = record.get("compute", {}).get("attempts", {})
    state = attempts[max(attempts)]["state"] if attempts else "new"
    return page(
        title,
        f'<header class="top"><p class="soft">{html.escape(str(record.get("run", {}).get("recipe", "")))} '
        f"· run {html.escape(str(record.get('run', {}).get('id', '')))}</p><h1>{html.escape(title)}</h1>"
        f'<p><span class="state {html.escape(state)}">{html.escape(state)}</span> {html.escape(_sentence(record))}</p>'
        f'<nav aria-label="Sections"><ul>{navigation}</ul></nav></header>\n<main '
        f'id="main">{_cards(record, results)}{body}</main>\n'
        f'<footer class="end"><p>{html.escape(legal_basis()["footer"])}</p><p>Made by aifactory-train '
        f"{html.escape(str(record.get('run', {}).get('code', {}).get('version', '')))} from record event "
        f"{record['log']['events']}, head "
        f"{record['log']['head_sha256'][:16]}. <code>aifactory verify</code> checks it.</p></footer>",
        live=live,
    )


# ---- parts


def _sentence(record: dict[str, Any]) -> str:
    method, base, device = record.get("method", {}), record.get("base", {}), record.get("compute", {}).get("device", {})
    count = device.get("count", 1)
    what = "GPU" if device.get("kind") == "gpu" else "CPU process"
    plural = "es" if what.endswith("ss") else "s"
    trained = "all weights" if method.get("kind") == "full" else f"{method.get('kind')} adapters"
    return (
        f"{trained} of {base.get('id')} on {count} {what}{plural if count != 1 else ''} "
        f"({device.get('model', 'unknown')})"
    )


def _cards(record: dict[str, Any], results: dict[str, Any]) -> str:
    totals, energy, law = record.get("compute", {}).get("totals", {}), record.get("energy", {}), record.get("aiact", {})
    cards: list[tuple[str, str, str]] = []
    before, after = results.get("before") or {}, results.get("after") or {}
    for name, (label, sense) in FIGURES.items():
        if isinstance(after.get(name), (int, float)):
            old = before.get(name)
            change = ""
            if isinstance(old, (int, float)) and old:
                change = f"{100 * (after[name] - old) / abs(old):+.1f} % from {old:.4g}, {sense}"
            cards.append((f"held-out {label}", f"{after[name]:.4g}", change))
            break
    if totals:
        cards.append(
            (
                "training time",
                duration(totals["wall_s"]),
                f"{totals['device_hours']:.3g} device hours, {totals['restarts']} restarts",
            )
        )
        real = totals["tokens_processed"]["real"]
        cards.append(("tokens trained on", short(real), f"{totals['steps']:,} steps"))
        if totals.get("flop_model"):
            mfu = totals.get("mfu")
            more = f"executed {totals['flop_executed']:.3g}" + (
                f", MFU {100 * mfu:.1f} %" if isinstance(mfu, (int, float)) else ""
            )
            cards.append(("model FLOP", f"{totals['flop_model']:.3g}", more))
    if energy:
        kwh = energy.get("measured_kwh")
        if isinstance(kwh, (int, float)):
            worst = min(energy.get("coverage_pct", {}).values(), default=0)
            cards.append(
                (
                    "energy, measured",
                    f"{short(kwh * 1000)} Wh" if kwh < 1 else f"{short(kwh)} kWh",
                    f"{energy['boundary']}; coverage {worst:g} %",
                )
            )
        elif isinstance(energy.get("estimated_kwh"), (int, float)):
            cards.append(("energy, estimated", f"{short(energy['estimated_kwh'])} kWh", "TDP x time, not measured"))
        else:
            cards.append(("energy", "not measured", "no counter could be read here"))
    if law.get("share_of_threshold") is not None:
        flag = (
            "may make you a provider"
            if law.get("provider_flag")
            else "far below"
            if law["share_of_threshold"] < 0.1
            else "below"
        )
        share = law["share_of_threshold"]
        cards.append(("one-third test", f"{share:.2g}" if share >= 1e-4 else "< 0.0001", f"of the threshold: {flag}"))
    items = "".join(
        f'<li><span class="label">{html.escape(a)}</span><span class="figure">{html.escape(b)}</span><span '
        f'class="more">{html.escape(c)}</span></li>'
        for a, b, c in cards
    )
    return f'<ul class="cards" aria-label="Key figures">{items}</ul>' if items else ""


def _evaluation(record: dict[str, Any], results: dict[str, Any]) -> str:
    before, after = results.get("before") or {}, results.get("after") or {}
    rows = []
    for name, (label, sense) in FIGURES.items():
        if not any(isinstance(x.get(name), (int, float)) for x in (before, after)):
            continue

        def shown(figures: dict[str, Any], name: str = name) -> str:
            value = figures.get(name)
            if not isinstance(value, (int, float)):
                return "not measured"
            interval = (figures.get("ci") or {}).get(name)
            text = f"{value:.4g}"
            if isinstance(interval, list) and len(interval) == 2 and all(isinstance(x, (int, float)) for x in interval):
                text += f" <span class=soft>[{interval[0]:.4g}, {interval[1]:.4g}]</span>"
            return text

        rows.append([f"{label} <span class=soft>({sense})</span>", shown(before), shown(after)])
    if not rows:
        return "<p>Nothing was evaluated yet.</p>"
    count = after.get("rows") or before.get("rows")
    content = table(
        f"Held-out figures with 95 % bootstrap intervals over {count} rows", ["metric", "before", "after"], rows
    )
    samples = after.get("samples") or []
    if record.get("run", {}).get("privacy_profile", "open") != "open":
        return content + "<p>Sample answers are withheld: the run's privacy profile keeps texts out of reports.</p>"
    earlier = {s.get("prompt"): s.get("answer") for s in before.get("samples") or []}
    for sample in samples:
        pairs = [("prompt", sample.get("prompt")), ("expected", sample.get("expected"))]
        if sample.get("prompt") in earlier:
            pairs.append(("answer before training", earlier[sample["prompt"]]))
        pairs.append(("answer after training", sample.get("answer")))
        inner = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in pairs if v is not None)
        content += f'<dl class="sample">{inner}</dl>'
    return content


def _compute(record: dict[str, Any]) -> str:
    totals, energy = record.get("compute", {}).get("totals", {}), record.get("energy", {})
    if not totals:
        return "<p>No step is finished yet.</p>"
    rows = [
        ["wall time", f"{duration(totals['wall_s'])} ({totals['wall_days']:.3g} days)"],
        [
            "device hours",
            f"{totals['device_hours']:.4g}, of which {totals['wasted_device_hours']:.3g} computed again after restarts",
        ],
        [
            "tokens",
            f"{totals['tokens_processed']['real']:,} (with padding {totals['tokens_processed']['with_padding']:,}), "
            f"{totals['supervised_tokens']:,} supervised",
        ],
        [
            "model FLOP",
            f"{totals['flop_model']:.4g}; with the whole score matrix counted "
            f"{totals['flop_model_full_attention']:.4g}",
        ],
        ["executed FLOP", f"{totals['flop_executed']:.4g}"],
        ["how FLOP are counted", html.escape(totals["flop_method"])],
    ]
    check = totals.get("cross_check")
    if check:
        flag = " <span class=missing>more than 30 % apart</span>" if check["more_than_30_pct"] else ""
        rows.append(
            [
                "cross-check",
                f"{html.escape(check['formula'])} gives {check['flop']:.4g}: {check['difference_pct']:+.1f} %{flag}; "
                f"{html.escape(check['why_it_may_differ'])}",
            ]
        )
    for key, label in (
        ("measured_kwh", "energy measured (kWh)"),
        ("estimated_kwh", "energy estimated (kWh)"),
        ("device_kwh", "of which devices (kWh)"),
        ("cpu_kwh", "of which processors (kWh)"),
        ("node_kwh", "node counters (kWh)"),
        ("coverage_pct", "coverage (%)"),
        ("facility_kwh", "facility, with PUE (kWh)"),
        ("carbon_kg", "CO2e (kg)"),
        ("pue", "PUE"),
        ("carbon", "grid intensity"),
        ("method", "how energy was found"),
        ("missing_readers", "counters that could not be read"),
        ("notes", "notes"),
    ):
        if key == "missing_readers" and str(energy.get("method", "")).startswith("no counter could be read"):
            continue  # the method says why, counter by counter
        if key in energy and energy[key] not in (None, {}, []):
            rows.append([label, _sourced(energy[key]) if key in ("pue", "carbon") else show(energy[key])])
    law = record.get("aiact", {}).get("reasoning")
    verdict = f"<h3>One-third test</h3><p>{show(law)}</p>" if law else ""
    return table("Compute and energy of all attempts", ["quantity", "value"], rows) + verdict


def _sourced(factor: Any) -> str:
    """A site's factor with its unit and source: ``{"value" or "g_per_kwh", "source"}``."""
    if not isinstance(factor, dict) or "source" not in factor:
        return show(factor)
    value, unit = factor.get("value"), ""
    if "g_per_kwh" in factor:
        value, unit = factor["g_per_kwh"], " g CO2e per kWh"
    if is_missing(value):
        return f"{show(value)} ({html.escape(str(factor['source']))})"
    return f"{html.escape(str(value))}{unit} ({html.escape(str(factor['source']))})"


def _attempts(record: dict[str, Any]) -> str:
    attempts = record.get("compute", {}).get("attempts", {})
    if not attempts:
        return ""
    import datetime

    def seconds(text: str) -> float:
        return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").timestamp()

    origin = min(seconds(a["started"]) for a in attempts.values())
    bars, rows = [], []
    for number in sorted(attempts):
        a = attempts[number]
        start = seconds(a["started"]) - origin
        cause = a.get("cause") or ""
        bars.append((f"attempt {int(number)}", start, start + a["wall_s"], a["state"], cause))
        rows.append(
            [
                f"{int(number)}",
                f'<span class="state {html.escape(a["state"])}">{html.escape(a["state"])}</span>',
                html.escape(a["started"].replace("T", " ").rstrip("Z")),
                duration(a["wall_s"]),
                f"{a['first_step']:,} to {a['last_step']:,}",
                html.escape(cause) or "none",
            ]
        )
    incidents = [
        [f"{int(step):,}", html.escape(i["action"]), html.escape(i["why"])]
        for step, i in sorted(record.get("incidents", {}).items())
    ]
    guarded = table("Batches that the guard left out", ["step", "action", "why"], incidents) if incidents else ""
    return (
        timeline(bars)
        + guarded
        + table("Attempts and why they ended", ["attempt", "state", "started (UTC)", "time", "steps", "cause"], rows)
    )


def _data(record: dict[str, Any]) -> str:
    data = record.get("data", [])
    rows = [
        [
            html.escape(str(d["name"])),
            html.escape(d["role"]),
            show(d.get("rows")),
            show(d.get("tokens")),
            brief(d["licence"]),
            brief(d["origin"]),
            brief(d["personal_data"]),
            f"<code>{html.escape(str(d.get('sha256'))[:16])}</code>",
        ]
        for d in data
    ]
    if not rows:
        return ""
    content = table(
        "Sources",
        ["source", "role", "rows", "tokens", "licence", "origin", "personal data", "SHA-256"],
        rows,
        right=(2, 3),
    )
    sets = record.get("data_sets", {})
    facts = [[html.escape(k.replace("_", " ")), show(v)] for k, v in sets.items() if k not in ("digests",)]
    return content + table("What became of them", ["stage", "result"], facts)


def _choices(record: dict[str, Any]) -> str:
    choices = record.get("hparams", {}).get("choices", [])
    rows = [
        [html.escape(str(c["what"])), html.escape(str(c["choice"])), html.escape(str(c["why"])) or "default"]
        for c in choices
    ]
    settings = [
        [html.escape(k.replace("_", " ")), show(v)]
        for k, v in record.get("hparams", {}).items()
        if k != "choices" and v not in (None, {}, [])
    ]
    content = table("Chosen at start", ["what", "choice", "why"], rows) if rows else ""
    return (
        content
        + "<details><summary>All hyperparameters</summary>"
        + table("Hyperparameters", ["setting", "value"], settings)
        + "</details>"
    )


def _evidence(run: RunFolder, record: dict[str, Any]) -> str:
    folder = run.path / "evidence"
    owed = missing_places(record)
    content = ""
    if folder.is_dir() or record.get("artefact", {}).get("tree_sha256"):
        content += '<p>The documents lie in <a href="evidence/README.md">evidence/</a>.</p>'
    rows = [[f"<code>{html.escape(place)}</code>", html.escape(who)] for place, who in owed]
    if rows:
        content += (
            f"<details><summary>{len(rows)} entries that only people can supply</summary>"
            + table("Missing entries", ["place in the record", "who must supply it"], rows)
            + "</details>"
        )
    return content
