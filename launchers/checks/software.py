"""Rules on what the job runs with: container, modules, Python environment, number formats, engine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.launchers.checks.rules import (
    Context,
    Finding,
    batch_rule,
    lies_in,
    not_checked,
    recipe_rule,
    refuse,
    rule,
    warn,
)
from aifactory_train.launchers.container import IMAGE_ROOTS, container_of, env_folder, image_commands, uenv_of


@batch_rule
def container_runtime(c: Context) -> Iterator[Finding]:
    """A container is asked for only where a runtime is known."""
    if c.backend.software == "site" and c.request.container and not c.system.software.containers:
        yield warn(f"no container runtime is published for {c.system.name}: apptainer is assumed")


@rule
def container_needed(c: Context) -> Iterator[Finding]:
    """A pod needs an image."""
    if c.backend.software == "image" and not (c.request.container or c.system.user.container_image):
        what = f"{c.system.name} runs pods: an image with torch and aifactory-train must be named"
        fix = "--container REGISTRY/IMAGE, or user.container_image in your site file"
        yield refuse(what, fix=fix, where="--container") if c.submitting else warn(what, fix=fix)


@batch_rule
def image_needed(c: Context) -> Iterator[Finding]:
    """An image or a uenv is named where the bare host lacks NCCL's plug-in for the fabric."""
    if not c.system.software.needs_image or c.backend.software != "site":
        return
    if container_of(c.request, c.system) is not None or uenv_of(c.request, c.system):
        return
    plugin = c.system.interconnect.plugin or "the plug-in of the fabric"
    same = f"aifactory launch {c.request.recipe} --site {c.system.id}"
    commands = image_commands(c.system)
    make = f"\n    {commands[1]}\n    {commands[2]} && bash build-env.sh\n  " if commands else " "
    yield refuse(
        f"{c.system.name} has {plugin} in container images and uenvs only: without one NCCL ends at its first step",
        c.fact("software.needs_image"),
        f"make an image and the environment over it:{make}and '{same} --container IMAGE' (a .sqsh file, "
        f"registry#repository:tag or your own EDF in .toml; or user.container_image in your site file). Or take a uenv "
        f"('uenv image pull NAME/VERSION:TAG', 'aifactory env --site {c.system.id}' run inside it) and '{same} "
        f"--directive=--uenv=NAME/VERSION:TAG --directive=--view=VIEW'. An environment that brings the plug-in itself: "
        f"correct software.needs_image to false in your site file",
        "--container",
    )


@rule
def container_folder(c: Context) -> Iterator[Finding]:
    """Images lie where the site lets them run from."""
    own = c.request.container or c.system.user.container_image
    for container in c.system.software.containers[:1]:
        dirs = [d for d in container.image_dirs if "$" not in d]
        # The folder of the site's own images is an offer, not a rule; a rule has a variable or no image of its own.
        if own and dirs and container.image is None and not lies_in(own, dirs):
            yield refuse(
                f"{own}: {c.system.name} runs images from {', '.join(dirs)} only",
                c.fact("software.containers"),
                "copy the image there",
                "--container",
            )


@batch_rule
def container_present(c: Context) -> Iterator[Finding]:
    """The image is there."""
    if c.backend.software != "site":
        return
    container = container_of(c.request, c.system)
    if container is None or not container.image:
        return
    if not c.here:
        yield not_checked(f"the image {container.image} at {c.system.name}")
    elif container.runtime in ("singularity", "apptainer", "sarus") and not Path(container.image).exists():
        yield refuse(
            f"the image {container.image} is not there",
            fix="--container FILE, or user.container_image in your site file",
            where="--container",
        )


@batch_rule
def modules_present(c: Context) -> Iterator[Finding]:
    """The modules can be loaded (only the site can tell)."""
    modules = c.system.user.modules if c.system.user.modules is not None else c.system.software.modules
    if modules and c.backend.software == "site":
        command = os.environ.get("LMOD_CMD") or shutil.which("modulecmd")
        if not (c.here and command):
            yield not_checked(f"the modules {' '.join(modules)} at {c.system.name}")
            return
        from aifactory_train.launchers.site_commands import missing_modules

        for name in missing_modules(command, c.system.software.use, modules):
            yield refuse(
                f"there is no module {name}",
                c.fact("software.modules"),
                "'module spider' lists what is there; user.modules in your site file replaces the list",
                "--site",
            )


@batch_rule
def environment_present(c: Context) -> Iterator[Finding]:
    """The Python environment is there."""
    if c.backend.software != "site":
        return
    named = c.request.venv or c.system.user.venv
    folder = named or (env_folder(c.system) if not c.system.software.provides_torch else None)
    if folder is None:
        return
    box = container_of(c.request, c.system)
    if not c.here:
        yield not_checked(f"the Python environment {folder} at {c.system.name}")
    elif named and box is not None and f"{named}/".startswith(IMAGE_ROOTS):
        yield not_checked(f"the Python environment {folder} in the image")
    elif named and not (Path(folder) / "bin" / "python").exists():
        yield refuse(
            f"{folder} is no Python environment: it has no bin/python",
            fix=f"'aifactory env --site {c.system.id}' writes the script that builds one",
            where="--venv",
        )
    elif not named and box is not None and not os.path.lexists(Path(folder) / "bin" / "python"):
        # The interpreter is the image's: on this side of it the link may lead nowhere.
        image = f" --container {c.request.container}" if c.request.container else ""
        yield refuse(
            f"the image has no environment yet: {folder} is not there",
            fix=f"'aifactory env --site {c.system.id}{image} --output build-env.sh', then 'bash build-env.sh'; a "
            "Python that the image holds: --venv /opt/…",
            where="--container",
        )
    elif not named and box is None and _bare(c):
        yield refuse(
            f"there is no environment yet: {sys.executable}, which the ranks would run with, has no torch",
            fix=f"'aifactory env --site {c.system.id} --output build-env.sh', then 'bash build-env.sh'; name another "
            "with --venv",
            where="--venv",
        )


