"""Reading profiles: YAML → validated, resolved :class:`System` with the provenance of each fact beside it.

Resolution, in this order: the profile's file; constants of its GPU from ``gpus.yaml`` (what the profile states itself wins);
corrections and values of the user's overlay. Nothing is guessed: what no layer states stays ``None``.
"""

from __future__ import annotations

import copy
import datetime
import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import PrivateAttr, ValidationError

from aifactory_train.errors import UserError, did_you_mean
from aifactory_train.sites.schema import (
    CORE_FACTS,
    FACT_SECTIONS,
    Fact,
    FactEntry,
    Filesystem,
    Overlay,
    Partition,
    Profile,
    Qos,
    Source,
    UserValues,
)

ROOM = Path(__file__).resolve().parent
SYSTEMS = ROOM / "systems"
FACTORIES = ROOM / "factories.yaml"
GPUS = ROOM / "gpus.yaml"
READINESS = ROOM / "readiness.yaml"
SOURCES = ROOM / "sources.yaml"

# -- YAML with line numbers ----------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, refusing a key that is written twice (plain YAML keeps the last one silently)."""

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is written twice (first in line {seen[key]})", key_node.start_mark
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> Any:
    """The file's content; a missing file, bad YAML or a doubled key is refused with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot be read: {reason}", where=str(path)) from None
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader subclass: plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"not valid YAML: {problem}", where=where) from None


def line_of(path: Path, keys: tuple[Any, ...]) -> int | None:
    """The line where the value under ``keys`` (names and list indices) begins, or its nearest parent's."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, yaml.YAMLError):
        return None
    line = None
    for key in keys:
        child = None
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(key):
                    child, line = value_node, key_node.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            child = node.value[key]
            line = child.start_mark.line + 1
        if child is None:
            break
        node = child
    return line


def _where(path: Path | None, keys: tuple[Any, ...], label: str = "profile") -> str:
    dotted = ".".join(str(k) for k in keys)
    if path is None:
        return f"{label}: {dotted}" if dotted else label
    line = line_of(path, keys)
    return f"{path}:{line}: {dotted}" if line else f"{path}: {dotted}"


def refusal(error: ValidationError, model: type, path: Path | None, label: str = "profile") -> UserError:
    """The first fault of a pydantic error as a message with file, line, key and fix (how many more is said)."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    keys = tuple(k for k in fault["loc"] if not (isinstance(k, str) and k.startswith("function-")))
    fix = None
    what = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, keys[:-1])
        what = f"unknown key '{keys[-1]}'{did_you_mean(str(keys[-1]), known)}"
        fix = f"known keys here: {', '.join(sorted(known))}" if known else None
    elif fault["type"] == "missing":
        what, fix = f"the key '{keys[-1]}' is missing", "add it; docs/add-a-site.md explains each key"
        keys = keys[:-1] or keys
    elif keys and keys[-1] == "arch":
        what = f"'{fault.get('input')}' is not an architecture name"
        fix = "NVIDIA: sm_80, sm_90, sm_100; AMD: gfx90a, gfx942"
    elif fault["type"] == "literal_error":
        expected = fault["ctx"]["expected"]
        what = f"'{fault['input']}' is not one of {expected}"
    if len(faults) > 1:
        what += f" (and {len(faults) - 1} more)"
    return UserError(what, where=_where(path, keys, label), fix=fix)


def _known_keys(model: Any, keys: tuple[Any, ...]) -> list[str]:
    """Field names of the model that ``keys`` lead to (through optional, dict and list annotations)."""
    from pydantic import BaseModel

    def models(annotation: Any) -> list[Any]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [m for a in getattr(annotation, "__args__", ()) for m in models(a)]

    current = model
    for key in keys:
        field = current.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            continue  # an index, or the free key of a dict: the model is already the value's
        found = models(field.annotation)
        if not found:
            return []
        current = found[0]
    return [f.alias or name for name, f in current.model_fields.items()]


# -- paths into a profile --------------------------------------------------------------------------------------------------


def leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every stated leaf; a list of plain values is one leaf, ``None`` is none."""
    if isinstance(data, dict):
        if not data and prefix:
            return
        for key, value in data.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list) and any(isinstance(v, dict) for v in data):
        for i, value in enumerate(data):
            yield from leaves(value, f"{prefix}.{i}")
    elif data is not None and data != []:
        yield prefix, data


