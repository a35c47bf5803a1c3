"""The checks of an acceptance, in order of value, as a table. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

#: Seconds that a whole acceptance may take; what has not begun by then is left out and says so.
LIMIT_S, QUICK_LIMIT_S = 590, 175
#: What every check is given where there is no GPU.
SLOWEST_S = 240


@dataclass(frozen=True)
class AcceptanceCheck:
    """One check.

    seconds: what it takes on a GPU; it is ended after twice that. quick: the same with ``--quick``, None where that
    leaves it out. run: ``module:function`` below this room. gpus: GPUs that it needs, where the machine has any. cpu:
    why a machine without a GPU leaves it out; empty where it runs there (small, on gloo or in Triton's interpreter).
    """

    name: str
    shows: str
    run: str
    seconds: int
    quick: int | None
    gpus: int = 1
    cpu: str = ""

    def limit(self, quick: bool, gpu: bool = True) -> int:
        """Seconds after which it is ended: twice its time; without a GPU nobody promises any, so a little more."""
        seconds = 2 * (self.quick or self.seconds if quick else self.seconds)
        return seconds if gpu else max(SLOWEST_S, seconds)


def _several(name: str, shows: str, run: str, seconds: int, cpu: str = "") -> AcceptanceCheck:
    return AcceptanceCheck(name, shows, run, seconds, None, gpus=2, cpu=cpu)


CHECKS: tuple[AcceptanceCheck, ...] = (
    AcceptanceCheck(
        "truth",
        "torch is built for this GPU and driver, kernels can be compiled, the memory is free",
        "truth:check",
        15,
        15,
    ),
    AcceptanceCheck(
        "group", "the process group of training forms, reduces, ends; a rank that raises is gone", "group:check", 20, 20
    ),
    AcceptanceCheck(
        "attention", "attention within documents, forward and backward, against fp64", "attention:check", 30, 15
    ),
    AcceptanceCheck(
        "kernels", "every kernel, forward and backward, against its reference in fp64", "kernels:check", 70, 30
    ),
    AcceptanceCheck(
        "curves", "one curve: CPU = GPU, every engine, checkpointing, compilation, DPO", "curves:check", 100, 30
    ),
    AcceptanceCheck(
        "synchronisation", "the host waits for the device once a step and never within forward and backward",
        "host:check", 20, 15,
    ),
    AcceptanceCheck(
        "resume", "a checkpoint loads bit for bit; a killed run goes on with the same curve", "resume:check",
        45, None,
    ),
    AcceptanceCheck(
        "speed", "tokens/s, utilisation, peak memory of a 1B-shaped model, against the plan", "speed:check", 60, None,
        cpu="tokens/s and peak memory are figures of a GPU",
    ),
    AcceptanceCheck(
        "loss", "the vocabulary's loss and its gradients at three sizes, against fp32", "loss:check", 20, 15
    ),
    AcceptanceCheck(
        "out-of-memory", "too large a batch ends in advice that helps, with exit code 1", "memory:check", 25, None
    ),
    AcceptanceCheck(
        "lifecycle", "train, evaluate, generate, export, gate, reload: the export scores as the run did",
        "lifecycle:check", 45, None,
    ),
    AcceptanceCheck("nf4", "a step on a 4-bit base (bitsandbytes)", "quantised:check", 15, None),
    AcceptanceCheck(
        "energy", "the energy counter rises, and the power lies between idle and the cap", "energy:check", 10, 10,
        cpu="no GPU whose energy could be counted",
    ),
    _several(
        "bandwidth", "bus bandwidth of the collectives between this machine's GPUs", "several:bandwidth", 15,
        cpu="bandwidths between GPUs need two of them",
    ),
    _several("ranks", "ddp, fsdp2 and hsdp over several ranks have one curve", "several:curves", 30),
    _several("rank-out-of-memory", "one rank runs out of memory: the job ends, that rank is named", "several:oom", 25),
    _several("rank-sleeps", "one rank stands still: it and no other is blamed", "several:sleeps", 45),
)  # fmt: skip
#: Before them: what the other checks, the page and the comparison with a profile rest on.
MACHINE = AcceptanceCheck("machine", "what this machine is", "machine:check", 60, 60)
BY_NAME = {check.name: check for check in CHECKS}
