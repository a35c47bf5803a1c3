"""Writing a new profile: read off a login node where Slurm answers, asked of a person for the rest.

Nothing is guessed. What neither the machine nor the person knows is left out and listed under ``missing``.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.sites import probe
from aifactory_train.sites.catalogue import gpu_catalogue
from aifactory_train.sites.fields import compact_time, parse_duration
from aifactory_train.sites.resolving import resolve
from aifactory_train.sites.schedulers import SCHEDULERS

Ask = Callable[[str], str]


def _plain(text: str) -> str:
    if not text.strip():
        raise ValueError("an answer is needed")
    return text.strip()


def _optional(text: str) -> str | None:
    return text.strip() or None


def _whole(text: str) -> int | None:
    if not text.strip():
        return None
    if not re.fullmatch(r"[1-9]\d*", text.strip()):
        raise ValueError(f"'{text.strip()}' is not a whole number above 0")
    return int(text)


def _time(text: str) -> str | None:
    if text.strip():
        parse_duration(text.strip())
    return text.strip() or None


def _sku(text: str) -> str | None:
    name = text.strip()
    if name and name not in gpu_catalogue():
        raise ValueError(
            f"'{name}' is not in the catalogue{did_you_mean(name, gpu_catalogue())}: {', '.join(gpu_catalogue())}"
        )
    return name or None


def _choice(*words: str) -> Callable[[str], str | None]:
    def read(text: str) -> str | None:
        word = text.strip().lower()
        if word and word not in words:
            raise ValueError(f"'{word}' is not one of {', '.join(words)}")
        return word or None

    return read


def _country(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z]{2}", text.strip()):
        raise ValueError("two letters, such as FI")
    return text.strip().upper()


def _name(text: str) -> str | None:
    if text.strip() and not re.fullmatch(r"[A-Za-z0-9_.+-]+", text.strip()):
        raise ValueError(f"'{text.strip()}' is not a partition's name")
    return text.strip() or None


#: How GPUs are asked for -> the kind of scheduler that takes this form; no two take the same one.
KIND_OF = {form: kind for kind, known in SCHEDULERS.items() for form in known.gpu_requests if form != "none"}

#: The interview: key, question, reader. An empty answer means unknown wherever the reader allows it.
QUESTIONS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("name", "Name of the system, as people say it", _plain),
    ("operator", "Who operates it", _plain),
    ("country", "Country (two letters)", _country),
    ("docs", "Address of its documentation (empty: none)", _optional),
    ("maintainer", "Who looks after this profile (a name or team)", _plain),
    ("source", "What do your answers rest on (title of a page, or 'first-hand')", _plain),
    ("sku", "GPU ('?' lists the known ones; empty: not among them)", _sku),
    ("partition", "Partition for GPU jobs (empty: none is named)", _name),
    ("max_time", "Longest job there, such as 48h or 2d (empty: unknown)", _time),
    ("max_nodes", "Most nodes per job (empty: unknown)", _whole),
    ("gpus", "GPUs per node, as the scheduler counts them (empty: unknown)", _whole),
    ("cores", "Cores per node (empty: unknown)", _whole),
    ("memory", "Memory per node in GiB (empty: unknown)", _whole),
    ("isa", "CPU of the GPU nodes: x86_64 or aarch64 (empty: unknown)", _choice("x86_64", "aarch64")),
    ("account", "Account: required, optional or none (empty: unknown)", _choice("required", "optional", "none")),
    ("request", f"GPUs are asked for with: {', '.join(KIND_OF)} (empty: {next(iter(KIND_OF))})", _choice(*KIND_OF)),
    (
        "internet",
        "Internet on compute nodes: full, nat, proxy or none (empty: unknown)",
        _choice("full", "nat", "proxy", "none"),
    ),
)


def interview(ask: Ask, say: Callable[[str], None], known: dict[str, Any]) -> dict[str, Any]:
    """Ask every question that ``known`` does not answer; a bad answer is explained and asked again (three times at
    most).
    """
    answers = dict(known)
    for key, question, read in QUESTIONS:
        if key in known:
            continue
        if key == "sku" and known.get("gres_type"):
            say(
                f"Slurm calls these GPUs '{known['gres_type']}'; the catalogue has "
                f"{', '.join(suggested(known['gres_type']))}"
            )
        for attempt in range(3):
            text = ask(f"{question}: ")
            if key == "sku" and text.strip() == "?":
                say(", ".join(gpu_catalogue()))
                text = ask(f"{question}: ")
            try:
                answers[key] = read(text)
                break
            except ValueError as error:
                if attempt == 2:
                    raise UserError(
                        f"{question}: {error}", where="sites new", fix="start again; answers are not kept"
                    ) from None
                say(str(error))
    return answers


def suggested(gres_type: str) -> list[str]:
    """GPUs of the catalogue that a type of Slurm's may mean (``a100`` is several: their memory is not in the name)."""
    word = re.sub(r"[^a-z0-9]", "", gres_type.lower())
    alike = [sku for sku in gpu_catalogue() if re.sub(r"[^a-z0-9]", "", sku).startswith(word)]
    return alike or [sku for sku in gpu_catalogue() if word.startswith(sku.split("-")[0])] or ["none of that name"]


