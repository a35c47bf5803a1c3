"""The ranking as a table for people, and what to do next."""

from __future__ import annotations

import shlex
from typing import Any

from aifactory_train.core.output import plain_table


def show(answer: dict[str, Any]) -> None:
    """Print the ranking."""
    rows = answer["sites"]
    fits = [row for row in rows if row["fits"]]
    print(f"{answer['recipe']}: {answer['base']}, for {asked(answer['asked'])}")
    print(f"size: {answer['size']['source']}\n")
    if fits:
        plain_table(
            ["#", "site", "in", "nodes x GPUs", "hours", "GPU-h", "billed there", "kWh", "CO2 kg", "internet", "tried",
             "routes open to you"],
            [line(row) for row in fits],
        )  # fmt: skip
        print(
            "\n? = not published. Hours and kWh are modelled; 'aifactory where … --json' has the source of each figure."
        )
    else:
        print("No site fits.")
    _remarks(fits)
    _left_out([row for row in rows if not row["fits"]])
    if fits:
        print("\nnext")
        print(f"  {plan_command(answer, fits[0])}")
        through = fits[0]["access"][0]["through"]
        print(f"  aifactory sites {through}".ljust(48) + "how to apply, and whom to ask")


def asked(wishes: dict[str, Any]) -> str:
    """What the user said, in words."""
    who = "an SME" if wishes["sme"] else "anyone"
    said = [who + (f" in {wishes['country']}" if wishes["country"] else "")]
    if wishes["deadline_hours"]:
        said.append(f"within {wishes['deadline_hours']:g} h")
    if wishes["budget_gpu_hours"]:
        said.append(f"at most {wishes['budget_gpu_hours']:g} GPU-hours")
    if wishes["sensitive"]:
        said.append("sensitive data")
    return ", ".join(said)


def line(row: dict[str, Any]) -> list[str]:
    """A site that fits as the cells of its line."""
    billed, how = row["billed"], row["near"]
    return [
        str(row["rank"]),
        row["id"],
        row["country"] + {"country": "*", "share": "*", "linked": "+"}.get(how["how"] if how else "", ""),
        f"{row['nodes']} x {row['gpus_per_node']}",
        number(row["hours"]),
        number(row["gpu_hours"]),
        f"{number(billed['amount'])} {billed['unit']}" if billed else "?",
        number(row["kwh"]),
        number(row["co2_kg"]),
        row["internet"] or "?",
        row["readiness"],
        ", ".join(route["id"] + ("?" if route["status"] == "ask" else "") for route in row["access"]),
    ]


def number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _remarks(fits: list[dict[str, Any]]) -> None:
    near = {row["near"]["how"] for row in fits if row["near"]}
    if near & {"country", "share"}:
        print("* your country's, or one that it has a share of")
    if "linked" in near:
        print("+ of a factory that your country's antenna is linked to")
    if any(route["status"] == "ask" for row in fits for route in row["access"]):
        print("route? = whether applicants from your country are taken is not known: ask")
    for row in fits:
        print(f"  {row['rank']:>2} {row['id']}: {row['why']}")


def _left_out(rows: list[dict[str, Any]]) -> None:
    """Sites by the reason for which they are left out."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row["why"], []).append(row["id"])
    if by_reason:
        print("\nleft out")
    for why, names in by_reason.items():
        print(f"  {', '.join(names)}: {why}")


def plan_command(answer: dict[str, Any], row: dict[str, Any]) -> str:
    """The command that plans the same there."""
    words = ["aifactory", "plan", answer["recipe"], "--site", row["id"], "--nodes", str(row["nodes"])]
    words += ["--gpus-per-node", str(row["gpus_per_node"])]
    words += ["--tokens", f"{answer['tokens']:g}"] if answer["tokens"] else []
    for setting in answer["settings"]:
        words += ["--set", setting]
    return shlex.join(words)
