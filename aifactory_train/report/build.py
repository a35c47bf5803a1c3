"""``report.html``: what a run did, for people. One file without scripts or pictures from anywhere else, made from the
record, ``metrics.jsonl`` and ``eval.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from aifactory_train.core.figures import FIGURES, certainty
from aifactory_train.core.files import object_or_nothing, reading, write_atomic
from aifactory_train.core.missing import is_missing, missing_places
from aifactory_train.evaluation.verdict import Verdict
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
        ("evaluation", "Held-out evaluation", held_out(record, results)),
        ("curves", "Curves", Markup(curves(metrics, record, plan))),
        ("compute", "Compute and energy", _compute(record)),
        ("attempts", "Attempts", _attempts(record)),
        ("data", "Data card", _data(record)),
        ("choices", "Where each choice came from", _choices(record)),
        ("evidence", "Evidence and open questions", _evidence(run, record)),
    ]
    attempts = record.get("compute", {}).get("attempts", {})
    about = record.get("run", {})
    return page(
        "run.html.j2",
        title,
        live=live,
        run={"recipe": about.get("recipe", ""), "id": about.get("id", "")},
        version=about.get("code", {}).get("version", ""),
        state=attempts[max(attempts)]["state"] if attempts else "new",
        sentence=_sentence(record),
        verdict=Verdict.read(results),
        sections=[s for s in sections if s[2]],
        cards=_cards(record, results),
        legal=legal_basis()["footer"],
        log=record["log"],
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


def _cards(record: dict[str, Any], results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """``(label, figure, what belongs to it)`` of the key figures."""
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
    return cards


def held_out(record: dict[str, Any], results: dict[str, Any]) -> Markup:
    """Figures before and after with their intervals, and the answers, unless the run's privacy profile keeps texts
    out."""
    before, after = results.get("before") or {}, results.get("after") or {}
    rows = []
    for name, (label, sense) in FIGURES.items():
        if not any(isinstance(x.get(name), (int, float)) for x in (before, after)):
            continue

        def shown(figures: dict[str, Any], name: str = name) -> str | Markup:
            value = figures.get(name)
            if not isinstance(value, (int, float)):
                return "not measured"
            interval = (figures.get("ci") or {}).get(name)
            if isinstance(interval, list) and len(interval) == 2 and all(isinstance(x, (int, float)) for x in interval):
                return Markup("{:.4g} <span class=soft>[{:.4g}, {:.4g}]</span>").format(value, *interval)
            return f"{value:.4g}"

        heading = Markup("{} <span class=soft>({})</span>").format(label, sense)
        change = (results.get("change") or {}).get(name)
        difference = _difference(change if isinstance(change, dict) else {})
        rows.append([heading, shown(before), shown(after), *difference])
    if not rows:
        return Markup("<p>Nothing was evaluated yet.</p>")
    count = after.get("rows") or before.get("rows")
    head = ["metric", "before", "after", "95 % of the difference", "certain?"]
    figures = table(f"Held-out figures with 95 % bootstrap intervals over {count} rows", head, rows)
    return _samples(record, before, after) + figures


def _difference(change: dict[str, Any]) -> tuple[str, str]:
    """The interval of a difference, and whether it leaves out zero."""
    ci = change.get("ci")
    if not isinstance(ci, list) or len(ci) != 2 or not all(isinstance(x, (int, float)) for x in ci):
        return "", ""
    return f"{ci[0]:+.3g} to {ci[1]:+.3g}", certainty(change)


def _samples(record: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> Markup:
    """Questions of held-out rows with the answers before and after."""
    if record.get("run", {}).get("privacy_profile", "open") != "open":
        return Markup("<p>Sample answers are withheld: the run's privacy profile keeps texts out of reports.</p>")
    content = Markup()
    earlier = {s.get("prompt"): s.get("answer") for s in before.get("samples") or []}
    for sample in after.get("samples") or []:
        pairs = [("prompt", sample.get("prompt")), ("expected", sample.get("expected"))]
        if sample.get("prompt") in earlier:
            pairs.append(("answer before training", earlier[sample["prompt"]]))
        pairs.append(("answer after training", sample.get("answer")))
        inner = Markup().join(Markup("<dt>{}</dt><dd>{}</dd>").format(k, v) for k, v in pairs if v is not None)
        content += Markup('<dl class="sample">{}</dl>').format(inner)
    return content


def _compute(record: dict[str, Any]) -> Markup:
    totals, energy = record.get("compute", {}).get("totals", {}), record.get("energy", {})
    if not totals:
        return Markup("<p>No step is finished yet.</p>")
    rows: list[list[Any]] = [
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
        ["how FLOP are counted", totals["flop_method"]],
    ]
    check = totals.get("cross_check")
    if check:
        flag = Markup(" <span class=missing>more than 30 % apart</span>") if check["more_than_30_pct"] else ""
        text = Markup("{formula} gives {flop:.4g}: {difference_pct:+.1f} %{flag}; {why_it_may_differ}")
        rows.append(["cross-check", text.format(**check, flag=flag)])
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
    verdict = Markup("<h3>One-third test</h3><p>{}</p>").format(show(law)) if law else ""
    return table("Compute and energy of all attempts", ["quantity", "value"], rows) + verdict


def _sourced(factor: Any) -> Markup:
    """A site's factor with its unit and source: ``{"value" or "g_per_kwh", "source"}``."""
    if not isinstance(factor, dict) or "source" not in factor:
        return show(factor)
    value, unit = factor.get("value"), ""
    if "g_per_kwh" in factor:
        value, unit = factor["g_per_kwh"], " g CO2e per kWh"
    text, unit = (show(value), "") if is_missing(value) else (str(value), unit)
    return Markup("{}{} ({})").format(text, unit, factor["source"])