def bootstrap(seen: probe.Observation, partition: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """(answers that Slurm gives, one remark for each) for the GPU partition with most nodes, or the one named."""
    candidates: dict[str, int] = {}
    for group in seen.groups:
        if group.gpus:
            candidates[group.partition] = candidates.get(group.partition, 0) + group.nodes
    if not candidates:
        return {}, ["no node with GPUs is visible in sinfo: everything is asked"]
    if partition is not None and partition not in candidates:
        raise UserError(
            f"no GPU partition '{partition}' here{did_you_mean(partition, candidates)}",
            where="--partition",
            fix=f"one of {', '.join(candidates)}",
        )
    # The most nodes, then the longest limit.
    longest = {g.partition: g.max_time or 0 for g in seen.groups}
    chosen = partition or max(candidates, key=lambda p: (candidates[p], longest.get(p, 0)))
    record = probe.node_record(seen.groups, chosen)
    facts = probe.partition_facts(chosen, seen.groups, seen.partitions.get(chosen, {}))
    facts |= probe.facts_of([g for g in seen.groups if g.partition == chosen], record)
    value = {path.replace(f"partitions.{chosen}.", ""): v for path, (v, _) in facts.items()}
    answers: dict[str, Any] = {"partition": chosen, "gpus": value.get("node.gpus"), "cores": value.get("node.cores")}
    answers["max_nodes"] = value.get("max_nodes")
    answers["nodes"] = value.get("nodes")
    if value.get("max_time"):
        answers["max_time"] = compact_time(value["max_time"])
    if value.get("node.memory_usable_gib"):
        answers["memory_usable"] = value["node.memory_usable_gib"]
        answers["memory"] = None
    if value.get("node.isa"):
        answers["isa"] = value["node.isa"]
    answers["request"] = "gres" if value.get("request.gres_type") else "gpus-per-node"
    answers["gres_type"] = value.get("request.gres_type")
    others = {p: probe.partition_facts(p, seen.groups, seen.partitions.get(p, {})) for p in candidates if p != chosen}
    answers["others"] = {p: _limits({k.rsplit(".", 1)[1]: v for k, (v, _) in f.items()}) for p, f in others.items()}
    facts |= {k: v for f in others.values() for k, v in f.items()}
    for key, path, rule in (
        ("account", "access.account", probe.account_rule(seen)),
        ("memory_rule", "request.memory", probe.memory_rule(seen, chosen)),
    ):
        if rule is not None:
            answers[key] = rule[0]
            facts[path] = rule
    answers["min_nodes"] = value.get("min_nodes")
    answers["version"] = seen.version
    answers["cluster"] = seen.cluster
    kept = {k: v for k, v in answers.items() if v is not None or k in ("memory", "max_nodes")}
    return kept, [f"{path} = {v} ({evidence})" for path, (v, evidence) in facts.items()]


def _limits(values: dict[str, Any]) -> dict[str, Any]:
    """A partition's entry in a profile, from what was read of it."""
    part = {k: values[k] for k in ("max_time", "min_nodes", "max_nodes", "nodes") if values.get(k)}
    return part | ({"max_time": compact_time(part["max_time"])} if "max_time" in part else {})


def compose(system_id: str, answers: dict[str, Any], probed: set[str]) -> dict[str, Any]:
    """The raw profile from the answers; ``probed`` names the answers that the machine gave."""
    today = datetime.date.today()
    get = answers.get
    raw: dict[str, Any] = {
        "schema": 1,
        "id": system_id,
        "name": answers["name"],
        "status": "usable",
        "operator": answers["operator"],
        "country": answers["country"],
    }
    if get("docs"):
        raw["docs"] = answers["docs"]
    raw["maintainer"] = answers["maintainer"]
    raw["expires"] = today + datetime.timedelta(days=183)
    raw["missing"] = []
    reported: list[str] = []
    read: list[str] = []

    def put(section: str, key: str, value: Any, answer: str) -> None:
        if value is None:
            return
        raw.setdefault(section, {})[key] = value
        (read if answer in probed else reported).append(f"{section}.{key}")

    if get("cluster"):
        raw["detect"] = {"cluster_names": [answers["cluster"]]}
        read.append("detect.cluster_names")
    request = get("request") or next(iter(KIND_OF))
    put("scheduler", "kind", KIND_OF[request], "partition")
    put("scheduler", "version", get("version"), "version")
    put("access", "account", get("account"), "account")
    raw.setdefault("access", {})["example"] = {}
    if get("account") == "required":
        raw["access"]["example"]["account"] = "project00"
    name = get("partition")
    if name:
        raw["access"]["example"]["partition"] = name
        part = {k: get(k) for k in ("max_time", "min_nodes", "max_nodes", "nodes") if get(k) is not None}
        raw["partitions"] = {name: part} | (get("others") or {})
        read += [f"partitions.{other}.{key}" for other, limits in (get("others") or {}).items() for key in limits]
        raw["default_partition"] = name
        for key in part:
            (read if key in probed else reported).append(f"partitions.{name}.{key}")
        (read if "partition" in probed else reported).append("default_partition")
    put("request", "gpus", request, "request")
    put("request", "gres_type", get("gres_type"), "gres_type")
    put("request", "memory", get("memory_rule"), "memory_rule")
    if get("memory_rule") == "mem":
        usable = get("memory_usable") or get("memory")
        put(
            "request",
            "memory_gib",
            int(usable) if usable else None,
            "memory_usable" if get("memory_usable") else "memory",
        )
    put("node", "gpus", get("gpus"), "gpus")
    put("node", "cores", get("cores"), "cores")
    put("node", "memory_gib", get("memory"), "memory")
    put("node", "memory_usable_gib", get("memory_usable"), "memory_usable")
    put("node", "isa", get("isa"), "isa")
    put("gpu", "sku", get("sku"), "sku")
    put("internet", "compute", get("internet"), "internet")
    raw["sources"] = {}
    raw["facts"] = []
    if reported:
        raw["sources"]["told"] = {"title": answers["source"], "date": today.isoformat()}
        confidence = "documented-user" if answers["source"].lower() == "first-hand" else "documented"
        raw["facts"].append({"at": reported, "source": "told", "confidence": confidence})
    if read:
        raw["sources"]["probe"] = {
            "title": "aifactory sites new, read from Slurm on a login node",
            "date": today.isoformat(),
        }
        raw["facts"].append({"at": read, "source": "probe", "confidence": "probed"})
    raw["missing"] = resolve(raw).core_missing()
    return raw


def render(raw: dict[str, Any]) -> str:
    """The profile as YAML, in the order of the schema, with a blank line between sections."""
    lines: list[str] = []
    for key, value in raw.items():
        block = isinstance(value, (dict, list)) and bool(value) and key != "missing"
        style = None if key == "missing" else False
        text = yaml_text.dump({key: value}, width=100, default_flow_style=style)
        lines.append(("\n" if block else "") + text)
    return "".join(lines)


def check_id(system_id: str) -> str:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", system_id):
        raise UserError(
            f"'{system_id}' cannot be an id",
            where="sites new",
            fix="lower-case words joined by hyphens, such as my-cluster",
        )
    return system_id


def write(raw: dict[str, Any], path: Path) -> None:
    """Write the profile; an existing file is refused, never replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as out:
            out.write(render(raw))
    except FileExistsError:
        raise UserError(
            "the file exists", where=str(path), fix="choose another id or --out, or edit the file"
        ) from None
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path), fix="--out FILE") from None
