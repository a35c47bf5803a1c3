"""The failure lab: jobs of two to four ranks in which something is broken on purpose, judged as a launcher judges them.

python failures.py FOLDER NAME...      prints one JSON object: case -> what was seen

Each case is the real command line on forked ranks with a tiny model, between ``begin`` and ``close`` of the launcher's
book-keeping. :class:`Launcher` does by hand what the batch script does around the ranks: a file that says where each
rank is, one that says how it ended, a signal to all others when one has failed, and the watch over the heartbeats.
What needs a GPU is pretended: a rank that would wait in a collective without end sleeps, and drivers and libraries
speak as they do.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import forked
import helpers
from launched import book
from scenarios import at_step

#: ``parallel.timeout_s`` of these jobs: the smallest that is allowed.
TIMEOUT_S = 10
#: A launcher that hears of a failed rank gives the others this long to say something, then ends them.
GRACE_S = 1.0
#: The step after which something is broken.
AT = 2
POLICY = {"resubmit": "chain", "unattended": True, "links": 0, "restarts": {"time": 3, "node": 2, "crash": 1}}
FOR_EVER = 3600
InChild = Callable[[int, Callable[[dict], None]], None]


@dataclass(frozen=True)
class Case:
    """What is done in every rank before it starts, and what the verdict must be: the ``rank`` (one of them), its
    ``node``, ``kind`` of the cause and ``action``. Half of the ranks are on node a, the others on node b.
    """

    do: InChild
    kind: str | None
    action: str = "end"
    rank: int | tuple[int, ...] | None = 1
    words: str = ""  # in the message
    state: str = "failed"
    excludes: bool = False  # the node is left out from now on
    ranks: int = 2
    lost: bool = False  # node b leaves no file when its ranks are gone
    down: bool = False  # and the scheduler says so
    hang_s: float = 0  # the launcher's watch over the heartbeats
    fast: bool = False  # runs with every change
    settings: dict[str, Any] = field(default_factory=dict)


class Launcher:
    """One job: the ranks of ``case`` below ``folder``, followed to their end."""

    def __init__(self, case: Case, folder: Path, recipe: Path):
        self.case, self.folder, self.run = case, folder, folder / "run"
        self.attempt = self.run / "attempts" / "001"
        (self.run / "submission").mkdir(parents=True)
        (self.run / "submission" / "policy.json").write_text(json.dumps(POLICY))
        book("begin", self.run, "--job", "1", "--world", str(case.ranks), "--nodes", "a,b", "--gpus", str(case.ranks))
        self.struck: float | None = None
        self.said: set[int] = set()
        argv = ["train", str(recipe), "--run-dir", str(self.run), "--attempt", "1", "--resume", "auto", "--quiet"]
        for rank in range(case.ranks):
            self._write("place", rank, started=int(time.time()))
        self.ranks = forked.Ranks(case.ranks, argv, self.attempt, in_child=case.do)

    def node(self, rank: int) -> str:
        return "a" if rank < self.case.ranks / 2 else "b"

    def _write(self, kind: str, rank: int, **more: Any) -> None:
        about = {"rank": rank, "node": self.node(rank), "host": "h", **more}
        (self.attempt / f"{kind}-{rank}.json").write_text(json.dumps(about))

    def follow(self) -> dict[str, Any]:
        """Until no rank is left; returns what was seen."""
        began = time.monotonic()
        srun = subprocess.Popen(["sleep", "600"])  # what the watch ends where nothing goes on
        watch = self._watch(srun.pid) if self.case.hang_s else None
        failed_at, ended = None, False
        with self.ranks as ranks:
            while ranks.running and time.monotonic() < began + 240:
                for event in ranks.poll():
                    if "struck" in event and self.struck is None:
                        self.struck = time.monotonic()
                self._note_ends(ended)
                bad = any(code not in (0, 75) for code in ranks.codes.values())
                if (bad or srun.poll() is not None) and failed_at is None:
                    failed_at = time.monotonic()
                if failed_at is not None and not ended and time.monotonic() > failed_at + GRACE_S:
                    ended = True
                    ranks.kill(signal.SIGTERM)
                if ended and time.monotonic() > failed_at + 2 * GRACE_S:
                    ranks.kill(signal.SIGKILL)
            self._note_ends(ended)
            left = ranks.running
        seconds = time.monotonic() - (self.struck or began)
        srun.kill()
        srun.wait()
        if watch is not None:
            watch.wait()
        if self.case.down:
            (self.attempt / "node-state.txt").write_text("b down*\n")
        verdict = book("close", self.run, "--attempt", "1", "--rc", "1")
        record = json.loads((self.attempt / "attempt.json").read_text())
        logs = {r: (self.attempt / f"rank-{r}.log").read_text()[-2500:] for r in range(self.case.ranks)}
        return {
            "struck": self.struck is not None,
            "seconds": seconds,
            "whole": time.monotonic() - began,
            "left": left,
            "codes": ranks.codes,
            "verdict": verdict,
            "state": record["state"],
            "cause": record["cause"],
            "decision": record["decision"],
            "logs": logs,
        }

    def _note_ends(self, ended: bool) -> None:
        """As the rank's script does; a node that is lost writes nothing."""
        for rank, code in self.ranks.codes.items():
            if rank in self.said or (self.case.lost and self.node(rank) == "b"):
                continue
            self.said.add(rank)
            number = -code if code < 0 else None
            shell = 128 + number if number else code
            self._write("exit", rank, exit_code=shell, signal=number, terminated=ended, ended=time.time())

    def _watch(self, pid: int) -> subprocess.Popen[bytes]:
        from aifactory_train.launchers.programs import attempt

        argv = [sys.executable, str(Path(attempt.__file__)), "watch", "--run", str(self.run), "--attempt", "1"]
        argv += ["--pid", str(pid), "--hang", str(self.case.hang_s), "--every", "0.5"]
        return subprocess.Popen(argv)


