"""A resolved profile: plain values, the provenance of each beside them, and what others ask of it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

from pydantic import PrivateAttr

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.sites.catalogue import shared_sources
from aifactory_train.sites.paths import covering, dig, fact_leaves, leaves, stated_paths
from aifactory_train.sites.schema import (
    CORE_FACTS,
    Fact,
    FactEntry,
    Filesystem,
    Partition,
    Profile,
    Qos,
    Source,
    UserValues,
)


class System(Profile):
    """A resolved profile: plain values (``system.gpu.memory_gib``), provenance beside them
    (``system.provenance(path)``).
    """

    user: UserValues = UserValues()
    readiness: str = "documented"
    readiness_evidence: str | None = None

    _table: dict[str, FactEntry] = PrivateAttr(default_factory=dict)
    _gpu_table: dict[str, FactEntry] = PrivateAttr(default_factory=dict)
    _gpu_sources: dict[str, Source] = PrivateAttr(default_factory=dict)
    _own_gpu: frozenset[str] = PrivateAttr(default_factory=frozenset)

    # provenance

    def attach(
        self,
        table: dict[str, FactEntry],
        gpu_table: dict[str, FactEntry],
        gpu_sources: dict[str, Source],
        own_gpu: frozenset[str],
    ) -> System:
        """Lay provenance beside the values; returns the system itself.

        table: entries of ``facts:`` by path; gpu_table, gpu_sources: the catalogue's for this GPU; own_gpu: keys of
        ``gpu`` that the profile states itself.
        """
        self._table, self._gpu_table, self._gpu_sources, self._own_gpu = table, gpu_table, gpu_sources, own_gpu
        return self

    @property
    def own_gpu(self) -> frozenset[str]:
        """Keys of ``gpu`` that the profile states itself; the others are the catalogue's."""
        return self._own_gpu

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
        without: list[str | None] = [None]
        limits = [
            self.limits(name, qos)["max_nodes"]
            for name, part in self.partitions.items()
            if part.state != "down"
            for qos in (part.qos or without)
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

    def limits(self, partition: str, qos: str | None = None, gpus_per_node: int | None = None) -> dict[str, int | None]:
        """The tighter of partition and QoS: max_time (s), default_time, min_nodes, max_nodes, max_gpus,
        max_running_jobs.

        A limit on GPUs is one on nodes too, of which a job takes ``gpus_per_node`` each (default: all).
        """
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
        taken = gpus_per_node or self.node.gpus
        if out["max_gpus"] is not None and taken:
            by_gpus = max(1, out["max_gpus"] // taken)
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
