"""Answers on resources, software, parallelisation and scaling: from the plan, and from a measured campaign."""

from __future__ import annotations

from aifactory_train import __version__
from aifactory_train.advice.said import MEASURED, UNSIZED, Case, Said, fact_of, number, table

# ---- project, resources


def title(case: Case) -> Said:
    return Said(case.recipe.about.title, "recipe, about.title")


def abstract(case: Case) -> Said:
    return Said(case.recipe.about.summary.strip() or None, "recipe, about.summary")


def route(case: Case) -> Said:
    from aifactory_train.sites.access import access_file

    known = access_file().routes[case.route]
    said = [known.name, f"gives {known.what}"] + [f"runs {known.length}"] * bool(known.length)
    taken = access_file().sources[known.source]
    return Said("; ".join(said), f"sites/access.yaml: {taken.title} ({taken.retrieved or taken.date})")


def system(case: Case) -> Said:
    place = f", partition {case.plan['partition']}" if case.plan["partition"] else ""
    return Said(f"{case.system.name} ({case.system.operator}, {case.system.country}){place}", "plan")


def hardware(case: Case) -> Said:
    node, gpu = case.system.node, case.system.gpu
    counted = f", counted as {gpu.counted_as}" if gpu.counted_as else ""
    text = f"{node.gpus} x {gpu.model or gpu.sku} a node{counted}, {case.plan['capacity_gib']:.1f} GiB each"
    return Said(text, fact_of(case, "gpu.memory_gib"))


def derivation(case: Case) -> Said:
    plan = case.plan
    if plan["hours"] is None:
        return Said(None, "", UNSIZED)
    span = plan["gpu_hours_interval"]
    row = [
        plan["recipe"], case.runs, plan["nodes"], plan["gpus"], number(plan["hours"]),
        number(case.runs * plan["gpu_hours"]),
        f"{number(case.runs * span['low'])} to {number(case.runs * span['high'])}",
    ]  # fmt: skip
    columns = ["run", "times", "nodes", "GPUs", "hours each", "GPU-hours", "range of the model"]
    return Said(table(columns, [row]), f"plan: {plan['basis']}; {plan['steps']} steps; size: {plan['size']['source']}")


def gpu_hours(case: Case) -> Said:
    if case.plan["gpu_hours"] is None:
        return Said(None, "", UNSIZED)
    high = case.plan["gpu_hours_interval"]["high"]
    text = f"{number(case.runs * case.plan['gpu_hours'])}"
    text += f"; {number(case.runs * high)} at the upper end of the model's range"
    counted = case.system.gpu.counted_as
    return Said(text + (f" (a GPU is counted as {counted})" if counted else ""), "plan, gpu_hours and its interval")


def billed(case: Case) -> Said:
    bill = case.plan["billed"]
    if bill is None:
        ask = case.system.accounting.unknown.get("per_gpu_hour") or case.system.help.support or "the site"
        return Said(None, "", UNSIZED if case.plan["hours"] is None else f"the site: {ask}")
    unit = f"{bill['unit']}" + (f" ({bill['unit_is']})" if bill["unit_is"] else "")
    text = f"{number(case.runs * bill['amount'])} {unit}: {case.runs} x {bill['how']}"
    facts = ("accounting.per_node_hour", "accounting.per_gpu_hour")
    return Said(text, fact_of(case, next(path for path in facts if case.system.provenance(path))))


def job_size(case: Case) -> Said:
    return Said(f"{case.plan['nodes']} node(s), {case.plan['gpus']} GPU(s)", "plan")


def wall_time(case: Case) -> Said:
    if case.plan["hours"] is None:
        return Said(None, "", UNSIZED)
    name = case.plan["partition"]
    limit = case.system.limits(name)["max_time"] if name else None
    text = f"{number(case.plan['hours'])} h"
    if limit:
        text += f"; the limit is {limit / 3600:g} h"
        if case.plan["hours"] * 3600 > limit:
            text += ", so jobs follow each other from checkpoint to checkpoint"
    return Said(text, fact_of(case, f"partitions.{name}.max_time") if limit else "plan, hours")


def energy(case: Case) -> Said:
    if case.plan["kwh"] is None:
        return Said(None, "", UNSIZED if case.plan["hours"] is None else "the site: power of a GPU")
    co2 = case.plan["co2_kg"]
    text = f"{number(case.runs * case.plan['kwh'])} kWh" + (
        f", {number(case.runs * co2)} kg CO2" if co2 is not None else ""
    )
    return Said(text, "plan: 85 % of the GPUs' nominal power, GPUs alone")


# ---- software and parallelisation


def code(case: Case) -> Said:
    return Said(f"aifactory-train {__version__}, Apache-2.0; recipe {case.recipe.id}", "this program")