# ---- where it is broken


def within(owner: str, name: str, do: Callable[[], None], *, who: int = 1, after: int = 1, before: bool = True) -> Any:
    """``in_child``: rank ``who`` calls ``do`` in the ``after``-th call of ``owner.name``; ``owner`` is a module, or a
    class of one.
    """

    def in_child(rank: int, tell: Any) -> None:
        if rank != who:
            return
        holder, calls = _find(owner), []
        real = getattr(holder, name)

        def broken(*args: Any, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == after and before:
                tell({"struck": True})
                do()
            result = real(*args, **more)
            if len(calls) == after and not before:
                tell({"struck": True})
                do()
            return result

        setattr(holder, name, broken)

    return in_child


def _find(path: str) -> Any:
    import importlib

    module, _, name = path.rpartition(".")
    if name[0].isupper():
        return getattr(importlib.import_module(module), name)
    return importlib.import_module(path)


TRAINER = "aifactory_train.training.trainer"
ENGINE = "aifactory_train.parallel.ddp.DDPEngine"
STORAGE = "aifactory_train.parallel.storage"


def forward(do: Callable[[], None], who: int = 1) -> InChild:
    """In the micro-batch of a step."""
    return within(ENGINE, "forward_backward", do, who=who, after=AT + 1)


def phase(name: str, do: Callable[[], None], who: int = 1, step: int = AT) -> InChild:
    """When a rank begins ``name`` of the step after ``step``."""

    def in_child(rank: int, tell: Any) -> None:
        def strike() -> None:
            tell({"struck": True})
            do()

        at_step(step, who, strike, name)(rank, tell)

    return in_child


def both(*parts: InChild) -> InChild:
    def in_child(rank: int, tell: Any) -> None:
        for part in parts:
            part(rank, tell)

    return in_child


def as_on_gpus(rank: int, tell: Any) -> None:
    """The rank takes itself for one of several with a GPU each: how a wait is told from a hang, and how it leaves."""
    from aifactory_train.run.outcome import Watchdog
    from aifactory_train.training import start

    real = Watchdog.__init__
    Watchdog.__init__ = lambda self, attempt, timeout_s, device: real(self, attempt, timeout_s, "cuda:0")
    start.leaves_alone = lambda world: True


def others_block(rank: int, tell: Any) -> None:
    """Collectives of the other ranks have no time-out of their own: whoever waits for rank 1 waits without end."""
    if rank != 1:
        within(ENGINE, "forward_backward", asleep, who=rank, after=AT + 2)(rank, lambda event: None)


def teardown_blocks(rank: int, tell: Any) -> None:
    """Taking down the process group never ends (NCCL finalises together with ranks that do not come)."""
    import torch.distributed as dist

    from aifactory_train.parallel import world

    world.LEAVE_S = 3.0
    real = dist.destroy_process_group

    def destroy(group: Any = None) -> None:
        if group is None:
            tell({"struck": True})
            asleep()
        real(group)

    dist.destroy_process_group = destroy


# ---- what happens there


def asleep() -> None:
    time.sleep(FOR_EVER)


def dies_of(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def segfault() -> None:
    import faulthandler

    faulthandler.disable()
    ctypes.string_at(0)


def leaves(code: int) -> Callable[[], None]:
    return lambda: os._exit(code)


def later(seconds: float, do: Callable[[], None]) -> Callable[[], None]:
    def wait() -> None:
        time.sleep(seconds)
        do()

    return wait


def raises(text: str, kind: str = "RuntimeError") -> Callable[[], None]:
    def do() -> None:
        import builtins

        import torch
        import torch.distributed as dist

        from aifactory_train.core import errors

        error = next(getattr(m, kind) for m in (builtins, torch, dist, errors) if hasattr(m, kind))
        raise error(text)

    return do


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def aborts(text: str) -> Callable[[], None]:
    """What a driver or the communication library prints before it ends the process: nobody can catch that."""

    def do() -> None:
        os.write(2, f"\n{text}\n".encode())
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        os.abort()

    return do


NCCL_GAVE_UP = (
    "[rank0]:[E1130 12:00:00.041 ProcessGroupNCCL.cpp:683] [Rank 0] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=12, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=10000) ran for 10004 milliseconds before "
    "timing out.\nterminate called after throwing an instance of 'c10::DistBackendError'"
)
LOST_PEER = "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error"
RCCL_PEER = "NCCL error in: ProcessGroupNCCL.cpp:2020, unhandled system error, RCCL version 2.22.3: Connection reset"
OOM = "out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 63.98 GiB of which 1.20 GiB is free."
COLLATE_SLEEPS = within("aifactory_train.methods.supervised.Supervised", "batch", asleep, after=AT + 2)
EVAL = {"eval.before": True}
SAVES = {"checkpoint.every_steps": 2}
SYNC = {**SAVES, "checkpoint.asynchronous": False}


def error(text: str, kind: str, action: str, how: str = "RuntimeError", **more: Any) -> Case:
    """Rank 1 raises ``text`` in the middle of a step."""
    return Case(forward(raises(text, how)), kind, action, excludes=kind == "gpu-fault", **{"words": text[:30], **more})


CASES: dict[str, Case] = {
    # a rank raises, in every phase
    "raises in prepare": Case(within(TRAINER, "prepare", raises("row 9", "ValueError")), "exception", words="row 9"),
    "raises in load": Case(within(TRAINER, "build_model", raises("tensor x", "KeyError")), "exception", words="x"),
    "raises in forward": Case(forward(raises("row 17", "ValueError")), "exception", words="row 17"),
    "raises in backward": Case(
        within("torch.Tensor", "backward", raises("no gradient"), after=AT + 1), "exception", words="no gradient"
    ),
    "raises in the update": Case(phase("update", raises("a moment", "ValueError")), "exception", words="a moment"),
    "raises in a save": Case(
        within(STORAGE, "put", raises("a piece", "ValueError")), "exception", words="a piece", settings=SYNC
    ),
    "raises in a save in the background": Case(
        within(STORAGE, "put", raises("a piece", "ValueError")), "exception", words="a piece", settings=SAVES
    ),
    "raises in evaluation": Case(
        phase("evaluate", raises("row 3", "ValueError"), step=0), "exception", words="row 3", settings=EVAL
    ),
    "raises in export": Case(
        phase("export", raises("no header", "ValueError"), who=0, step=6),
        "exception",
        rank=0,
        words="no header",
        settings={"export.automatic": True},
    ),
    # a rank does not go on
    "asleep in collate": Case(COLLATE_SLEEPS, "hang", "chain", words="no progress for"),
    "asleep in forward": Case(forward(asleep), "hang", "chain", words="no progress for"),
    "asleep in a save": Case(within(STORAGE, "put", asleep), "hang", "chain", words="gave up", settings=SYNC),
    "asleep in a save in the background": Case(
        within(STORAGE, "put", asleep), "hang", "chain", words="gave up", settings=SAVES
    ),
    "asleep in evaluation": Case(phase("evaluate", asleep, step=0), "hang", "chain", words="gave up", settings=EVAL),
    "asleep in the evaluation after the last step": Case(
        phase("evaluate", asleep, step=6), "hang", "chain", words="gave up", settings={"eval.after": True}
    ),
    "asleep in collate while collectives block": Case(
        both(as_on_gpus, others_block, COLLATE_SLEEPS),
        "hang",
        "chain",
        words="no progress for",
        fast=True,
    ),
    "frozen": Case(forward(dies_of(signal.SIGSTOP)), "hang", "chain", words="gave up"),
    "all frozen": Case(
        both(forward(dies_of(signal.SIGSTOP)), forward(dies_of(signal.SIGSTOP), who=0)),
        "hang",
        "chain",
        rank=(0, 1),
        words="no rank made a step",
        hang_s=6,
    ),
    "NCCL's time-out ends the waiting ranks": Case(
        both(
            phase("save", asleep),
            *(phase("save", later(1, aborts(NCCL_GAVE_UP)), who=r) for r in (0, 2, 3)),
        ),
        "hang",
        "chain",
        words="gave up",
        ranks=4,
        settings=SYNC,
        fast=True,
    ),
    # leaving
    "raises while the teardown blocks": Case(
        both(as_on_gpus, others_block, teardown_blocks, forward(raises("row 17", "ValueError"))),
        "exception",
        words="row 17",
    ),
    "the teardown blocks at the end": Case(
        both(as_on_gpus, teardown_blocks), None, state="done", rank=None, fast=True
    ),
    # a rank is gone
    "killed": Case(forward(dies_of(signal.SIGKILL)), "signal", "chain", words="killed by SIGKILL"),
    "killed in a save": Case(
        within(STORAGE, "put", dies_of(signal.SIGKILL)), "signal", "chain", words="killed by SIGKILL", settings=SAVES
    ),
    "segmentation fault": Case(forward(segfault), "signal", "chain", words="killed by SIGSEGV"),
    "exits with 7": Case(forward(leaves(7)), "exit", words="exit code 7"),
    "exits with 0 too early": Case(forward(leaves(0)), "exit", words="exit code 0", fast=True),
    "node lost": Case(
        both(forward(dies_of(signal.SIGKILL), who=2), forward(dies_of(signal.SIGKILL), who=3)),
        "node-failure",
        "chain",
        rank=2,
        words="lost node b",
        excludes=True,
        ranks=4,
        lost=True,
        down=True,
        fast=True,
    ),
    "node lost, nobody says so": Case(
        both(forward(dies_of(signal.SIGKILL), who=2), forward(dies_of(signal.SIGKILL), who=3)),
        "lost",
        "chain",
        rank=(2, 3),
        words="the process vanished",
        ranks=4,
        lost=True,
    ),
    # memory
    "CUDA out of memory": error(f"CUDA {OOM}", "out-of-memory", "end", "OutOfMemoryError", words="out of memory"),
    "HIP out of memory": error(f"HIP {OOM}", "out-of-memory", "end", words="HIP out of memory"),
    "cuBLAS out of memory": error(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out-of-memory", "end",
        words="ALLOC",
    ),
    "NCCL out of memory": error(
        "NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'", "out-of-memory", "end", "DistBackendError",
        words="NCCL error",
    ),
    "Triton out of shared memory": error(
        "out of resource: shared memory, Required: 262144, Hardware limit: 101376", "exception", "end"
    ),
    "two ranks out of memory at once": Case(
        both(*(forward(raises(f"CUDA {OOM}", "OutOfMemoryError"), who=r) for r in (0, 1))),
        "out-of-memory",
        rank=(0, 1),
        words="out of memory",
    ),
    # hardware
    "ECC": error("CUDA error: uncorrectable ECC error encountered", "gpu-fault", "chain"),
    "NVLink": error("NCCL error: uncorrectable NVLink error detected during the execution", "gpu-fault", "chain"),
    "Xid": error("NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus.", "gpu-fault", "chain"),
    "off the bus": error("GPU 0000:44:00.0 has fallen off the bus", "gpu-fault", "chain"),
    "HSA": error("HSA_STATUS_ERROR_EXCEPTION: a hardware exception. code: 0x1016", "gpu-fault", "chain"),
    "HSA ends the process": Case(
        forward(aborts(":0:rocdevice.cpp:2726: aborting with error : HSA_STATUS_ERROR_EXCEPTION: An HSAIL operation "
                       "resulted in a hardware exception. code: 0x1016")),
        "gpu-fault",
        "chain",
        words="HSA_STATUS_ERROR_EXCEPTION",
        excludes=True,
    ),
    "memory access fault ends the process": Case(
        forward(aborts("Memory access fault by GPU node-4 (Agent handle: 0x1) on address 0x7f. Reason: unknown.")),
        "gpu-error",
        "chain",
        words="Memory access fault",
    ),
    "illegal memory access": error("CUDA error: an illegal memory access was encountered", "gpu-error", "chain"),
    # the first to speak is not the cause
    "ECC, after a victim spoke": Case(
        both(
            forward(raises(LOST_PEER, "DistBackendError"), who=0),
            forward(later(1, raises("CUDA error: uncorrectable ECC error encountered"))),
        ),
        "gpu-fault",
        "chain",
        words="ECC",
        excludes=True,
        fast=True,
    ),
    "killed, after a victim spoke": Case(
        both(
            forward(raises(RCCL_PEER, "DistBackendError"), who=0),
            forward(later(1, dies_of(signal.SIGKILL))),
        ),
        "signal",
        "chain",
        words="killed by SIGKILL",
    ),
    "an exception that speaks of NCCL": error("NCCL_SOCKET_IFNAME names no peer", "exception", "end", "ValueError"),
    "two ranks raise at once": Case(
        both(*(forward(raises(f"row {r}", "ValueError"), who=r) for r in (0, 1))), "exception", rank=(0, 1), words="row"
    ),
    # the disk
    "full disk in a save": Case(
        within(STORAGE, "put", full_disk), "exception", words="No space left", settings=SAVES, fast=True
    ),
    "raises on rank 0 while the others wait for it": Case(
        within(
            "aifactory_train.training.identity",
            "of_run",
            raises("this model cannot be read", "UserError"),
            who=0,
        ),
        "exception",
        rank=0,
        words="cannot be read",
    ),
    "full disk for the outcome": Case(
        both(
            within("aifactory_train.run.outcome", "write_json", full_disk, after=2),
            forward(leaves(1)),
        ),
        "exit",
        words="exit code 1",
    ),
    # what ends nothing
    "a listener fails": Case(
        within("aifactory_train.record.recorder.Recorder", "hear", raises("no record", "ValueError"), who=0, after=3),
        None,
        state="done",
        rank=None,
    ),
}  # fmt: skip


def recipe_of(case: Case, folder: Path, model: Path) -> Path:
    settings = {
        "train.max_steps": 6,
        "train.batch_rows": 4,
        "parallel.engine": "ddp",
        "parallel.threads": 1,
        "parallel.timeout_s": TIMEOUT_S,
        "eval.before": False,
        "eval.after": False,
        "checkpoint.at_end": False,
        "export.automatic": False,
        **case.settings,
    }
    return helpers.write_recipe(folder, model, rows=24, eval_rows=4, settings=settings)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["AIFACTORY_CACHE"] = str(folder / "cache")
    out = os.dup(1)
    os.dup2(2, 1)  # standard output carries the JSON alone
    model = helpers.write_model(folder / "model")
    forked.preload()
    # The token cache is made once, before the cases ask for it together.
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.data import prepare

    recipes = {name: recipe_of(CASES[name], folder / name.replace(" ", "-"), model) for name in names}
    prepare(load_recipe(str(next(iter(recipes.values())))))
    gc.collect()
    gc.freeze()  # the ranks collect what is theirs: looking through all of torch would copy its pages

    def one(name: str) -> Any:
        """In a process of its own: it forks the ranks, and a thread must not."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                found = Launcher(CASES[name], folder / name.replace(" ", "-"), recipes[name]).follow()
                with os.fdopen(writer, "w") as pipe:
                    pipe.write(json.dumps(found))
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(1)
        os.close(writer)
        return pid, reader

    found: dict[str, Any] = {}
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < 4:  # they sleep most of the time
            name = waiting.pop(0)
            running[name] = one(name)
        name = next(iter(running))
        pid, reader = running.pop(name)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        assert not os.waitpid(pid, 0)[1], name
        found[name] = json.loads(text)
    os.write(out, json.dumps(found).encode())


if __name__ == "__main__":
    main()
