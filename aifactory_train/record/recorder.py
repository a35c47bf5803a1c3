"""The recorder: what the loop says (:mod:`aifactory_train.record.events`), written down as it happens.

Rank 0 writes the record; the first rank of every node measures that node's energy. No call can end a training: an error
of the recorder is printed once, kept in the record, and the training goes on. No call takes part in a collective.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.files import write_atomic
from aifactory_train.core.missing import is_missing, missing
from aifactory_train.model import flops
from aifactory_train.private import redact
from aifactory_train.record import aiact, collect
from aifactory_train.record.chain import Chain, fold, now, plain, read_events
from aifactory_train.record.devices import peak_memory
from aifactory_train.record.digests import describe, files_below, tree_digest
from aifactory_train.record.events import (
    Evaluated,
    Event,
    Exported,
    Incident,
    RunEnded,
    RunStarted,
    StepDone,
    VerdictReached,
)
from aifactory_train.record.files import (
    DATA_MANIFEST,
    EVENTS,
    RECORD,
    exported_values,
    load_record,
    without_samples,
    write_record,
)
from aifactory_train.record.totals import totals
from aifactory_train.run.folder import RunFolder
from aifactory_train.sources.model_folder import weight_files

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import Shares
    from aifactory_train.parallel.world import World

#: Seconds between two progress events: what a kill can lose.
PROGRESS_S = 60.0


def node_file_every_s(ranks: int) -> float:
    """Seconds between two writings of a node's energy file: with many ranks seldom, for the file system's sake."""
    return 0.0 if ranks < 64 else 120.0


def _never_breaks(method: Callable) -> Callable:
    """An error inside is said once on standard error and kept for the record."""

    @functools.wraps(method)
    def guarded(self: Recorder, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.failed(method.__name__, error)
            return None

    return guarded


def _content_of(key: str, section: Any) -> Any:
    """What a section of the record says about the content of an input; the rest (licence, facts) may be filled in
    later.
    """
    if key == "data":
        return [entry.get("sha256") for entry in section]
    if key == "tokenizer":
        return section.get("tokenizer_sha256"), section.get("template_sha256")
    return section.get("digests")


class Recorder:
    """Writes the record of one attempt. It hears the events of every rank; off rank 0 it only measures energy."""

    def __init__(
        self,
        run: RunFolder,
        world: World,
        recipe: Recipe,
        attempt: int | None = None,
        write_pack: Callable[[RunFolder], Any] | None = None,
    ):
        self.run, self.world, self.recipe = run, world, recipe
        self.chain = Chain(run.path / EVENTS)
        self.private = recipe.privacy.profile != "open"
        self._named_attempt = attempt
        self._write_pack = write_pack  # after a finished run: report and evidence pack
        self.attempt = "001"
        self._errors: dict[str, str] = {}
        self._meter: Any = None
        self._site: dict[str, Any] = {"site": None}
        self._count: Callable[..., flops.Work] | None = None
        self._work = flops.Work(0.0, 0.0, 0.0, 0.0)
        self._sums = {"steps": 0, "tokens": 0, "positions": 0, "supervised_tokens": 0, "train_s": 0.0}
        self._first = self._last = 0
        self._lengths: Any = None
        self._ending = False
        self._reading: threading.Thread | None = None
        self._readings: list[dict[str, Any]] = []
        self._supervised: Any = None
        self._began, self._started = time.monotonic(), now()
        self._reported = self._began
        self._active = False
        self._nodes = 1
        self._digesting: threading.Thread | None = None
        self._begun_from: str | None = None  # digest of the base model's files when the run began
        self._earlier = 0.0
        self._step_cost = 0.0

    # ---- what it hears

    def hear(self, event: Event) -> None:
        """Write down what the loop says; a listener of the run's event bus, on every rank."""
        if isinstance(event, StepDone):
            self.step(event.metrics, event.documents, event.shares, event.lengths, event.made)
        elif isinstance(event, RunStarted):
            self.start(event)
        elif isinstance(event, Evaluated):
            self.evaluated(event.when, event.figures, event.step)
        elif isinstance(event, VerdictReached):
            self.judged(event.verdict)
        elif isinstance(event, Incident):
            self.incident(event.action, event.step, event.why, event.documents)
        elif isinstance(event, Exported):
            self.exported(event.result)
        elif isinstance(event, RunEnded):
            self.end(event.state, event.reason)

    # ---- start

    def start(self, event: RunStarted) -> None:
        """All ranks: the first one of every node starts its meter; rank 0 writes the first event of this attempt."""
        self.attempt = self._attempt_number() or "001"
        self._nodes = len({host for host, _ in event.devices})
        self._first = self._last = event.step
        self._start_meter(event.devices)
        if self.world.is_main:
            self._write_start(event)

    @_never_breaks
    def _attempt_number(self) -> str:
        """The given number, else one more than the record knows."""
        if self._named_attempt is not None:
            return f"{self._named_attempt:03d}"
        known = self._known().get("compute", {}).get("attempts", {})
        return f"{max((int(n) for n in known), default=0) + 1:03d}"

    @_never_breaks
    def _start_meter(self, devices: Sequence[tuple[str, dict[str, Any]]]) -> None:
        if not self.recipe.record.energy or self.world.local_rank != 0:
            return  # one reader per node
        from aifactory_train.energy import MeteredDevice, NodeMeter, find_readers

        here = [d for host, d in devices if host == self.world.host and d.get("kind") == "gpu"]
        found, why = find_readers([MeteredDevice(d.get("uuid"), d.get("pci"), d["model"]) for d in here])
        path = self.run.attempt_dir(int(self.attempt)) / f"energy-{self.world.host}.json"
        self._meter = NodeMeter(path, found, why, devices=len(here), write_every_s=node_file_every_s(self.world.size))
        self._meter.start()

    @_never_breaks
    def _write_start(self, event: RunStarted) -> None:
        from aifactory_train.sources import resolve_model

        recipe, report, data, resumed_at = self.recipe, event.report, event.data, event.step
        config = event.model_config
        before = self._known()
        values: dict[str, Any] = {}
        if "run" not in before:
            values["run"] = collect.run_section(recipe, self.run.path, private=self.private)
            values["people"] = collect.people_section()
            values["eval"] = {}
            values["artefact"] = {"files": missing("not exported yet")}
            values["deployment"] = {}
        elif before["run"].get("config_sha256") != collect.config_digest(recipe):
            values["run/config_sha256"] = collect.config_digest(recipe)
            values[f"run/config_changes/{self.attempt}"] = {"from": before["run"].get("config_sha256"), "at": now()}
        for number, old in before.get("compute", {}).get("attempts", {}).items():
            if old.get("state") == "running":
                values[f"compute/attempts/{number}/state"] = "killed"
                values[f"compute/attempts/{number}/cause"] = (
                    "no end was recorded: the processes were killed or the node failed"
                )
        values["base"] = collect.base_section(recipe, config, report.parameters, report.trainable)
        if resumed_at and isinstance(before.get("base", {}).get("files"), list):
            # What the run was begun from stays in the record: the digests of this attempt are compared, not laid over
            # it.
            values["base"] |= {key: before["base"][key] for key in ("files", "tree_sha256") if key in before["base"]}
            self._begun_from = before["base"].get("tree_sha256")
        values["method"] = collect.method_section(recipe, report.parameters, report.trainable)
        values["hparams"] = collect.hparams_section(
            recipe,
            world_size=self.world.size,
            engine=event.engine,
            precision=event.precision,
            total_steps=event.total_steps,
            choices=report.lines,
        )
        values["privacy"] = event.protection or {"profile": recipe.privacy.profile}
        found: dict[str, Any] = {
            "data": collect.data_sections(recipe, data.report),
            "data_sets": collect.sets_section(data.report),
            "tokenizer": {k: v for k, v in data.tokenizer_info.items() if not isinstance(v, (list, tuple))},
        }
        if resumed_at:
            found = self._as_begun(before, found, values)
        values |= found
        sections = values["data"]
        manifest = self.run.path / DATA_MANIFEST
        write_atomic(
            manifest,
            json.dumps(plain({"data": sections, "sets": values["data_sets"]}), ensure_ascii=False, indent=1) + "\n",
        )
        values["data_manifest"] = describe([manifest], self.run.path)[0]
        kinds = [d for _, d in event.devices]
        values["compute/device"] = {
            "model": kinds[0].get("model"),
            "kind": kinds[0].get("kind"),
            "vendor": kinds[0].get("vendor"),
            "runtime": kinds[0].get("runtime"),
            "count": len(kinds),
            "nodes": self._nodes,
            "note": "a GPU is what the scheduler and the framework count: on MI250X one GCD, half a package",
        }
        self._active = True
        self._lengths, self._supervised = data.train.lengths, data.train.supervised
        try:
            self._count = self._counter(config)
            values["deployment/inference"] = self._inference(config)
        except Exception as error:  # a configuration that transformers itself cannot build anew
            self.failed("counting FLOPs", error)
            unknown = missing("run: the architecture's FLOPs are not counted")
            values["deployment/inference"] = {"flop": unknown, "method": missing("run")}
        self._load_site()
        self._earlier, values["lineage"] = self._lineage()
        values[f"compute/attempts/{self.attempt}"] = self._attempt("running", resumed_at)
        self.chain.append("attempt-started", values, f"attempt {self.attempt}, from step {resumed_at}")
        self._fill_from_organisation()
        write_record(self.run.path)
        if self.private:
            self._digest_rows(data)
        self._digesting = threading.Thread(
            target=self._digest_base, args=(resolve_model(recipe.model),), daemon=True, name="digests"
        )
        self._digesting.start()

    def _as_begun(self, before: dict[str, Any], found: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """The inputs as the first attempt recorded them; where this attempt's differ, they are recorded beside."""
        kept = {}
        for key, now_found in found.items():
            was = before.get(key)
            differs = was is not None and _content_of(key, plain(was)) != _content_of(key, plain(now_found))
            kept[key] = was if differs else now_found
            if differs:
                values[f"run/input_changes/{self.attempt}/{key}"] = now_found
        return kept

    def _known(self) -> dict[str, Any]:
        events, _ = read_events(self.run.path / EVENTS)
        return fold(events) if events else {}

    def _counter(self, config: dict[str, Any]) -> Callable[..., flops.Work]:
        """What counts a step's FLOPs: the formulae where they cover the architecture, else the products of its
        modules."""
        adapter = self.recipe.adapter
        trained = flops.Trained(
            rank=0 if adapter.kind == "none" else adapter.rank,
            targets=adapter.targets,
            embeddings=adapter.train_embeddings,
            recompute=self.recipe.parallel.activation_checkpointing,
        )
        return functools.partial(flops.count, self._products(config, trained), trained=trained)

    def _products(self, config: dict[str, Any], trained: flops.Trained) -> flops.ModelProducts:
        from aifactory_train.core.errors import UserError
        from aifactory_train.model import hybrid_shapes, shapes

        try:
            shape = shapes.from_config(config, self.recipe.model.base)
            return flops.of_shape(hybrid_shapes.adapted_as(shape, self.recipe), trained)
        except UserError:
            from aifactory_train.record import products

            return products.of_config(config, trained)

    def _inference(self, config: dict[str, Any]) -> dict[str, Any]:
        """Analytic FLOP of generating 100,000 tokens in answers of 1,000 tokens with a key-value cache."""
        tokens, answer = 100_000, 1000
        one = flops.forward_of(self._products(config, flops.Trained()), answer)
        return {
            "flop": tokens * one,
            "method": f"analytic: {tokens:,} tokens generated in answers of {answer:,} tokens from an empty prompt, "
            f"key-value cache, one "
            "sequence at a time, adapters merged; matrix products only; independent of hardware",
        }

    @_never_breaks
    def _load_site(self) -> None:
        from aifactory_train.energy import site_factors

        self._site = site_factors(collect.site_name(self.recipe, self.run.path))

    def _lineage(self) -> tuple[float, dict[str, Any]]:
        """Model FLOP of the runs that this one started from, by their records."""
        start = self.recipe.model.start_from
        if not start:
            return 0.0, {"start_from": None, "flop_model": 0.0}
        try:
            earlier = load_record(Path(start))
        except Exception as error:
            return 0.0, {
                "start_from": start,
                "flop_model": missing(f"record of the earlier run: {type(error).__name__}"),
            }
        flop = earlier.get("aiact", {}).get("modification_flop_lineage", 0.0)
        return float(flop), {
            "start_from": start,
            "run": earlier.get("run", {}).get("id"),
            "head_sha256": earlier["log"]["head_sha256"],
            "flop_model": flop,
        }

    @_never_breaks
    def _fill_from_organisation(self) -> None:
        from aifactory_train.record.fill import organisation_values

        values, path = organisation_values(self.recipe.record.organisation)
        if values:
            self.chain.append("filled", {f"people/{k}": v for k, v in values.items()}, f"from {path.name}")

    @_never_breaks
    def _digest_rows(self, data: Any) -> None:
        """Salted digests of the training rows, for the question whether a text was among them."""
        from aifactory_train.private.rows import FILE, write_digests

        train = data.train
        count = write_digests(self.run.path / FILE, (train.row(i) for i in range(len(train))))
        self.chain.append("rows-digested", {"privacy/row_digests": {"file": FILE, "digests": count}})

    def _digest_base(self, folder: Path | None) -> None:
        """Beside the training: digests of the base model's files and of the container image."""
        try:
            values: dict[str, Any] = {}
            if folder is not None:
                wanted = (".safetensors", ".json", ".model", ".jinja", ".txt", ".gguf")
                below = {*files_below(folder, lambda p: p.suffix in wanted), *weight_files(folder)}
                files = describe(below, folder, remembered=True)
                digest = tree_digest(files)
                if self._begun_from is None:
                    values |= {"base/files": files, "base/tree_sha256": digest}
                elif self._begun_from != digest:
                    values[f"run/input_changes/{self.attempt}/base"] = {"files": files, "tree_sha256": digest}
            image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
            if image and Path(image).is_file():
                values["run/container/sha256"] = describe([Path(image)], Path(image).parent)[0]["sha256"]
            self.chain.append("base-digested", values)
        except Exception as error:
            self.failed("digests of the base model", error)

    # ---- while it trains

    def step(
        self, record: dict[str, Any], documents: Any, shares: Shares, lengths: Any = None, made: Any = None
    ) -> None:
        """After each optimizer step: its metrics, its documents, how they were shared out (rank, micro-batch), and
        their tokens where they are at hand. ``made``: those of documents that are not the data set's."""
        if not self._active:
            return
        began = time.perf_counter()
        whole = self._lengths if made is None else made
        self._step(record, shares, self._lengths[documents] if lengths is None else lengths, whole)
        self._step_cost += time.perf_counter() - began

    @_never_breaks
    def _step(self, record: dict[str, Any], shares: Shares, lengths: Any, whole: Any) -> None:
        segments = None
        if self.recipe.data.batching == "padded":
            segments = shares.longest(whole)
        self._last = int(record["step"])
        sums = self._sums
        sums["steps"] += 1
        sums["tokens"] += int(record["tokens"])
        sums["positions"] += int(segments.sum()) if segments is not None else int(record["tokens"])
        sums["supervised_tokens"] += int(record["supervised_tokens"])
        sums["train_s"] += float(record["seconds"])
        if self._count is not None:
            self._work = self._work + self._count(lengths, int(record["supervised_tokens"]), segments=segments)
        if time.monotonic() - self._reported >= PROGRESS_S:
            self.progress()

    @_never_breaks
    def progress(self, state: str = "running", cause: str | None = None, kind: str = "progress") -> None:
        """Write down the sums so far."""
        if not self._active:
            return
        self._reported = time.monotonic()
        before = self._known()
        mine = self._attempt(state, self._first, cause)
        attempts = {**before.get("compute", {}).get("attempts", {}), self.attempt: mine}
        values: dict[str, Any] = {
            f"compute/attempts/{self.attempt}": mine,
            "compute/totals": totals(attempts, self.recipe, before),
        }
        values["aiact"] = aiact.verdict(
            aiact.base_of(self.recipe.model.base, self.recipe.record.base_flop),
            values["compute/totals"]["flop_model"],
            self._earlier,
        )
        if self._count is None:
            values["aiact"] = {
                "reasoning": missing("provider: this architecture's FLOPs are not counted"),
                "provider_flag": None,
            }
        values["energy"] = self._energy(attempts)
        if self.private:
            from aifactory_train.private import egress

            values[f"privacy/refused_connections/{self.attempt}"] = egress.blocked - egress.blocked_by_test
        self.chain.append(kind, values, cause or "")
        write_record(self.run.path)

    def _attempt(self, state: str, first: int, cause: str | None = None) -> dict[str, Any]:
        wall = time.monotonic() - self._began
        return {
            "state": state,
            "cause": cause,
            "updated": now(),
            "started": self._started,
            "first_step": first,
            "last_step": self._last,
            "ranks": self.world.size,
            "nodes": self._nodes,
            "job": (collect.scheduler()["job_ids"] or [None])[0],
            "wall_s": round(wall, 3),
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in self._sums.items()},
            "device_hours": wall * self.world.size / 3600,
            "flop_model": self._work.model,
            "flop_model_full_attention": self._work.model_full_attention,
            "flop_executed": self._work.executed,
            "flop_counted": self._count is not None,
            "peak_memory_bytes": peak_memory(self.world.device),
            "recorder_s": round(self._step_cost, 4),
            "errors": dict(self._errors),
        }

    def _energy(self, attempts: dict[str, Any]) -> dict[str, Any]:
        from aifactory_train.energy import summarise

        nodes = self._node_readings([self.run.attempt_dir(int(number)) for number in sorted(attempts)])
        gpu = self.world.device != "cpu"
        return summarise(
            nodes,
            node_seconds=sum(a["wall_s"] * a["nodes"] for a in attempts.values()),
            pue=self._site.get("pue"),
            grid=self._site.get("grid"),
            tdp_w=self._site.get("tdp_w") if gpu else None,
            device_seconds=sum(a["wall_s"] * a["ranks"] for a in attempts.values()) if gpu else 0.0,
            site=self._site.get("site"),
        )

    def _node_readings(self, folders: list[Path]) -> list[dict[str, Any]]:
        """What the meters of all nodes wrote. While it trains, no step waits for a file a node: a thread reads them for
        the next report."""
        from aifactory_train.energy import read_nodes

        if self._ending or self._nodes <= 8:
            return read_nodes(folders)
        if self._reading is None or not self._reading.is_alive():

            def read() -> None:
                self._readings = read_nodes(folders)

            self._reading = threading.Thread(target=read, name="energy-files", daemon=True)
            self._reading.start()
        return self._readings

    @_never_breaks
    def evaluated(self, when: str, figures: dict[str, Any], step: int) -> None:
        """Held-out figures (``before``, ``after`` or ``during``); answers of rows are left out of the record."""
        if not self._active:
            return
        place = f"eval/{when}" if when != "during" else f"eval/during/{step:09d}"
        self.chain.append("evaluated", {place: {"step": step, **without_samples(figures)}}, when)

    @_never_breaks
    def judged(self, verdict: dict[str, Any]) -> None:
        """What the figures come to; the next command stays out, for it names a path of this machine."""
        if self._active:
            kept = {name: value for name, value in verdict.items() if name != "next"}
            self.chain.append("judged", {"verdict": kept}, str(verdict["word"]))

    @_never_breaks
    def incident(self, action: str, step: int, why: str, documents: Any) -> None:
        """The guard left a batch out or rolled back: what was computed for it counts all the same."""
        if self._active:
            if self._count is not None:
                supervised = int(self._supervised[documents].sum())
                self._work = self._work + self._count(self._lengths[documents], supervised)
            values = {"attempt": self.attempt, "action": action, "why": why, "at": now()}
            self.chain.append("incident", {f"incidents/{step:09d}": values}, action)

    @_never_breaks
    def exported(self, result: dict[str, Any] | None) -> None:
        """Digests of everything below ``export/``, with the verdict of the logits gate."""
        if not self._active or result is None:
            return
        self.chain.append("exported", exported_values(self.run.path, self.recipe, result))

    # ---- end

    def end(self, state: str, cause: str | None = None) -> None:
        """All ranks: stop the meter; rank 0 closes the attempt and, after a finished run, writes the report and the
        pack.
        """
        if self._meter is not None:
            with contextlib.suppress(Exception):  # the meter keeps its own errors in its file
                self._meter.stop()
        if self.world.is_main:
            self._end(state, cause)

    @_never_breaks
    def _end(self, state: str, cause: str | None) -> None:
        if not self._active:
            return
        if self._digesting is not None:
            self._digesting.join(timeout=600)
        self._wait_for_other_nodes()
        self._ending = True
        self.progress(state, cause, kind="attempt-ended")
        self._active = False
        if state == "finished" and self.recipe.record.pack and self._write_pack is not None:
            self._write_pack(self.run)

    def _wait_for_other_nodes(self) -> None:
        """The other nodes' last readings, if they come within five seconds."""
        if self._nodes <= 1:
            return
        folder = self.run.attempt_dir(int(self.attempt))
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            files = list(folder.glob("energy-*.json"))
            if len(files) >= self._nodes and all('"final": true' in f.read_text(encoding="utf-8") for f in files):
                return
            time.sleep(0.1)

    def failed(self, where: str, error: BaseException) -> None:
        """Keep and print an error of the recorder itself, each kind once."""
        text = f"{type(error).__name__}: {redact.message(error)}" if not self.private else type(error).__name__
        if where in self._errors:
            return
        self._errors[where] = text
        print(f"record: {where} failed and is missing from the record: {text}", file=sys.stderr, flush=True)


__all__ = ["DATA_MANIFEST", "EVENTS", "RECORD", "Recorder", "is_missing", "load_record", "totals", "write_record"]
