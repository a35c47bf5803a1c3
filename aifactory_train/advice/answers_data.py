"""Answers on storage, transfer, work plan, data protection, AI Act and risks."""

from __future__ import annotations

from aifactory_train.advice.said import MEASURED, UNSIZED, Case, Said, fact_of, gib, number, table

# ---- storage and transfer


def inputs(case: Case) -> Said:
    width = 4.0 if case.job.shape.vocab > 2**16 else 2.0  # data/store.py
    if case.report:
        train = case.report[1]["sets"]["train"]
        text = f"{train['documents']:,} documents, {train['tokens']:,} tokens"
        return Said(
            f"{text}, {gib(width * train['tokens'])} prepared", f"prepared data {case.report[0]}", status=MEASURED
        )
    tokens = case.plan["size"]["tokens_per_epoch"]
    if tokens is None:
        return Said(None, "", UNSIZED)
    text = f"{tokens:,.0f} tokens an epoch, {gib(width * tokens)} prepared"
    return Said(text, f"size: {case.plan['size']['source']}")


def base_files(case: Case) -> Said:
    text = f"{case.plan['base']}: {case.plan['parameters']:,} parameters, {gib(2.0 * case.plan['parameters'])} in bf16"
    return Said(text, "plan, parameters")


def checkpoints(case: Case) -> Said:
    b, keep = case.job.bytes, case.recipe.checkpoint.keep
    one = case.plan["trained_parameters"] * (b.parameters + b.optimizer)
    return Said(
        f"{gib(one)} each, {keep} kept beside the best: {gib((keep + 1) * one)}",
        "plan: trained parameters and moments",
    )


def results(case: Case) -> Said:
    size = 2 if case.recipe.export.dtype == "bf16" else 4
    count = case.plan["trained_parameters"] + (case.plan["parameters"] if case.recipe.export.merge else 0)
    return Said(f"{gib(float(size * count))} of weights, a report and the run's record", "plan; recipe, export")


def filesystem(case: Case) -> Said:
    place = case.system.filesystem("scratch") or case.system.filesystem("project")
    if place is None:
        return Said(None, "", f"the site: {case.system.help.support or 'support'}")
    i = case.system.filesystems.index(place)
    quota = f", quota {place.quota_gib:,g} GiB" if place.quota_gib else ""
    quota += f", {place.inodes:,} files" if place.inodes else ""
    return Said(
        f"{place.role} ({place.path or place.variable}{quota}); rows lie in a few large files",
        fact_of(case, f"filesystems.{i}"),
    )


def transfer(case: Case) -> Said:
    way = case.system.data.transfer
    if way is None:
        return Said(
            None, "", f"the site: {case.system.data.unknown.get('transfer') or case.system.help.support or 'support'}"
        )
    return Said(way, fact_of(case, "data.transfer"))


def internet(case: Case) -> Said:
    said = case.system.internet.compute
    if said is None:
        return Said(
            "not published: the job runs offline, models and data are brought before", "profile: internet.compute"
        )
    text = "the job needs none: models and data are brought before" if said == "none" else f"{said}; the job needs none"
    return Said(text, fact_of(case, "internet.compute"))


# ---- work plan, data protection, AI Act, risks


def steps(case: Case) -> Said:
    plan = case.plan
    if plan["hours"] is None:
        return Said(None, "", UNSIZED)
    rows = [
        ["fetch base and data, prepare rows", "login node", "no GPU-hours"],
        ["acceptance of the machine ('aifactory accept')", "1 node", "about ten minutes"],
        [
            f"{case.runs} run(s) of {plan['recipe']}",
            f"{plan['nodes']} node(s)",
            f"{number(case.runs * plan['hours'])} h",
        ],
        ["evaluation, export, report", "login node or 1 GPU", "not in the plan"],
    ]
    return Said(table(["step", "where", "time"], rows), "plan, hours; docs/acceptance.md")


def monitoring(case: Case) -> Said:
    text = "every step's loss, speed and energy in the run folder; 'aifactory status', 'report' and 'usage' show them"
    return Said(text, "docs/launching.md, docs/energy.md")


def sources(case: Case) -> Said:
    from aifactory_train.sources.licences import parents

    rows = [list(row) for row in dict.fromkeys((p.role, p.source, p.licence) for p in parents(case.recipe))]
    return Said(table(["role", "source", "licence"], rows), "recipe")


def personal_data(case: Case) -> Said:
    if case.report is None:
        return Said(None, "", "data protection officer: 'aifactory prepare' counts what looks like personal data")
    own = case.report[1].get("own") or {}
    if "personal_data" not in own:
        return Said(None, "", "data protection officer")
    counts = own["personal_data"].get("counts", {})
    found = (
        ", ".join(f"{n} x {kind}" for kind, n in counts.items()) or "nothing that looks like personal data was found"
    )
    return Said(f"{found} (by patterns and check digits)", f"prepared data {case.report[0]}", status=MEASURED)


def measures(case: Case) -> Said:
    profile = case.recipe.privacy.profile
    words = {
        "open": "permissions of files are checked; nothing is sent anywhere by the job",
        "sensitive": "no network, no core dumps, files readable by the user alone, no texts in logs",
        "restricted": "as sensitive, and data, checkpoints and exports are encrypted for a key of the applicant's",
    }
    return Said(f"profile {profile}: {words[profile]}", "recipe, privacy.profile; docs/sensitive-data.md")


def site_rule(case: Case) -> Said:
    data = case.system.data
    if data.sensitive is None:
        return Said(None, "", f"the site: {data.unknown.get('sensitive') or case.system.help.support or 'support'}")
    return Said(data.sensitive_rule or data.sensitive, fact_of(case, "data.sensitive"))


def ai_act(case: Case) -> Said:
    from aifactory_train.record import aiact

    plan = case.plan
    if plan["steps"] is None:
        return Said(None, "", UNSIZED)
    flop = plan["flops_per_token"]["model"] * plan["step_tokens"] * plan["steps"]
    base = aiact.base_of(plan["base"], case.recipe.record.base_flop)
    found = aiact.verdict(base, flop)
    return Said(
        found["reasoning"], "plan: FLOPs of a token x tokens; Commission Guidelines C(2025) 7719, points 17 and 60"
    )


def result_licence(case: Case) -> Said:
    from aifactory_train.sources.licences import result_licence as of

    found = of(case.recipe)
    return Said(f"{found['name'] or found['licence']}: {found['because']}", "recipe, licences of base and rows")


def record(case: Case) -> Said:
    text = "each run keeps a record: digests of data, base and code, machine, energy, compute; documents are made of it"
    return Said(text, "docs/evidence-pack.md")


def technical_risks(case: Case) -> Said:
    from aifactory_train.sites import known_faults

    rows = [["a node fails, or the time limit comes", "the run goes on from its last checkpoint"]]
    rows += [[fault.what, fault.remedy] for fault in known_faults.of_system(case.system)]
    return Said(table(["risk", "what is done"], rows), "docs/checkpoints.md; sites/known-faults.yaml")


def use_risks(case: Case) -> Said:
    return Said("; ".join(case.recipe.about.risks) or None, "recipe, about.risks")
