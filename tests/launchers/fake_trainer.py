"""A stand-in for ``aifactory train`` with its command line, its files and its exit codes, in a fraction of its time.

Ranks count steps together through files of the run folder (no torch), save, stop on every channel, and fail on request
(``FAKE_FAIL=rank:step:how``), so that the launcher's own behaviour is tested without waiting for imports. The real
trainer is used by the tests that compare weights and curves.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

caught = None
REASONS = ["", "deadline", "stop file", "SIGTERM", "SIGUSR1", "SIGUSR2"]


def read_request(run):
    try:
        return (run / "stop").read_text().strip()
    except FileNotFoundError:
        return None


def remember(number, frame):
    global caught
    caught = signal.Signals(number).name


class Peers:
    """An all-reduce(max) over files; raises when somebody does not come, as a collective does."""

    def __init__(self, folder: Path, rank: int, world: int, timeout: float):
        self.folder, self.rank, self.world, self.timeout, self.count = folder, rank, world, timeout, 0
        folder.mkdir(parents=True, exist_ok=True)

    def max(self, value: int) -> int:
        self.count += 1
        timeout = self.timeout if self.count > 1 else 120  # ranks do not start at once
        mine = self.folder / f"{self.count}-{self.rank}"
        beside = self.folder / f".{self.rank}.tmp"
        beside.write_text(str(value))
        beside.rename(mine)
        end = time.time() + timeout
        best = value
        for other in range(self.world):
            path = self.folder / f"{self.count}-{other}"
            while not path.exists():
                if (self.folder.parent / f"exit-{other}.json").exists() and not path.exists():
                    raise RuntimeError(f"[gloo] Connection closed by peer (rank {other})")
                if time.time() > end:
                    raise RuntimeError(f"[gloo] Timed out waiting {timeout} s for rank {other}")
                time.sleep(0.02)
            best = max(best, int(path.read_text()))
        return best


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--stop-at", type=float, default=None)
    parser.add_argument("--attempt", type=int, default=1)
    args = parser.parse_args()
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), remember)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = args.run_dir / "attempts" / f"{args.attempt:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    state = {"step": 0}

    def write(name, value):
        beside = folder / f".{name}-{rank}.tmp"
        beside.write_text(json.dumps(value))
        beside.rename(folder / f"{name}-{rank}.json")

    def outcome(status, code, **more):
        write(
            "outcome",
            {
                "rank": rank,
                "local_rank": int(os.environ.get("LOCAL_RANK", 0)),
                "host": socket.gethostname(),
                "status": status,
                "exit_code": code,
                "step": state["step"],
                "exception": None,
                "message": None,
                "signal": None,
                "started": began,
                "ended": time.time(),
                **more,
            },
        )
        return code

    try:
        return train(args, folder, rank, world, write, outcome, state)
    except BaseException as error:
        traceback.print_exc()
        return outcome("failed", 1, exception=type(error).__name__, message=str(error))


def train(args, folder, rank, world, write, outcome, state):
    peers = Peers(folder / "peers", rank, world, float(os.environ.get("FAKE_TIMEOUT", "60")))
    checkpoints = args.run_dir / "checkpoints"
    done = sorted(int(p.parent.name[5:]) for p in checkpoints.glob("step-*/COMPLETE"))
    step = done[-1] if done else 0
    steps, pace = int(os.environ.get("FAKE_STEPS", "6")), float(os.environ.get("FAKE_PACE", "0.1"))
    # Seconds before --stop-at at which it stops; only in the attempt that FAKE_ATTEMPT names.
    asked_for = args.attempt == int(os.environ.get("FAKE_ATTEMPT", args.attempt))
    lead = float(os.environ.get("FAKE_LEAD", "3")) if asked_for else 3
    fail = [tuple(item.split(":")) for item in os.environ.get("FAKE_FAIL", "").split(",") if item]
    print(f"rank {rank}/{world} node {os.environ.get('SLURMD_NODENAME')} from step {step}", flush=True)
    for name in os.environ.get("FAKE_PRINT", "").split(","):
        if name:
            print(f"{name}={os.environ.get(name)!r}", flush=True)

    def save(number):
        peers.max(0)
        if rank == 0:
            target = checkpoints / f"step-{number}"
            target.mkdir(parents=True, exist_ok=True)
            (target / "COMPLETE").write_text("{}")
        peers.max(0)

    while step < steps:
        state["step"] = step
        write(
            "alive", {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step, "time": time.time()}
        )
        time.sleep(pace)
        for who, when, how in fail:
            if int(who) == rank and int(when) == step and asked_for:
                if how == "raise":
                    raise ValueError(f"deliberate failure at step {step}")
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "segv":
                    os.kill(os.getpid(), signal.SIGSEGV)
                if how == "exit":
                    os._exit(9)
                if how == "hang":
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    time.sleep(3600)
        step += 1
        state["step"] = step
        # As the real one: rank 0 looks at the stop file, all act on the same reason, and the file is left to whoever
        # closes the attempt.
        asked = read_request(args.run_dir) if rank == 0 else None
        late = args.stop_at and time.time() > args.stop_at - lead
        reason = caught or ("deadline" if late else "stop file" if asked is not None else "")
        reason = REASONS[peers.max(REASONS.index(reason))]
        if reason:
            save(step)
            if rank == 0 and not (folder / "attempt.json").exists() and (args.run_dir / "stop").exists():
                (args.run_dir / "stop").replace(folder / "stop-request.txt")
            return outcome("stopped", 75, message=f"stopped after step {step}: {reason}", stop_request=asked)
    save(step)
    return outcome("done", 0)


if __name__ == "__main__":
    sys.exit(main())