def fact_leaves(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of a raw profile that state facts (made-up example values are none)."""
    for section in FACT_SECTIONS:
        if section in raw:
            for path, value in leaves(raw[section], section):
                if not path.startswith("access.example"):
                    yield path, value


_MISSING = object()


def dig(data: Any, path: str) -> Any:
    """The value under a dotted path in nested dicts, lists and models; raises KeyError where the path leads nowhere.

    Keys that hold dots themselves (a node label such as ``nvidia.com/gpu.product``) are found too.
    """
    value = _dig(data, path.split("."))
    if value is _MISSING:
        raise KeyError(path)
    return value


def _dig(data: Any, keys: list[str]) -> Any:
    if not keys:
        return data
    if isinstance(data, dict):
        for n in range(1, len(keys) + 1):
            key = ".".join(keys[:n])
            if key in data and (value := _dig(data[key], keys[n:])) is not _MISSING:
                return value
        return _MISSING
    if isinstance(data, list):
        return _dig(data[int(keys[0])], keys[1:]) if keys[0].isdigit() and int(keys[0]) < len(data) else _MISSING
    value = getattr(data, keys[0], _MISSING)
    return value if value is _MISSING else _dig(value, keys[1:])


def stated_paths(data: Any, spec: str) -> Iterator[str]:
    """The paths that ``spec`` names (alternatives after ``|``, ``*`` = any key) and that hold a value in ``data``."""
    for alternative in spec.split("|"):
        yield from _stated_paths(data, alternative.split("."), "")


def _stated_paths(data: Any, keys: list[str], prefix: str) -> Iterator[str]:
    if not keys:
        if data not in (None, [], {}, ""):
            yield prefix
        return
    if keys[0] == "*":
        children = list(data) if isinstance(data, dict) else []
    else:
        children = [keys[0]]
    for child in children:
        try:
            value = dig(data, child)
        except (KeyError, TypeError, ValueError):
            continue
        yield from _stated_paths(value, keys[1:], f"{prefix}.{child}" if prefix else child)


def covering(path: str, table: dict[str, FactEntry]) -> FactEntry | None:
    """The entry of ``facts:`` that covers ``path``: the longest listed path that is it or a parent of it."""
    while path:
        if path in table:
            return table[path]
        path = path.rpartition(".")[0]
    return None


# -- shared sources and the GPU catalogue -------------------------------------------------------------------------------------------------------


def _shaped(path: Path, read: Callable[[], Any]) -> Any:
    """``read()``; a data file of another shape than its head describes is refused instead of crashing."""
    try:
        return read()
    except (ValidationError, TypeError, KeyError, AttributeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"not of the shape that its first lines describe: {first}", where=str(path)) from None


@functools.lru_cache(maxsize=1)
def shared_sources() -> dict[str, Source]:
    """``sources.yaml``: what every profile may name without defining it."""
    own = {"user": Source(title="the user's overlay", date="n.d.", retrieved="2026-11-22")}
    return own | _shaped(SOURCES, lambda: {name: Source(**entry) for name, entry in read_yaml(SOURCES).items()})


@functools.lru_cache(maxsize=1)
def gpu_catalogue() -> dict[str, dict[str, Any]]:
    """``gpus.yaml``: SKU → constants; a SKU with ``like`` inherits from another."""
    return _shaped(GPUS, lambda: merge_catalogue(read_yaml(GPUS)))


def merge_catalogue(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The ``gpus:`` table with every ``like`` resolved (a parent stands above its heirs)."""
    skus: dict[str, dict[str, Any]] = {}
    for sku, entry in raw["gpus"].items():
        entry = dict(entry)
        parent = entry.pop("like", None)
        if parent is not None and parent not in skus:
            raise UserError(f"'{sku}' is like '{parent}', which is not above it", where=f"{GPUS.name}: gpus.{sku}")
        merged = copy.deepcopy(skus[parent]) if parent else {}
        merged.update(entry)
        skus[sku] = merged
    return skus


@functools.lru_cache(maxsize=1)
def _gpu_provenance() -> tuple[dict[str, Source], dict[str, dict[str, FactEntry]]]:
    return _shaped(GPUS, _read_gpu_provenance)


def _read_gpu_provenance() -> tuple[dict[str, Source], dict[str, dict[str, FactEntry]]]:
    raw = read_yaml(GPUS)
    sources = {k: Source(**v) for k, v in raw["sources"].items()}
    tables: dict[str, dict[str, FactEntry]] = {sku: {} for sku in raw["gpus"]}
    default = FactEntry(at=["gpu"], source=raw["default"]["source"], confidence=raw["default"]["confidence"])
    for table in tables.values():
        table["gpu"] = default
        for field in ("arch", "vendor", "warp_size", "fp8_format", "model", "unified_memory", "device_names"):
            table[f"gpu.{field}"] = FactEntry(at=[f"gpu.{field}"], source=default.source, confidence="certain")
    for item in raw["facts"]:
        entry = FactEntry(**item)
        for path in entry.at:
            sku, _, field = path.partition(".")
            tables[sku][f"gpu.{field}" if field else "gpu"] = entry
    return sources, tables


# -- the resolved system -------------------------------------------------------------------------------------------------------


class System(Profile):
    """A resolved profile: plain values (``system.gpu.memory_gib``), provenance beside them (``system.provenance(path)``)."""

    user: UserValues = UserValues()
    readiness: str = "documented"
    readiness_evidence: str | None = None

    _table: dict[str, FactEntry] = PrivateAttr(default_factory=dict)
    _gpu_table: dict[str, FactEntry] = PrivateAttr(default_factory=dict)
    _gpu_sources: dict[str, Source] = PrivateAttr(default_factory=dict)
    _own_gpu: frozenset[str] = PrivateAttr(default_factory=frozenset)

    # provenance

    def provenance(self, path: str) -> Fact | None:
        """The fact at a dotted path, such as ``gpu.memory_gib`` or ``partitions.standard-g.max_time``.

        ``None`` where the value is not stated. Raises UserError where the path leads nowhere in the schema.
        """
        try:
            value = dig(self, path)
        except KeyError:
            known = [p for p, _ in leaves(self.model_dump(by_alias=True))]
            raise UserError(f"{self.id} has no fact '{path}'{did_you_mean(path, known)}", where=path) from None
        if value is None or value == [] or value == {}:
            return None
        key = path.removeprefix("gpu.") if path.startswith("gpu.") else None
        entry, sources = covering(path, self._table), {**shared_sources(), **self.sources}
        if key is not None and key.split(".")[0] not in self._own_gpu:
            entry, sources = covering(path, self._gpu_table), self._gpu_sources
        if entry is None or entry.source not in sources:
            return None
        source = sources[entry.source]
        return Fact(
            path=path,
            value=value.model_dump() if hasattr(value, "model_dump") else value,
            source_id=entry.source,
            source=source.title,
            url=source.url,
            date=source.date,
            retrieved=source.retrieved,
            confidence=entry.confidence,
            note=entry.note,
        )

    def stated_facts(self) -> Iterator[Fact]:
        """Every stated leaf with its provenance, in the order of the schema."""
        data = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for path, _ in fact_leaves(data):
            fact = self.provenance(path)
            if fact is not None:
                yield fact

    # what others ask for

    @property
    def usable(self) -> bool:
        return self.status == "usable"

    @property
    def expired(self) -> bool:
        """Whether the day has passed on which the profile's sources had to be read again."""
        return self.expires < datetime.date.today()

    @property
    def offline(self) -> bool:
        """Whether jobs must run offline: true unless outbound connections from compute nodes are published to work."""
        return self.internet.compute not in ("full", "nat", "proxy")

    @property
    def gpus_per_node(self) -> int | None:
        """As the scheduler counts them."""
        return self.node.gpus

    @property
    def node_gb_s(self) -> float | None:
        """Injection bandwidth of a node over all NICs, GB/s in one direction."""
        net = self.interconnect
        gbit = net.node_gbit_s or (net.nics_per_node * net.nic_gbit_s if net.nics_per_node and net.nic_gbit_s else None)
        return gbit / 8 if gbit else None

    @property
    def gpu_network_gb_s(self) -> float | None:
        """One GPU's share of the node's injection bandwidth, GB/s in one direction."""
        return self.node_gb_s / self.node.gpus if self.node_gb_s and self.node.gpus else None

    @property
    def max_nodes(self) -> int | None:
        """The largest job that any partition with its QoS admits; ``None`` where no limit is published."""
        limits = [
            self.limits(name, qos)["max_nodes"]
            for name, part in self.partitions.items()
            for qos in (part.qos or [None])
        ]
        known = [n for n in limits if n is not None]
        return max(known) if known else self.node.count

    @property
    def complete(self) -> bool:
        return not self.core_missing()

    def core_missing(self) -> list[str]:
        """Names of the core facts that are not stated, or only remembered."""
        return [name for name, spec in CORE_FACTS.items() if not self._known(spec)]

    def _known(self, spec: str) -> bool:
        for path in stated_paths(self, spec):
            fact = self.provenance(path) if path != "partitions" else None
            if path == "partitions" or (fact is not None and fact.confidence not in ("recalled", "project")):
                return True
            if path == "gpu.arch" and fact is not None:
                return True  # follows from the GPU model
        return False

    def partition(self, name: str) -> Partition:
        """The partition of that name; refuses an unknown one with the known names."""
        if name not in self.partitions:
            known = list(self.partitions)
            raise UserError(
                f"{self.id} has no partition '{name}'{did_you_mean(name, known)}",
                where="partition",
                fix=f"partitions of {self.id}: {', '.join(known)}" if known else "none is published; see its notes",
            )
        return self.partitions[name]

    def filesystem(self, role: str) -> Filesystem | None:
        """The first file system of a role, or None."""
        return next((f for f in self.filesystems if f.role == role), None)

    def qos_of(self, partition: str, qos: str | None = None) -> tuple[str | None, Qos | None]:
        """(name, limits) of the QoS that goes with a partition: the one named, else its default, else none."""
        part = self.partition(partition)
        if part.qos_equals_partition and qos in (None, partition):
            return partition, self.qos.get(partition)
        name = qos or (part.qos[0] if part.qos else None)
        if name is None:
            return None, None
        if name not in self.qos and self.qos and self.access.qos != "project":
            raise UserError(
                f"{self.id} has no QoS '{name}'{did_you_mean(name, self.qos)}",
                where="qos",
                fix=f"QoS of {self.id}: {', '.join(self.qos)}",
            )
        if part.qos and name in self.qos and name not in part.qos:
            raise UserError(
                f"QoS '{name}' does not go with partition '{partition}' of {self.id}",
                where="qos",
                fix=f"QoS of that partition: {', '.join(part.qos)}",
            )
        return name, self.qos.get(name)

    def limits(self, partition: str, qos: str | None = None) -> dict[str, int | None]:
        """The tighter of partition and QoS: max_time (s), default_time, min_nodes, max_nodes, max_gpus, max_running_jobs."""
        part = self.partition(partition)
        _, q = self.qos_of(partition, qos)

        def tighter(field: str, pick) -> int | None:
            values = [v for v in (getattr(part, field, None), getattr(q, field, None) if q else None) if v is not None]
            return pick(values) if values else None

        out = {f: tighter(f, min) for f in ("max_time", "max_nodes", "max_gpus", "max_running_jobs")}
        out["min_nodes"] = tighter("min_nodes", max)
        out["default_time"] = part.default_time
        if out["max_nodes"] is None and part.nodes:
            out["max_nodes"] = part.nodes
        if out["max_gpus"] is not None and self.node.gpus:
            by_gpus = max(1, out["max_gpus"] // self.node.gpus)
            out["max_nodes"] = min(out["max_nodes"], by_gpus) if out["max_nodes"] else by_gpus
        return out

    def as_dict(self) -> dict[str, Any]:
        """The resolved profile as plain JSON data; ``provenance`` maps each stated path to its source."""
        out = self.model_dump(mode="json", by_alias=True, exclude={"facts", "sources"})
        out["complete"] = self.complete
        out["core_missing"] = self.core_missing()
        out["offline"] = self.offline
        out["provenance"] = {
            fact.path: {
                k: v for k, v in fact.model_dump().items() if k not in ("path", "value", "source_id") and v is not None
            }
            for fact in self.stated_facts()
        }
        return out


# -- loading ---------------------------------------------------------------------------------------------------------------------


def config_dir() -> Path:
    """Where users keep overlays and private profiles: ``$AIFACTORY_CONFIG`` or ``$XDG_CONFIG_HOME/aifactory``."""
    own = os.environ.get("AIFACTORY_CONFIG")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "aifactory"


def _user_file(name: str) -> Path | None:
    path = config_dir() / "sites" / f"{name}.yaml"
    return path if path.is_file() else None


@functools.lru_cache(maxsize=1)
def shipped() -> tuple[str, ...]:
    """Ids of the profiles in ``systems/``, usable or not."""
    return tuple(sorted(p.stem for p in SYSTEMS.glob("*.yaml")))


def resolve(raw: Any, path: Path | None = None, overlay: Overlay | None = None) -> System:
    """A raw profile (parsed YAML) → :class:`System`. ``path`` is only for messages.

    An overlay's correction of ``null`` removes the key (a partition that does not exist there).
    """
    if not isinstance(raw, dict):
        raise UserError("a profile is a mapping of keys to values", where=str(path or "profile"))
    for key in raw:
        if key not in _PROFILE_KEYS:
            close = did_you_mean(str(key), _PROFILE_KEYS)
            raise UserError(f"unknown key '{key}'{close}", where=_where(path, (key,)))
    raw = copy.deepcopy(raw)
    if overlay is not None:
        for dotted, value in overlay.corrections.items():
            _correct(raw, dotted, value)
        raw["user"] = overlay.user
    gpu = raw.get("gpu") or {}
    own_gpu = frozenset(gpu) if isinstance(gpu, dict) else frozenset()
    sku = gpu.get("sku") if isinstance(gpu, dict) else None
    gpu_table: dict[str, FactEntry] = {}
    gpu_sources: dict[str, Source] = {}
    if sku is not None:
        catalogue = gpu_catalogue()
        if not isinstance(sku, str) or sku not in catalogue:
            raise UserError(
                f"unknown GPU '{sku}'{did_you_mean(str(sku), catalogue)}",
                where=_where(path, ("gpu", "sku")),
                fix=f"one of {', '.join(catalogue)}; a new one goes into sites/gpus.yaml",
            )
        raw["gpu"] = {**copy.deepcopy(catalogue[sku]), **gpu}
        sources, tables = _gpu_provenance()
        gpu_table, gpu_sources = tables[sku], sources
    try:
        system = System.model_validate(raw)
    except ValidationError as error:
        raise refusal(error, Profile, path) from None
    table = {p: entry for entry in system.facts for p in entry.at}
    for dotted, value in overlay.corrections.items() if overlay is not None else ():
        if value is not None:
            table[dotted] = FactEntry(at=[dotted], source="user", confidence="user")
    system._table, system._gpu_table, system._gpu_sources = table, gpu_table, gpu_sources
    system._own_gpu = own_gpu
    return system


_PROFILE_KEYS = frozenset(f.alias or n for n, f in Profile.model_fields.items())


def _correct(raw: dict[str, Any], dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    if keys[0] not in FACT_SECTIONS:
        raise UserError(
            f"'{dotted}' is not a fact of a system{did_you_mean(keys[0], FACT_SECTIONS)}",
            where=f"corrections: {dotted}",
        )
    target: Any = raw
    while len(keys) > 1:
        if isinstance(target, list):
            if not keys[0].isdigit() or int(keys[0]) >= len(target):
                raise UserError(f"'{dotted}' leads nowhere in the profile", where=f"corrections: {dotted}")
            target, keys = target[int(keys[0])], keys[1:]
        else:
            # A key with dots in it (gpu.a100) is taken whole where the profile has it.
            whole = next((n for n in range(len(keys), 0, -1) if ".".join(keys[:n]) in target), 1)
            if whole == len(keys):
                keys = [".".join(keys)]
                break
            key, keys = ".".join(keys[:whole]), keys[whole:]
            target = target.setdefault(key, {})
        if not isinstance(target, (dict, list)):
            raise UserError(f"'{dotted}' leads into a plain value", where=f"corrections: {dotted}")
    if isinstance(target, list):
        raise UserError(f"'{dotted}' names a list entry; correct a key inside it", where=f"corrections: {dotted}")
    if value is None:
        target.pop(keys[-1], None)
    else:
        target[keys[-1]] = value


def read_overlay(source: Path | str | dict[str, Any], system_id: str | None = None) -> Overlay:
    """An overlay from a file or a dict; a wrong key is refused with the nearest right one."""
    path = None if isinstance(source, dict) else Path(source)
    data = source if isinstance(source, dict) else read_yaml(Path(source))
    if not isinstance(data, dict):
        raise UserError("an overlay is a mapping of keys to values", where=str(path or "overlay"))
    if system_id is not None and isinstance(source, dict):
        data = {"overlay_for": system_id, **data}
    try:
        overlay = Overlay.model_validate(data)
    except ValidationError as error:
        raise refusal(error, Overlay, path, "overlay") from None
    if system_id is not None and overlay.overlay_for != system_id:
        raise UserError(
            f"this overlay is for '{overlay.overlay_for}', not for '{system_id}'",
            where=_where(path, ("overlay_for",), "overlay"),
            fix=f"--site {overlay.overlay_for}, or change overlay_for",
        )
    return overlay


def load(name: str, overlay: Path | str | dict[str, Any] | bool | None = None) -> System:
    """The resolved system called ``name``.

    name:     an id or alias (``lumi-g``), ``local`` (detected now), ``generic-slurm``, or the path of a profile's YAML file.
              A profile of that name in ``~/.config/aifactory/sites/`` is found too; a shipped one wins.
    overlay:  a file or dict with the user's values (a file may also hold a whole profile of that name); ``None`` uses ``~/.config/aifactory/sites/<id>.yaml`` where it exists;
              ``False`` uses none.

    Raises UserError for an unknown name (with the nearest system, factory, host or country), for a factory's or antenna's
    name (with its systems), and for a wrong key in profile or overlay (with file and line).
    """
    path: Path | None
    if isinstance(overlay, (str, Path)) and _is_profile(Path(overlay)):
        own = str(read_yaml(Path(overlay)).get("id"))
        if own != name:
            raise UserError(f"this profile is of '{own}', not of '{name}'", where=str(overlay), fix=f"--site {own}")
        return load(str(Path(overlay).resolve()))
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name)
        raw = read_yaml(path)
        if isinstance(raw, dict) and "overlay_for" in raw:
            if overlay is not None:
                raise UserError("an overlay was given where a system is needed", where=name)
            return load(str(raw["overlay_for"]), overlay=path)
    elif name == "local":
        from aifactory_train.sites.detection import detect

        system = detect()
        path, raw = None, system
    else:
        path = find_file(name)
        raw = read_yaml(path)
    if isinstance(raw, System):
        found = _overlay_for("local", overlay)
        return raw if found is None else raw.model_copy(update={"user": found.user})
    system_id = str(raw.get("id", name)) if isinstance(raw, dict) else name
    system = resolve(raw, path, _overlay_for(system_id, overlay))
    level, evidence = readiness_of(system)
    return _with_readiness(system, level, evidence)


def _is_profile(path: Path) -> bool:
    """Whether the file holds a profile rather than an overlay."""
    raw = read_yaml(path)
    return isinstance(raw, dict) and "schema" in raw and "overlay_for" not in raw


def _with_readiness(system: System, level: str, evidence: str | None) -> System:
    copy_ = system.model_copy(update={"readiness": level, "readiness_evidence": evidence})
    for private in ("_table", "_gpu_table", "_gpu_sources", "_own_gpu"):
        setattr(copy_, private, getattr(system, private))
    return copy_


def _overlay_for(system_id: str, overlay: Path | str | dict[str, Any] | bool | None) -> Overlay | None:
    if overlay is False:
        return None
    if isinstance(overlay, (str, Path, dict)):
        return read_overlay(overlay, system_id)
    found = _user_file(system_id)
    if found is None:
        return None
    raw = read_yaml(found)
    if isinstance(raw, dict) and "overlay_for" not in raw and "schema" in raw:
        return None  # a private profile of that name, not an overlay
    return read_overlay(found, system_id)


@functools.lru_cache(maxsize=1)
def _readiness_table() -> dict[str, dict[str, Any]]:
    return (read_yaml(READINESS) or {}).get("systems", {}) if READINESS.is_file() else {}


def readiness_of(system: Profile) -> tuple[str, str | None]:
    """(level, evidence) from ``readiness.yaml``; without an entry a usable profile is *documented*, others *announced*."""
    entry = _readiness_table().get(system.id)
    if entry:
        return entry["level"], f"{entry['evidence']} ({entry['date']})"
    return ("documented" if system.status != "announced" else "announced"), None


def find_file(name: str) -> Path:
    """The file of a system id or alias; refuses others with what is near."""
    if name in shipped():
        return SYSTEMS / f"{name}.yaml"
    private = _user_file(name)
    if private is not None:
        raw = read_yaml(private)
        if isinstance(raw, dict) and "schema" in raw:
            return private
    index = _index()
    for system in index["systems"]:
        if name.lower() in (system["id"], system["name"].lower(), *[a.lower() for a in system["aliases"]]):
            return SYSTEMS / f"{system['id']}.yaml"
    member = find_member(name, index)
    if member is not None:
        raise no_system(member, name)
    here = members_at(name, index)
    operated = [s["id"] for s in index["systems"] if s["operator"].lower() == name.lower() and s["status"] == "usable"]
    if here or operated:
        systems = list(dict.fromkeys([s for m in here for s in m["systems"]] + operated))
        if not systems:
            raise no_system(here[0], name)
        kind = (
            "a country"
            if any(name.lower() in (m["country"].lower(), m["country_name"].lower()) for m in here)
            else "a host"
        )
        raise UserError(
            f"'{name}' is {kind}, not a system", where="--site", fix=f"one of its systems: {', '.join(systems)}"
        )
    raise UserError(
        f"unknown site '{name}'{_nearest(name, index)}",
        where="--site",
        fix="'aifactory sites' lists all 32 with their systems",
    )


def _nearest(name: str, index: dict[str, Any]) -> str:
    """Did-you-mean over systems, factories, hosts and countries, saying which kind was meant."""
    words: dict[str, str] = {}
    for s in index["systems"]:
        for word in (s["id"], s["name"], *s["aliases"]):
            words.setdefault(word.lower(), s["id"])
        words.setdefault(s["operator"].lower(), f"{s['operator']}' (host of {s['id']})")
    for m in index["members"]:
        for word in (m["id"], m["name"]):
            words.setdefault(word.lower(), m["id"])
        words.setdefault(m["host"].lower(), f"{m['host']}' (host of {m['id']})")
        words.setdefault(m["country_name"].lower(), f"{m['country_name']}' (country of {m['id']})")
    close = difflib.get_close_matches(name.lower(), words, n=1, cutoff=0.6)
    if not close:
        return ""
    target = words[close[0]]
    return f" (did you mean '{target})" if "' (" in target else f" (did you mean '{target}'?)"


def find_member(name: str, index: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The factory or antenna of that id or name, or None."""
    index = index or _index()
    key = re.sub(r"[^a-z0-9]+", "", name.lower())
    for member in index["members"]:
        if key in (re.sub(r"[^a-z0-9]+", "", member["id"]), re.sub(r"[^a-z0-9]+", "", member["name"].lower())):
            return member
    return None


def members_at(name: str, index: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The members whose host or country (name or two letters) that is."""
    index = index or _index()
    key = name.lower()
    return [m for m in index["members"] if key in (m["host"].lower(), m["country"].lower(), m["country_name"].lower())]


def no_system(member: dict[str, Any], name: str) -> UserError:
    """The refusal for a member's name where a system is needed: its own systems, else its linked ones."""
    if member["systems"]:
        return UserError(
            f"'{name}' is an {member['kind']}, not a system"
            if member["kind"] == "antenna"
            else f"'{name}' is a factory, not a system",
            where="--site",
            fix=f"one of its systems: {', '.join(member['systems'])}",
        )
    linked = member.get("linked_systems") or []
    fix = (
        f"its linked factories run {', '.join(linked)}" if linked else "ask its contact point; nothing is invented here"
    )
    return UserError(
        f"{member['name']} has no system that can be used today: {member['reason']}", where="--site", fix=fix
    )


def _index() -> dict[str, Any]:
    from aifactory_train.sites.index import load_index

    return load_index()