def _bare(c: Context) -> bool:
    """Neither this Python nor a module that the job loads may bring torch."""
    modules = c.system.user.modules if c.system.user.modules is not None else c.system.software.modules
    return not modules and not c.system.software.provides_torch and find_spec("torch") is None


@batch_rule
def environment_isa(c: Context) -> Iterator[Finding]:
    """The environment is built for the compute nodes' instruction set, not for the login node's."""
    folder, isa = c.request.venv or c.system.user.venv, c.system.node.isa
    if not (folder and isa and Path(folder).is_dir()):
        return
    built = isa_of(Path(folder))
    if built is not None and built != isa:
        yield refuse(
            f"{folder} is built for {built}, compute nodes of {c.system.name} are {isa}",
            c.fact("node.isa"),
            f"'aifactory env --site {c.system.id}' builds one for {isa}",
            "--venv",
        )


def isa_of(folder: Path) -> str | None:
    """Instruction set of a virtual environment, from the ELF header of its interpreter or an extension module."""
    candidates = [folder / "bin" / "python", *sorted(folder.glob("lib/python3*/site-packages/*.so"))[:1]]
    for path in candidates:
        try:
            with open(path, "rb") as file:
                head = file.read(20)
        except OSError:
            continue
        if head[:4] == b"\x7fELF":
            machine = int.from_bytes(head[18:20], "little")
            return {62: "x86_64", 183: "aarch64"}.get(machine)
    return None


@batch_rule
def precision_supported(c: Context) -> Iterator[Finding]:
    """The GPU has the number format that the recipe asks for."""
    if c.request.accept is not None:
        return
    asked = {c.recipe.precision.compute, c.recipe.precision.parameters}
    if "bf16" in asked and c.system.gpu.peak_tflops and not c.system.gpu.has_bf16:
        yield refuse(
            f"the recipe asks for bf16, {c.system.gpu.model} ({c.system.gpu.arch}) has none",
            c.fact("gpu.peak_tflops"),
            "--set precision.compute=auto",
            "precision",
        )


@recipe_rule
def quantisation_supported(c: Context) -> Iterator[Finding]:
    """An 8-bit optimizer has the engine that it needs, a 4-bit base also the packages.

    Whether bitsandbytes can quantise on the device, GPU or CPU, is asked by training itself before it loads anything.
    """
    from aifactory_train.parallel.traits import refuse_optimizer, refuse_quantised

    for cannot in (refuse_optimizer, refuse_quantised):
        try:
            cannot(c.recipe, c.recipe.parallel.engine)
        except UserError as error:
            yield refuse(error.what, fix=error.fix, where=error.where)
    if c.recipe.adapter.quantise_base == "none":
        return
    own_environment = c.request.venv or c.system.user.venv
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing and not c.batch and not own_environment:
        yield refuse(
            f"a 4-bit base needs {' and '.join(missing)}, not installed here",
            fix="pip install 'aifactory-train[qlora]', or --set adapter.quantise_base=none",
            where="adapter.quantise_base",
        )


@recipe_rule
def engine_fits_ranks(c: Context) -> Iterator[Finding]:
    """The shard size divides the ranks."""
    size = c.recipe.parallel.copy_ranks
    if size and c.shape.ranks % size:
        yield refuse(
            f"{c.shape.ranks} ranks are no multiple of parallel.shard_size {size}",
            fix="change --nodes or the shard size",
            where="parallel.shard_size",
        )


@recipe_rule
def batch_fits_ranks(c: Context) -> Iterator[Finding]:
    """A step has at least one document for each rank."""
    rows = c.recipe.train.batch_rows
    if rows is not None and rows < c.shape.ranks:
        # Not refused: the step is defined by documents, so the curve is right; only GPU-hours are wasted.
        yield warn(
            f"{rows} documents per step for {c.shape.ranks} ranks: {c.shape.ranks - rows} have nothing to do and burn "
            f"GPU-hours",
            fix=f"fewer nodes, or --set train.batch_rows={c.shape.ranks}",
        )


@recipe_rule
def plan_possible(c: Context) -> Iterator[Finding]:
    """The planner finds a way to train it there: memory, engine, division of a step over the ranks."""
    plan = c.sub.plan
    if plan and plan.get("fits") is False:
        yield refuse(
            str(plan.get("reason")),
            fix=plan.get("fix") or "'aifactory plan' tells what would be possible",
            where=plan.get("where"),
        )
