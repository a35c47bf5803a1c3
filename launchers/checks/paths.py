"""Rules on where the run folder lies and which variables the job gets."""

from __future__ import annotations

from collections.abc import Iterator

from aifactory_train.core.secrets import NAME as SECRET
from aifactory_train.core.secrets import holds_secret
from aifactory_train.launchers.checks.rules import Context, Finding, batch_rule, lies_in, not_checked, refuse, rule
from aifactory_train.launchers.environment import OWNED


@batch_rule
def run_folder_visible(c: Context) -> Iterator[Finding]:
    """The run folder lies where compute nodes see it."""
    run = str(c.sub.run_dir)
    under, never = c.system.launch.output_must_be_under, c.system.launch.output_must_not_be_under
    unseen = f"{run} is not visible on compute nodes of {c.system.name}: the job would end without a log"
    if under and not lies_in(run, under):
        if c.request.run_dir or c.here:
            below = f"--run-dir below {' or '.join(under)}"
            yield refuse(unseen, c.fact("launch.output_must_be_under"), below, "--run-dir")
        else:
            yield not_checked(
                f"the run folder must lie below {' or '.join(under)} there",
                fix="--run-dir, or user.work_dir in your site file",
            )
    if lies_in(run, never):
        fact = c.fact("launch.output_must_not_be_under")
        yield refuse(unseen, fact, "choose another --run-dir", "--run-dir")


@batch_rule
def run_folder_on_shared_disk(c: Context) -> Iterator[Finding]:
    """The run folder is not on a node's own disk."""
    run = str(c.sub.run_dir)
    local = [fs.path for fs in c.system.filesystems if fs.role == "node-local" and fs.path and "$" not in fs.path]
    if c.request.run_dir and lies_in(run, local or ["/tmp"]) and c.system.id != "lab":
        yield refuse(
            f"{run} is on the node's own disk: other nodes do not see it and it is gone after the job",
            c.fact("filesystems"),
            "choose a --run-dir on a shared file system",
            "--run-dir",
        )


@batch_rule
def run_folder_quota(c: Context) -> Iterator[Finding]:
    """The run folder is not in a small home."""
    run = str(c.sub.run_dir)
    for fs in c.system.filesystems:
        if fs.role == "home" and fs.path and fs.quota_gib and fs.quota_gib < 100 and c.request.run_dir:
            root = fs.path.replace("{user}", c.environ.get("USER", ""))
            if root != "/" and "{" not in root and "$" not in root and lies_in(run, [root]):
                yield refuse(
                    f"{run} is in a home of {fs.quota_gib:g} GiB: checkpoints do not fit",
                    c.fact("filesystems"),
                    "choose a --run-dir in project or scratch space",
                    "--run-dir",
                )


@rule
def env_owned(c: Context) -> Iterator[Finding]:
    """Variables of launcher, scheduler and shell are not set by users."""
    for name, _ in c.variables:
        if OWNED.fullmatch(name):
            yield refuse(
                f"{name} belongs to the launcher, the scheduler or the shell", fix="leave it out", where=f"--env {name}"
            )


@rule
def env_secret(c: Context) -> Iterator[Finding]:
    """No secret goes into the files of a submission."""
    for name, value in c.variables:
        if SECRET.search(name) or holds_secret(value):
            what = name if SECRET.search(name) else f"the value of {name}"
            yield refuse(
                f"{what} looks like a secret; the files of a submission are kept and read by others",
                fix="jobs need none: fetch model and data on the login node with 'aifactory fetch'",
                where=f"--env {name}",
            )


@batch_rule
def env_avoid(c: Context) -> Iterator[Finding]:
    """Variables that break jobs at the site are not set."""
    for name, value in c.variables:
        for key in (name, f"{name}={value}"):
            if key in c.system.environment.avoid:
                yield refuse(
                    f"{key} must not be set at {c.system.name}: {c.system.environment.avoid[key]}",
                    c.fact(f"environment.avoid.{key}") or c.fact("environment.avoid"),
                    f"leave it out; if you know better, correct environment.avoid.{key} to null in your site file",
                    f"--env {name}",
                )
