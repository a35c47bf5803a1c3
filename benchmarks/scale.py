"""What one step, one heartbeat and one checkpoint cost against the number of ranks, without that many ranks.

    python benchmarks/scale.py [--json] [--ranks 8,64,512,4096] [--local 4] [--documents 32] [--device-ms 200] [--store]

One process plays the parts: the rank whose step is prepared ahead, the ranks of one node that share a heartbeat, rank 0
that describes a checkpoint, the batch script that judges an attempt. Times are of this machine and depend on what else
it does; counts (bytes, file operations, keys) do not. ``--store`` starts 2, 4 and 8 real processes and counts the keys
that joining leaves in the store of the rendezvous.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring
import numpy as np
import torch

from aifactory_train.data import Cursor, Sampler, split_step
from aifactory_train.energy import NodeMeter
from aifactory_train.launchers.attempts import attempt_status
from aifactory_train.launchers.programs import attempt as book
from aifactory_train.methods.supervised import Supervised
from aifactory_train.model import flops, shapes
from aifactory_train.parallel.layout import parts_for, state_file
from aifactory_train.parallel.storage import json_bytes, layout_of
from aifactory_train.record.recorder import Recorder, node_file_every_s
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt
from aifactory_train.run.ownership import BEAT_S, LOOK_S, Owner
from aifactory_train.training.ahead import StepsAhead
from aifactory_train.training.metrics_log import MetricsLog
from aifactory_train.training.stopping import StopChannels

#: Llama 3.1 8B, whose checkpoint of full training has 3 x 291 tensors.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
#: Minutes of a run's life that are played to count file operations.
MINUTES = 20


# ---- a step


class NoBatches(Supervised):
    """The documents of a step alone: what a batch costs depends on its tokens, not on the ranks."""

    def __init__(self) -> None:
        pass

    def batch(self, step: Any, share: np.ndarray) -> Any:
        return len(share)


def context(ranks: int, documents: int, steps: int) -> Any:
    """As much of a run as preparing a step takes: documents of a chat's lengths, packed."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(4096, np.exp(draw.normal(5.5, 1.0, ranks * documents * 2)).astype(np.int64) + 1)
    settings = SimpleNamespace(grad_accum="auto", micro_batch_tokens=8192)
    return SimpleNamespace(
        data=SimpleNamespace(train=SimpleNamespace(lengths=lengths, supervised=lengths // 2)),
        sampler=Sampler(lengths, seed=3, batch_rows=ranks * documents),
        recipe=SimpleNamespace(train=settings, data=SimpleNamespace(batching="packed")),
        engine=SimpleNamespace(dims=SimpleNamespace(data_ranks=ranks, data_rank=lambda rank: rank)),
        world=SimpleNamespace(device="cpu", rank=0, size=ranks),
        total_steps=steps,
    )


def counting_recorder(run: Any) -> Any:
    """Rank 0's recorder with nothing but what it does in a step."""
    shape = shapes.from_config(CONFIG, "llama-8b")
    recorder = object.__new__(Recorder)
    recorder._active, recorder._step_cost, recorder._reported = True, 0.0, time.monotonic()
    recorder._lengths, recorder.recipe, recorder._work = run.data.train.lengths, run.recipe, flops.Work(0, 0, 0, 0)
    recorder._sums = dict.fromkeys(("steps", "tokens", "positions", "supervised_tokens", "train_s"), 0)
    recorder._count = lambda lengths, supervised, segments: flops.documents(
        shape, lengths, supervised, flops.Trained(rank=16), segments=segments
    )
    recorder.failed = failing
    return recorder


def failing(where: str, error: BaseException) -> None:
    raise error


def step_costs(ranks: int, documents: int, device_ms: float, folder: Path, steps: int = 6) -> dict[str, Any]:
    """CPU of dealing a step and of all that the thread does for it; and with a device that is busy ``device_ms`` a
    step, what the loop of rank 0 waits for the next step, and the CPU time of its own thread a step: taking it,
    heartbeat, record, metrics. On a machine that others keep busy waiting tells of them, CPU time of us."""
    run = context(ranks, documents, steps + 1)
    lengths = run.data.train.lengths
    cpu = []
    for _ in range(3):
        began = time.process_time()
        split_step(np.arange(ranks * documents), lengths, ranks, "auto", 8192)[0]
        cpu.append(time.process_time() - began)
    ahead = StepsAhead(run, NoBatches())
    ahead._make(0, Cursor())  # the order of an epoch is made once
    began = time.process_time()
    ahead._make(0, Cursor())
    prepared = time.process_time() - began
    recorder, log = counting_recorder(run), MetricsLog(RunFolder(folder), enabled=True, tensorboard=False)
    log.open(0)
    waited, host, cursor = [], [], Cursor()
    with Attempt(RunFolder(folder), 0, 0, 1, timeout_s=600, ranks=ranks) as attempt:
        for step in range(steps):
            began, work = time.perf_counter(), time.thread_time()
            ready = ahead.take(step, cursor)
            taken, cursor = time.perf_counter(), ready.following
            for phase in ("forward", "reduce", "update"):
                attempt.beat(step, phase)
            figures = {"step": step + 1, "tokens": ready.tokens, "supervised_tokens": ready.supervised, "seconds": 1.0}
            recorder.step(figures, ready.context.documents, ready.shares, ready.lengths)
            log.write({"kind": "train", "loss": 1.0, **figures})
            attempt.running(step + 1)
            host.append(time.thread_time() - work)
            waited.append(taken - began)
            time.sleep(device_ms / 1000)
        attempt.code = 0
    ahead.close()
    log.close()
    # The first step has nothing to hide behind.
    return {
        "split_cpu_ms": ms(min(cpu)),
        "prepare_cpu_ms": ms(prepared),
        "waited_ms": ms(float(np.median(waited[1:]))),
        "waited_best_ms": ms(min(waited[1:])),
        "host_cpu_ms": ms(float(np.median(host[1:]))),
    }


def ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


# ---- a checkpoint


def tensors() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of a checkpoint of full training."""
    hidden, ffn, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    own: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocab, hidden))
    own["model.norm.weight"] = (hidden,)
    keys = 128 * CONFIG["num_key_value_heads"]
    for layer in range(CONFIG["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        own |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    kinds = ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/")
    return {kind + name: (shape, torch.float32) for kind in kinds for name, shape in own.items()}


def runs_of(way: str, shape_list: list[tuple[int, ...]], ranks: int) -> np.ndarray:
    """Who writes what, int64 ``[ranks, tensors, 2]``: ``rows`` as FSDP2 deals them, ``flat`` as ZeRO 1 and 2 cut the
    concatenation of all tensors, ``turns`` as DDP takes turns."""
    number = np.arange(ranks)
    sizes = np.asarray([int(np.prod(shape)) for shape in shape_list])
    if way == "flat":
        third = len(sizes) // 3  # weights and both moments are cut alike
        ends = np.tile(np.cumsum(sizes[:third]), 3)
        cuts = np.linspace(0, ends[-1], ranks + 1).astype(np.int64)
        low = np.clip(cuts[:-1, None], ends - sizes, ends) - (ends - sizes)
        return np.stack([low, np.clip(cuts[1:, None], ends - sizes, ends) - (ends - sizes) - low], axis=2)
    if way == "turns":
        mine = number[:, None] == np.arange(len(sizes)) % ranks
        return np.stack([np.zeros_like(mine, dtype=np.int64), mine * sizes], axis=2)
    rows = np.asarray([shape[0] for shape in shape_list])
    each = -(-rows // ranks) * (sizes // rows)
    start = np.minimum(number[:, None] * each, sizes)
    return np.stack([start, np.minimum(each, sizes - start)], axis=2)


def checkpoint_costs(ranks: int) -> dict[str, Any]:
    """Bytes of what describes a checkpoint (layout and marker), and rank 0's and a reader's work with it."""
    found, named = {}, tensors()
    for way in ("rows", "flat", "turns"):
        runs = runs_of(way, [shape for shape, _ in named.values()], ranks)
        began = time.process_time()
        layout = layout_of(named, runs)
        found[way] = (len(json.dumps(layout)), time.process_time() - began, layout)
    files = {state_file(rank): {"bytes": 10**9, "sha256": "0" * 64} for rank in range(ranks)}
    marker = len(json_bytes({"files": files}))
    layout, each = found["rows"][2], 4096 // min(ranks, 4096)
    began = time.process_time()
    for name, (shape, _) in named.items():
        first = min(each, shape[0] - each)
        list(parts_for(name, layout[name], ((first, *[0] * (len(shape) - 1)), (each, *shape[1:]))))
    reading = time.process_time() - began
    sent = 16 * len(named) + len(pickle.dumps({state_file(0): files[state_file(0)]}))
    return {
        "metadata_bytes": max(size for size, _, _ in found.values()) + marker,
        "layout_bytes": {way: size for way, (size, _, _) in found.items()},
        "layout_ms": ms(max(seconds for _, seconds, _ in found.values())),
        "reader_ms": ms(reading),
        "save_message_bytes": sent,
    }


# ---- files of a run that goes on


class Counted:
    """File operations on names below a folder: opened, made, renamed, removed, listed (what asks a metadata server)."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.on = str(folder), 0, False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        wanted = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.link")
        if self.on and event in wanted and str(arguments[0]).startswith(self.folder):
            self.count += 1

    def of(self, what: Callable[[], None]) -> int:
        """Operations of one call."""
        before, self.on = self.count, True
        try:
            what()
        finally:
            self.on = False
        return self.count - before


def file_operations(ranks: int, local: int, folder: Path) -> dict[str, Any]:
    """Operations in the run folder a rank and minute: a node's heartbeats and energy, and what rank 0 does beside."""
    counted, run = Counted(folder), RunFolder(folder)
    step_s, clock = 1.0, [0.0]
    with unthreaded():
        attempts = [
            Attempt(run, rank, rank, 1, timeout_s=600, ranks=ranks, local_size=local)
            for rank in range(min(local, ranks))
        ]
    energy = {"write_every_s": node_file_every_s(ranks), "clock": lambda: clock[0]}
    meter = NodeMeter(folder / "attempts/001/energy-n.json", [], {}, devices=0, **energy)  # type: ignore[arg-type]
    meter.sample()
    owner = Owner(folder)
    owner.claim()
    every, node, main = attempts[0]._every_s, 0, 0
    for second in range(0, MINUTES * 60, 10):
        clock[0] = float(second)
        for attempt in attempts:
            attempt.beat(int(second / step_s), "forward")
        if second % round(every) == 0:
            for attempt in attempts:
                node += counted.of(attempt._write_down)
            attempts[0].running(int(second / step_s))
            main += counted.of(attempts[0]._write_down)
        if second % BEAT_S == 0:
            main += counted.of(owner._renew)
        node += counted.of(meter.sample)
    stop = object.__new__(StopChannels)  # without its handlers of signals
    stop.reason, stop.signal, stop.deadline, stop._steps = "", None, None, []
    stop.watch_file(folder / "stop", ranks=ranks)
    stop._looked = -stop._look_every_s
    asks = 60 / LOOK_S * counted.of(lambda: owner.lost(look=True) and None)
    main_a_minute = main / MINUTES + asks + 60 / stop._look_every_s * counted.of(lambda: stop.look(0.0) and None)
    owner.release()
    for attempt in attempts:
        attempt._watchdog.stop()
        if attempt._board is not None:
            attempt._board.leave()
    nodes = max(1, ranks // local)
    return {
        "beat_every_s": every,
        "operations_a_rank_minute": round((node / MINUTES * nodes + main_a_minute) / ranks, 3),
        "of_rank_0_a_minute": round(main_a_minute, 1),
    }


@contextlib.contextmanager
def unthreaded() -> Iterator[None]:
    """Attempts whose threads write nothing by themselves: the clock is played."""
    kept, Attempt._write_meanwhile = Attempt._write_meanwhile, lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Attempt._write_meanwhile = kept  # type: ignore[method-assign]


# ---- judging and following


def judged(ranks: int, local: int, folder: Path, failed: bool) -> dict[str, Any]:
    """The batch script's verdict and the status of an attempt of so many ranks; ``failed``: every rank left an outcome
    of its own that says why."""
    where = folder / "attempts/001"
    where.mkdir(parents=True)
    book.write_json(str(where / "attempt.json"), {"number": 1, "world": ranks, "started": 1.0, "nodes": []})
    for first in range(0, ranks, local):
        own = range(first, min(first + local, ranks))
        beats = {str(r): {"rank": r, "host": f"n{first}", "step": 9, "phase": "end", "time": 1.0} for r in own}
        book.write_json(str(where / f"alive-node-{first}.json"), {"ranks": beats})
        told = {str(r): {"rank": r, "status": "done", "exit_code": 0, "step": 9, "ended": 2.0} for r in own}
        if not failed:
            book.write_json(str(where / f"outcome-node-{first}.json"), {"ranks": told})
        for rank in own:
            if failed:
                why = {"status": "failed", "exception": "RuntimeError", "message": "Connection closed by peer"}
                book.write_json(str(where / f"outcome-{rank}.json"), {**told[str(rank)], **why})
            book.write_json(str(where / f"exit-{rank}.json"), {"rank": rank, "exit_code": int(failed), "ended": 3.0})
            book.write_json(str(where / f"place-{rank}.json"), {"rank": rank, "node": f"n{first}", "started": 1})
    began = time.perf_counter()
    beats_read = len(book.ranked(str(where), "alive"))
    heartbeats = time.perf_counter() - began
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        book.main(["close", "--run", str(folder), "--attempt", "1", "--rc", str(int(failed))])
    closing = time.perf_counter() - began
    began = time.perf_counter()
    status = attempt_status(folder, 1, True, None, lambda job: None)
    following = time.perf_counter() - began
    assert beats_read == ranks and status["state"] == ("failed" if failed else "done"), status
    return {
        "heartbeats_ms": ms(heartbeats),
        "close_ms": ms(closing),
        "status_ms": ms(following),
        "files": len(os.listdir(where)),
        "status_bytes": len(json.dumps(status)),
    }


# ---- the rendezvous


def store_keys(ranks: int) -> int:
    """Keys that the ranks' joining, one agreement and a group for checkpoints leave in the store, by real processes."""
    import torch.distributed as dist
    from torch.multiprocessing.spawn import start_processes

    store = dist.TCPStore("127.0.0.1", 0, ranks + 1, is_master=True, wait_for_workers=False)
    start_processes(_join, args=(ranks, store.port), nprocs=ranks, start_method="fork")
    return store.num_keys()


def _join(rank: int, ranks: int, port: int) -> None:
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    store = dist.TCPStore("127.0.0.1", port, ranks + 1, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    dist.new_group(backend="gloo")
    dist.all_reduce(torch.zeros(2))
    dist.destroy_process_group()


# ---- the table


def measure(ranks: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All costs at ``ranks``."""
    folders = [scratch / f"{ranks}-{name}" for name in ("steps", "files", "done", "failed")]
    for folder in folders:
        folder.mkdir()
    done, failed = (judged(ranks, options.local, f, bad) for f, bad in zip(folders[2:], (False, True), strict=True))
    return {
        "ranks": ranks,
        **step_costs(ranks, options.documents, options.device_ms, folders[0]),
        **checkpoint_costs(ranks),
        **file_operations(ranks, options.local, folders[1]),
        "agreement_bytes": torch.zeros(2, dtype=torch.int32).nbytes,
        **done,
        "close_failed_ms": failed["close_ms"],
        "status_failed_ms": failed["status_ms"],
    }


COLUMNS = {
    "ranks": "ranks",
    "split_cpu_ms": "dealing a step, CPU ms",
    "prepare_cpu_ms": "all of the next step, in its thread, CPU ms",
    "waited_ms": "loop waits for it, ms (median)",
    "waited_best_ms": "best",
    "host_cpu_ms": "the loop's own host work, CPU ms",
    "metadata_bytes": "checkpoint metadata, bytes",
    "metadata_a_rank": "a rank beyond the first row",
    "layout_ms": "describing it, CPU ms",
    "operations_a_rank_minute": "file operations a rank and minute",
    "heartbeats_ms": "reading heartbeats, ms",
    "close_ms": "judging, ms",
    "close_failed_ms": "judging where all failed, ms",
    "status_ms": "status, ms",
}


def with_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with ``metadata_a_rank``: bytes that a rank more than in the first row adds."""
    first = rows[0]
    return [
        {
            **row,
            "metadata_a_rank": round(
                (row["metadata_bytes"] - first["metadata_bytes"]) / max(1, row["ranks"] - first["ranks"]), 1
            ),
        }
        for row in rows
    ]


def as_markdown(result: dict[str, Any]) -> str:
    rows = [[f"{row[key]:,}" for key in COLUMNS] for row in result["rows"]]
    text = measuring.table(list(COLUMNS.values()), rows)
    if result["store_keys"]:
        keys = ", ".join(f"{count} at {ranks}" for ranks, count in result["store_keys"].items())
        text += f"\nKeys in the store of the rendezvous: {keys} ranks. \n"
    return text + "\n" + measuring.facts_text(result["facts"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument("--ranks", default="8,64,512,4096")
    parser.add_argument("--local", type=int, default=4, help="ranks a node")
    parser.add_argument("--documents", type=int, default=32, help="documents a rank and step")
    parser.add_argument("--device-ms", type=float, default=200.0, help="what the device works on a step")
    parser.add_argument("--store", action="store_true", help="count the keys of the rendezvous with real processes")
    parser.add_argument("--update-readme", action="store_true")
    options = parser.parse_args()
    found = measuring.facts()
    with tempfile.TemporaryDirectory(prefix="aifactory-bench-") as name:
        rows = [measure(int(ranks), options, Path(name)) for ranks in options.ranks.split(",")]
    keys = {ranks: store_keys(ranks) for ranks in (2, 4, 8)} if options.store else {}
    result = {"rows": with_growth(rows), "store_keys": keys, "facts": found}
    if options.update_readme:
        measuring.update_readme("scale", as_markdown(result))
    print(json.dumps(result) if options.json else as_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