def libraries(case: Case) -> Said:
    names = ["PyTorch", "transformers", "PEFT"] if case.recipe.adapter.kind != "none" else ["PyTorch", "transformers"]
    traits = case.job.layout.traits
    names += [traits.package] if traits.package else []
    names += ["bitsandbytes"] if case.recipe.adapter.quantise_base != "none" else []
    names += ["Triton kernels of aifactory-train"] if case.plan["kernels"]["enabled"] else []
    return Said(", ".join(names), "plan; versions: constraints.txt of aifactory-train")


def on_site(case: Case) -> Said:
    software = case.system.software
    image = case.system.user.container_image or next((c.image for c in software.containers if c.image), None)
    found = [f"container {image}"] if image else []
    found += [f"modules {' '.join(software.modules)}"] if software.modules else []
    if not found:
        return Said(
            "a Python environment of its own ('aifactory env --site')", "profile: no image and no module is named"
        )
    return Said("; ".join(found), fact_of(case, "software.containers" if image else "software.modules"))


def method(case: Case) -> Said:
    plan = case.plan
    words = {
        "full": "all weights are trained",
        "lora": "low-rank adapters",
        "qlora": "low-rank adapters on a 4-bit base",
    }
    share = plan["trained_parameters"] / plan["parameters"]
    text = f"{words[plan['method']]}: {plan['trained_parameters']:,} of {plan['parameters']:,} parameters ({share:.2%})"
    return Said(f"{text}; base {plan['base']}; task: {case.recipe.about.task}", "plan")


def parallelisation(case: Case) -> Said:
    plan = case.plan
    mesh = plan["mesh"]
    means = case.job.layout.traits.means.format(shard=mesh["shard"])
    wire = "RCCL" if case.system.gpu.vendor == "amd" else "NCCL"
    text = (
        f"engine {plan['engine']} ({means}); {plan['gpus']} ranks as {mesh['replicate']} x {mesh['shard']} (replicate "
        f"x shard); micro-batch {plan['micro_batch']} x {plan['sequence_length']} tokens, {plan['grad_accum']} a step; "
        f"{plan['step_tokens']:,.0f} tokens a step; one process a GPU, {wire} between them"
    )
    return Said(text, "plan")


def memory(case: Case) -> Said:
    parts = [[name, f"{value:.2f}"] for name, value in case.plan["memory_gib"].items() if value]
    parts.append(["GPU", f"{case.plan['capacity_gib']:.2f}"])
    return Said(table(["component", "GiB at the peak"], parts), "plan: tensors counted")


def precision(case: Case) -> Said:
    size = {2: "bf16", 4: "fp32"}
    b = case.job.bytes
    master = size.get(int(b.parameters), f"{b.parameters:g} bytes")
    return Said(f"bf16 arithmetic, {master} trained parameters, reductions in {size[int(b.reduce)]}", "plan")


def performance(case: Case) -> Said:
    speed = case.plan["tokens_per_s_per_gpu"]
    text = f"{speed['mid']:,.0f} tokens/s a GPU ({speed['low']:,.0f} to {speed['high']:,.0f}), "
    text += f"{100 * case.plan['mfu']:.0f} % of the dense bf16 peak"
    return Said(text, f"plan: {case.plan['basis']}")


def restart(case: Case) -> Said:
    every = case.recipe.checkpoint.every_steps
    when = f"every {every} steps" if every else "when it is stopped and at the end"
    text = f"checkpoints {when}, and before the time limit; a run goes on from the last, also on another number of GPUs"
    return Said(text, "recipe, checkpoint; docs/checkpoints.md")


# ---- scaling


def scaling_measured(case: Case) -> Said:
    measured = case.scaling
    if measured is None:
        command = f"aifactory scale {case.recipe.id} --site {case.system.id} --nodes 1,2,4 --repeats 3 --cap GPUH"
        return Said(None, "", f"applicant: {command}, then --scaling FILE")
    rows = [
        [r["kind"], r["nodes"], r["gpus"], r["repeats"], f"{r['tokens_per_s']:,.0f}", f"{r['spread']:.1%}",
         f"{r['efficiency']:.0%}"]
        for r in measured["points"]
    ]  # fmt: skip
    columns = ["scaling", "nodes", "GPUs", "runs", "tokens/s", "spread", "efficiency"]
    return Said(
        table(columns, rows), f"{measured['source']} at {measured['site']}, {measured['date']}", status=MEASURED
    )


def scaling_modelled(case: Case) -> Said:
    first = case.plan["scaling"][0]
    rows = [
        [p["nodes"], p["gpus"], p["engine"], f"{p['tokens_per_s']:,.0f}",
         f"{p['tokens_per_s'] * first['nodes'] / first['tokens_per_s'] / p['nodes']:.0%}"]
        for p in case.plan["scaling"]
    ]  # fmt: skip
    return Said(table(["nodes", "GPUs", "engine", "tokens/s", "efficiency"], rows), f"plan: {case.plan['basis']}")
