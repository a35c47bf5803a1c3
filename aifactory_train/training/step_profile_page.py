"""The page that says in words where a step's time goes, from what each rank recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.files import read_json, write_atomic

if TYPE_CHECKING:
    from aifactory_train.run.folder import RunFolder

LARGEST = 3


def write_page(folder: Path, run: RunFolder, ranks: int) -> Path:
    """``profile.md`` in ``folder``, from ``rank-N.json`` of the ``ranks`` that wrote one; rank 0 did."""
    tables = {n: read_json(folder / f"rank-{n}.json") for n in range(ranks) if (folder / f"rank-{n}.json").is_file()}
    main = tables[0]
    lines = [f"# Where a step of {run.path.name} goes", "", *_step(main, ranks), ""]
    lines += ["| phase | seconds | share |", "|---|---|---|"]
    lines += [f"| {name} | {s:.4f} | {_share(s, main)} |" for name, s in main["phases"].items()]
    total = sum(main["phases"].values())
    lines += ["", f"The phases add up to {total:.4f} s, {_share(total, main)} of the step.", ""]
    lines += [f"## The {LARGEST} largest items", "", *_largest(main), ""]
    if main["between"]:
        rest = ", ".join(f"{name} {seconds:.4f} s" for name, seconds in main["between"].items())
        lines += [f"Between steps, a step: {rest}.", ""]
    if ranks > 1:
        lines += _ranks(tables, ranks)
    lines += _plan(run, main)
    lines += ["## Files", "", *_files(folder), ""]
    page = folder / "profile.md"
    write_atomic(page, "\n".join(lines))
    return page


def _share(seconds: float, table: dict[str, Any]) -> str:
    return f"{100 * seconds / table['seconds']:.1f} %"


def _step(main: dict[str, Any], ranks: int) -> list[str]:
    steps = main["last"] - main["first"] + 1
    what = f"Step {main['last']}" if steps == 1 else f"Steps {main['first']} to {main['last']}"
    text = f"{what}, {ranks} rank{'s' if ranks > 1 else ''}, rank 0 on {main['device']}: a step took "
    text += f"{main['seconds']:.4f} s."
    if main["plain_seconds"]:
        text += f" Other steps, which were not recorded, took {main['plain_seconds']:.4f} s (their median)."
    name, seconds = max(main["phases"].items(), key=lambda item: item[1])
    return [text, "", f"Most of it, {_share(seconds, main)}, is **{name}**."]


def _largest(main: dict[str, Any]) -> list[str]:
    lines = []
    for number, item in enumerate(main["items"][:LARGEST], 1):
        calls = f", {item['calls']:.0f} calls" if item["calls"] else ""
        text = f"{number}. {_code(item['operator'])} in {item['phase']}: {item['seconds']:.4f} s, "
        lines.append(text + f"{_share(item['seconds'], main)} of the step{calls}; {_floor(item, main)}.")
    return lines


def _code(operator: str) -> str:
    return operator if " " in operator else f"`{operator}`"


def _floor(item: dict[str, Any], main: dict[str, Any]) -> str:
    """How long it takes at least, where that is known."""
    rate = main["product_flops"]
    if not item["flop"] or not rate:
        return "its floor is not known (torch counts no operations of it)"
    floor = item["flop"] / rate
    return (
        f"its floor is {floor:.4f} s ({item['flop'] / 1e9:.2f} GFLOP at the {rate / 1e9:.0f} GFLOP/s of one large "
        f"product on this rank)"
    )


def _ranks(tables: dict[int, dict[str, Any]], ranks: int) -> list[str]:
    slowest = max(tables.values(), key=lambda table: table["busy"])
    quickest = min(tables.values(), key=lambda table: table["busy"])
    more = 100 * (slowest["busy"] / quickest["busy"] - 1) if quickest["busy"] else 0.0
    lines = [
        "## Ranks",
        "",
        f"Slowest: rank {slowest['rank']} on {slowest['host']}, whose operators took {slowest['busy']:.4f} s a step, "
        f"{more:.0f} % more than those of rank {quickest['rank']} (collectives left out, in which the others wait).",
        "",
        "| rank | host | own operators | " + " | ".join(tables[0]["phases"]) + " |",
        "|---" * (3 + len(tables[0]["phases"])) + "|",
    ]
    for number, table in tables.items():
        cells = " | ".join(f"{seconds:.4f}" for seconds in table["phases"].values())
        lines.append(f"| {number} | {table['host']} | {table['busy']:.4f} | {cells} |")
    missing = [str(n) for n in range(ranks) if n not in tables]
    if missing:
        lines += ["", f"Nothing was written by rank {', '.join(missing)}."]
    return [*lines, ""]


def _plan(run: RunFolder, main: dict[str, Any]) -> list[str]:
    """What the run's plan says of a step, where there is one."""
    file = run.path / "plan.json"
    plan = read_json(file) if file.is_file() else None
    if not isinstance(plan, dict) or "step_seconds" not in plan:
        return []
    planned: dict[str, float] = plan["step_seconds"]
    parts = ", ".join(f"{name} {seconds:.4f} s" for name, seconds in planned.items() if name != "total" and seconds)
    ratio = main["seconds"] / planned["total"]
    text = f"The plan says {planned['total']:.4f} s a step ({parts}); this is {ratio:.2f} times as much."
    return ["## Beside the plan", "", text, ""]


def _files(folder: Path) -> list[str]:
    said = {"trace": "open it at ui.perfetto.dev or chrome://tracing", "memory": "open it at pytorch.org/memory_viz"}
    lines = []
    for file in sorted(folder.glob("*-rank-*")):
        kind = file.name.partition("-")[0]
        lines.append(f"* `{file.name}`: {said.get(kind, kind)}")
    return [*lines, "* `rank-N.json`: the figures of this page, and all larger operators, by rank"]