def _attempts(record: dict[str, Any]) -> Markup:
    attempts = record.get("compute", {}).get("attempts", {})
    if not attempts:
        return Markup()
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
                Markup('<span class="state {0}">{0}</span>').format(a["state"]),
                a["started"].replace("T", " ").rstrip("Z"),
                duration(a["wall_s"]),
                f"{a['first_step']:,} to {a['last_step']:,}",
                cause or "none",
            ]
        )
    incidents = [[f"{int(step):,}", i["action"], i["why"]] for step, i in sorted(record.get("incidents", {}).items())]
    guarded = table("Batches that the guard left out", ["step", "action", "why"], incidents) if incidents else ""
    return (
        Markup(timeline(bars))
        + guarded
        + table("Attempts and why they ended", ["attempt", "state", "started (UTC)", "time", "steps", "cause"], rows)
    )


def _data(record: dict[str, Any]) -> Markup:
    data = record.get("data", [])
    rows = [
        [
            d["name"],
            d["role"],
            show(d.get("rows")),
            show(d.get("tokens")),
            brief(d["licence"]),
            brief(d["origin"]),
            brief(d["personal_data"]),
            Markup("<code>{}</code>").format(str(d.get("sha256"))[:16]),
        ]
        for d in data
    ]
    if not rows:
        return Markup()
    content = table(
        "Sources",
        ["source", "role", "rows", "tokens", "licence", "origin", "personal data", "SHA-256"],
        rows,
        right=(2, 3),
    )
    sets = record.get("data_sets", {})
    facts = [[k.replace("_", " "), show(v)] for k, v in sets.items() if k != "digests"]
    return content + table("What became of them", ["stage", "result"], facts)


def _choices(record: dict[str, Any]) -> Markup:
    choices = record.get("hparams", {}).get("choices", [])
    rows = [[c["what"], c["choice"], str(c["why"]) or "default"] for c in choices]
    settings = [
        [k.replace("_", " "), show(v)]
        for k, v in record.get("hparams", {}).items()
        if k != "choices" and v not in (None, {}, [])
    ]
    content = table("Chosen at start", ["what", "choice", "why"], rows) if rows else ""
    return content + _folded("All hyperparameters", table("Hyperparameters", ["setting", "value"], settings))


def _folded(summary: str, content: Markup) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, content)


def _evidence(run: RunFolder, record: dict[str, Any]) -> Markup:
    folder = run.path / "evidence"
    owed = missing_places(record)
    content = Markup()
    if folder.is_dir() or record.get("artefact", {}).get("tree_sha256"):
        content += Markup('<p>The documents lie in <a href="evidence/README.md">evidence/</a>.</p>')
    rows = [[Markup("<code>{}</code>").format(place), who] for place, who in owed]
    if rows:
        entries = table("Missing entries", ["place in the record", "who must supply it"], rows)
        content += _folded(f"{len(rows)} entries that only people can supply", entries)
    return content
