"""PBS Pro (OpenPBS): directives from the shape; processes are started by the site's mpiexec, one per GPU.

No PBS server has seen these scripts: only tests check their directives, against the grammar of qsub.
"""

from __future__ import annotations

import re
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.launchers.backends.base import Backend, Job, register
from aifactory_train.launchers.backends.commands import ask, succeeded
from aifactory_train.launchers.submission import Line, Submission, quoted

STATES = {
    "Q": "pending",
    "H": "pending",
    "W": "pending",
    "T": "pending",
    "R": "running",
    "E": "running",
    "S": "running",
    "F": "done",
    "X": "done",
    "C": "done",
    "B": "running",
}


def pbs_time(seconds: int) -> str:
    """``HH:MM:SS``; PBS knows no days."""
    return f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


class Pbs(Backend):
    """What PBS Pro and Torque share: the commands, and how a script finds its nodes and submits the next job."""

    programs = ("qsub", "qstat", "qdel")
    job_id = "$PBS_JOBID"
    array_index = '"${PBS_ARRAY_INDEX:-$PBS_ARRAYID}"'
    node_list = 'nodes=$(sort -u "$PBS_NODEFILE" | paste -sd, -) || die "no list of nodes in PBS_NODEFILE"'
    successor = 'qsub -W depend=afterany:"$PBS_JOBID" "$base/submission/job.sh"'

    def pbs_lines(
        self, sub: Submission, resources: list[tuple[str, str, str | None]], array: str, short_name: str
    ) -> list[Line]:
        """The ``#PBS`` lines of PBS Pro and Torque, which differ in what they ask nodes by.

        Args:
            resources: ``-l`` values for nodes and memory, each with why it is there and the fact it rests on.
            array: the option for an array of jobs.
            short_name: why the name is cut.
        """
        shape, system, request = sub.shape, sub.system, sub.request
        out: list[Line] = []

        def put(text: str, why: str, fact: str | None = None) -> None:
            out.append(sub.line(f"#PBS {text}", why, fact))

        put(f"-N {sub.name[:15]}", f"the run's name; {short_name}")
        if shape.account:
            put(f"-A {shape.account}", shape.reason("account").why)
        if shape.partition:
            put(f"-q {shape.partition}", shape.reason("partition").why, shape.reason("partition").fact)
        for value, why, fact in resources:
            put(f"-l {value}", why, fact)
        put(f"-l walltime={pbs_time(shape.time_s)}", shape.reason("time_s").why, shape.reason("time_s").fact)
        put("-j oe", "one log for both streams")
        put(f"-o {sub.run_dir}/logs/", "log of the batch shell; the folder is made before submission")
        put(
            f"-r {'n' if system.policy.requeue == 'forbidden' else 'y'}",
            "whether the scheduler may run the job again after a lost node",
            "policy.requeue" if system.policy.requeue else None,
        )
        if request.array:
            put(f"{array} 0-{request.tasks - 1}", "one task for each combination of --array")
        for flag in system.request.flags:
            put(flag, "every GPU job here needs it", "request.flags")
        return out

    def submit(self, run_dir: Path, *, test_only: bool = False) -> str:
        if test_only:
            raise UserError("PBS has no test of a script without submitting it", where="--test-only")
        script = str(run_dir / "submission" / "job.sh")
        done = ask("qsub", script)
        succeeded(done, "qsub refused the script", where=script)
        return done.stdout.strip()

    def query(self, job: str) -> Job | None:
        done = ask("qstat", "-x", "-f", job)
        if done.returncode != 0:
            done = ask("qstat", "-f", job)
        if done.returncode != 0:
            return None
        text = re.sub(r"\n\t", "", done.stdout)
        fields = dict(re.findall(r"^\s*([A-Za-z_.]+) = (.*)$", text, re.M))
        state = STATES.get(fields.get("job_state", "").strip(), "unknown")
        code = (fields.get("Exit_status") or fields.get("exit_status") or "").strip()
        if state == "done" and code not in ("", "0"):
            state = "cancelled" if code == "271" else "failed"
        return Job(
            id=job,
            state=state,
            reason=fields.get("comment"),
            nodes=fields.get("exec_host"),
            exit_code=code or None,
            raw=fields.get("job_state", ""),
        )

    def cancel(self, job: str) -> None:
        succeeded(ask("qdel", job), f"qdel {job}")


@register
class PbsPro(Pbs):
    """Nodes by ``select``, ranks by the site's mpiexec."""

    name = "pbspro"
    title = "PBS Pro"
    aliases = ("pbs",)
    schedulers = ("pbspro",)
    unseen = "no PBS server has seen this script: its directives were checked against PBS Pro's grammar only"
    styles = ("mpi", "torchrun")
    preflight = True

    def directives(self, sub: Submission) -> list[Line]:
        """All ``#PBS`` lines."""
        shape, select = sub.shape, sub.system.request.pbs_select
        chunk = [f"select={shape.nodes}"]
        if select:
            chunk.append(select)
        if shape.cpus_per_rank:
            chunk.append(f"mpiprocs={shape.ranks_per_node}")
        nodes = (":".join(chunk), "whole nodes of this kind, with one MPI process per GPU", "request.pbs_select")
        return self.pbs_lines(sub, [nodes], array="-J", short_name="older PBS allows 15 characters")

    def starter(self, sub: Submission) -> list[Line]:
        """``mpiexec`` with the site's own options, before ``rank.sh``; torchrun starts its ranks itself, on one
        node.
        """
        shape, system = sub.shape, sub.system
        if shape.style == "torchrun":
            return []
        words: list[tuple[str, str, str | None]] = [("mpiexec", "the site's process starter", "scheduler.launchers")]
        own = system.launch.mpiexec
        if not any(w in ("-n", "-np") for w in own):
            words += [("-n", "number of ranks", None), (str(shape.ranks), "number of ranks", None)]
        if not any(w in ("--ppn", "-ppn") for w in own):
            words += [("--ppn", "ranks on each node", None), (str(shape.ranks_per_node), "ranks on each node", None)]
        words += [(w, "the site's way of binding processes to cores and GPUs", "launch.mpiexec") for w in own]
        return [sub.line(quoted(text), why, fact) for text, why, fact in words]
