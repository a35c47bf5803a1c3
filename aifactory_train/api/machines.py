"""Systems of the AI Factories, plans for them, and jobs on them. Needs no torch, no GPU and no network."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aifactory_train.api import showing
from aifactory_train.api.preparing import AnyRecipe, overrides_of, recipe_file
from aifactory_train.core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Systems(Sequence[dict[str, Any]]):
    """Systems, each a mapping: ``id``, ``name``, ``country``, ``gpu``, ``gpu_memory_gib``, ``gpus_per_node``,
    ``nodes``, ``status`` (``usable``, ``announced``, ``unsuitable``), ``members`` (whose AI Factory or Antenna it
    serves) and more. What is None is not published.

    >>> import aifactory_train as af
    >>> [system["id"] for system in af.systems(country="Finland")]
    ['lumi-g']
    """

    rows: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        return self.rows[number]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def _repr_html_(self) -> str:
        columns = ("id", "country", "gpu", "gpu_memory_gib", "gpus_per_node", "nodes", "readiness")
        rows = [[row["id"], *("" if row[c] is None else row[c] for c in columns[1:])] for row in self.rows]
        names = ["system", "country", "GPU", "GiB", "GPUs a node", "nodes", "what was tried"]
        return showing.fragment(f"{len(self.rows)} systems", [showing.table(names, rows)])


def systems(*, country: str | None = None, usable: bool | None = True) -> Systems:
    """The systems that the AI Factories and Antennas offer.

    Args:
        country: code or English name of the country that a system stands in, or whose factory uses it.
        usable: only those that can be used today (True), only the others (False), or all (None).

    Raises :class:`UserError` for a country without an AI Factory or Antenna.

    >>> import aifactory_train as af
    >>> "leonardo-booster" in [system["id"] for system in af.systems()]
    True
    """
    from aifactory_train.sites.index import load_index

    index = load_index()
    wanted: set[str] | None = None
    if country is not None:
        names = {m["country"].casefold(): m["country"] for m in index["members"]}
        names |= {m["country_name"].casefold(): m["country"] for m in index["members"]}
        code = names.get(country.casefold())
        if code is None:
            known = sorted(m["country_name"] for m in index["members"])
            hint = did_you_mean(country, known)
            raise UserError(f"no AI Factory or Antenna in '{country}'{hint}", where="country", fix=", ".join(known))
        wanted = {s["id"] for s in index["systems"] if s["country"] == code}
        wanted |= {s for m in index["members"] if m["country"] == code for s in (*m["systems"], *m["linked_systems"])}
    found = []
    for row in index["systems"]:
        if (usable is None or (row["status"] == "usable") is usable) and (wanted is None or row["id"] in wanted):
            serves = [m["id"] for m in index["members"] if row["id"] in (*m["systems"], *m["linked_systems"])]
            found.append({**row, "members": serves})
    return Systems(tuple(found))


@dataclass(frozen=True, repr=False)
class Answer(Mapping[str, Any]):
    """What a command prints with ``--json``, by name."""

    values_by_name: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class Plan(Answer):
    """A plan: every value that ``aifactory plan --json`` prints, as a mapping. What is None is not known.

    >>> import aifactory_train as af
    >>> plan = af.plan("health/phenotype-terms", on="lumi-g", gpus_per_node=1, tokens=1e6)
    >>> plan["gpus"], plan["engine"]
    (1, 'ddp')
    >>> sorted(plan.settings)[:1]
    ['kernels.enabled']
    """

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the plan, as :func:`aifactory_train.recipe` takes them."""
        return dict(self["overrides"])

    @property
    def reasons(self) -> list[str]:
        """Why it is planned so, one sentence each."""
        return list(self["reasons"])

    def __repr__(self) -> str:
        hours = "unknown" if self["gpu_hours"] is None else f"{self['gpu_hours']:.4g}"
        return f"<Plan of {self['recipe']} on {self['gpus']} GPU(s) of {self['site']}: {hours} GPU-hours>"

    def _repr_html_(self) -> str:
        from markupsafe import Markup

        from aifactory_train.planning.page import memory_stack, scaling_curve

        speed, billed = self["tokens_per_s_per_gpu"], self.get("billed")
        hours = ["unknown" if self[key] is None else f"{self[key]:.4g}" for key in ("hours", "gpu_hours")]
        cost = f"{billed['amount']:.4g} {billed['unit']}" if billed else "unknown"
        rows = [
            ["engine", self["engine"]],
            ["tokens/s per GPU", f"{speed['mid']:.0f} ({speed['low']:.0f} to {speed['high']:.0f}, modelled)"],
            ["hours", hours[0]],
            ["GPU-hours", hours[1]],
            ["billed there", cost],
        ]
        reasons = Markup("").join(Markup("<li>{}</li>").format(reason) for reason in self.reasons)
        title = f"{self['recipe']} ({self['base']}) on {self['nodes']} node(s), {self['gpus']} GPU(s) of {self['site']}"
        parts = [showing.table(["", "planned"], rows), Markup(memory_stack(self.values_by_name))]
        parts += [Markup(scaling_curve(self.values_by_name)), Markup("<ul>{}</ul>").format(reasons)]
        return showing.fragment(title, parts)


def plan(
    recipe: AnyRecipe,
    *,
    on: str,
    nodes: int | str = 1,
    gpus_per_node: int | None = None,
    partition: str | None = None,
    tokens: float | None = None,
    deadline_hours: float | None = None,
    budget_gpu_hours: float | None = None,
    settings: Mapping[str, Any] | None = None,
    site_file: str | None = None,
) -> Plan:
    """Memory, strategy, speed, time and cost of a recipe at a site, with reasons.

    Args:
        recipe: id or file of a recipe, or what :func:`aifactory_train.recipe` gave.
        on: id of a system (:func:`systems`), or the AI Factory that has just one.
        nodes: number of nodes, or ``"auto"`` with ``deadline_hours`` or ``budget_gpu_hours``.
        gpus_per_node: default: all of a node.
        tokens: of one epoch; default: from the prepared data, else the time stays unknown.
        site_file: your own values for the site (account, price, paths).

    Raises:
        UserError: an unknown site, a request that the site does not take, a model that does not fit.

    >>> import aifactory_train as af
    >>> sites = ["lumi-g", "leonardo-booster"]
    >>> plans = [af.plan("health/phenotype-terms", on=s, gpus_per_node=1, tokens=1e6) for s in sites]
    >>> [round(plan["memory_gib"]["total"]) < plan["capacity_gib"] for plan in plans]
    [True, True]
    """
    from aifactory_train.commands import plan as command

    words = [recipe_file(recipe), "--site", system_of(on), "--nodes", str(nodes)]
    words += _options(
        gpus_per_node=gpus_per_node,
        partition=partition,
        tokens=tokens,
        deadline=deadline_hours,
        budget=budget_gpu_hours,
        site_file=site_file,
    )
    words += [word for text in overrides_of(settings) for word in ("--set", text)]
    return Plan(command.build(_parsed(command, words))[0])


class SitesRanked(Answer):
    """Sites ranked for a job, as ``aifactory where --json`` describes them: ``sites``, each with ``id``, ``fits``,
    ``why``, ``hours``, ``gpu_hours``, ``billed``, ``kwh``, ``access`` and more (docs/where.md); ``asked`` and ``size``.

    >>> import aifactory_train as af
    >>> found = af.where("health/phenotype-terms", country="Finland", sme=True, tokens=1e6)
    >>> found["sites"][0]["id"], len(found) > 3
    ('lumi-g', True)
    """

    def __repr__(self) -> str:
        fitting = [site["id"] for site in self["sites"] if site["fits"]]
        return f"<SitesRanked for {self['recipe']}: {', '.join(fitting[:3]) or 'none fits'} of {len(self['sites'])}>"

    def _repr_html_(self) -> str:
        rows = []
        for site in self["sites"]:
            if site["fits"]:
                billed = site["billed"] or {}
                cost = "" if billed.get("amount") is None else f"{billed['amount']:.4g} {billed['unit']}"
                hours = "" if site["hours"] is None else f"{site['hours']:.4g}"
                rows.append([site["id"], hours, cost, ", ".join(route["id"] for route in site["access"])])
        table = showing.table(["system", "hours", "billed there", "routes open to you"], rows)
        return showing.fragment(f"where to run {self['recipe']}", [table])


def where(
    recipe: AnyRecipe,
    *,
    country: str | None = None,
    sme: bool = False,
    sensitive: bool = False,
    deadline_hours: float | None = None,
    budget_gpu_hours: float | None = None,
    tokens: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> SitesRanked:
    """All systems of the 32 factories and antennas, ranked for this recipe and this applicant.

    Args:
        country: code or English name of where you are established.
        sme: you are a small or medium company, or a start-up.
        sensitive: the data are personal data of special categories.
        tokens: of one epoch; default: from the prepared data, else the time stays unknown.

    Raises:
        UserError: a country that does not take part, a deadline or budget without a known size.

    >>> import aifactory_train as af
    >>> af.where("health/phenotype-terms", country="IE", sme=True, tokens=1e6)["asked"]["country"]
    'IE'
    """
    from aifactory_train.commands import where as command

    words = [recipe_file(recipe), *(["--sme"] if sme else []), *(["--sensitive"] if sensitive else [])]
    words += _options(country=country, deadline=deadline_hours, budget=budget_gpu_hours, tokens=tokens)
    words += [word for text in overrides_of(settings) for word in ("--set", text)]
    return SitesRanked(command.build(_parsed(command, words)))


class Launched(Answer):
    """A job, as ``aifactory launch --json`` describes it: ``run_dir``, ``jobs`` (ids of the scheduler), ``findings``
    of the checks, ``script`` with ``dry_run``.

    >>> import aifactory_train as af
    >>> job = af.launch("recipe.yaml", on="local", dry_run=True)
    >>> job["site"], job["ranks"]
    ('local', 1)
    """

    @property
    def warnings(self) -> list[str]:
        """What the checks warn of."""
        return [str(f["what"]) for f in self["findings"] if f["level"] == "warn"]

    def __repr__(self) -> str:
        return f"<Launched {self['name']} on {self['site']}: {', '.join(self.get('jobs') or []) or 'not submitted'}>"

    def _repr_html_(self) -> str:
        from markupsafe import Markup

        names = ("site", "partition", "nodes", "gpus_per_node", "ranks", "gpu_hours_most", "run_dir")
        rows = [[name.replace("_", " "), "" if self[name] is None else self[name]] for name in names]
        parts = [showing.table(["", ""], [*rows, ["jobs", ", ".join(self.get("jobs") or [])]])]
        parts += [showing.paragraph(f"warning: {line}") for line in self.warnings]
        if "\n" in str(self.get("script", "")):
            script = Markup("<details><summary>script</summary><pre>{}</pre></details>")
            parts.append(script.format(self["script"]))
        return showing.fragment(str(self["name"]), parts)


def launch(
    recipe: AnyRecipe,
    *,
    on: str = "local",
    nodes: int = 1,
    gpus_per_node: int | None = None,
    name: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    time: str | None = None,
    settings: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    options: Sequence[str] = (),
) -> Launched:
    """Write, check and submit the batch script of a site; ``on="local"`` runs here and waits for the end.

    Args:
        recipe: id or file of a recipe, or what :func:`aifactory_train.recipe` gave.
        on: id of a system, or the AI Factory that has just one.
        time: ``HH:MM:SS``, ``90m``, ``24h`` or ``2d``.
        dry_run: submit nothing and write no run folder; the script stands in ``["script"]``.
        options: further options of ``aifactory launch``, as on the command line.

    Raises:
        UserError: a rule of the site that the request breaks, all at once, each with its source and a fix.

    >>> import aifactory_train as af
    >>> job = af.launch("recipe.yaml", on="local", nodes=1, dry_run=True)
    >>> job["script"].startswith("#!")
    True
    """
    from aifactory_train.commands import launch as command

    system = system_of(on)
    words = [recipe_file(recipe), "--site", system, "--nodes", str(nodes), "--json"]
    words += _options(gpus_per_node=gpus_per_node, name=name, partition=partition, account=account, time=time)
    words += ["--dry-run"] if dry_run else []
    words += [word for text in overrides_of(settings) for word in ("--set", text)]
    found = json_of(command, [*words, *options])
    return Launched(found)


def system_of(name: str) -> str:
    """The id of a system, also by the AI Factory that has just one that can be used (``lumi`` is ``lumi-g``)."""
    from aifactory_train.sites.index import load_index

    index = load_index()
    known = {word for s in index["systems"] for word in (s["id"], *s["aliases"])}
    if name in known or name == "local" or name.endswith((".yaml", ".yml")):
        return name
    short = name.casefold().replace(" ", "-")
    owners = [m for m in index["members"] if short in (m["id"], m["id"].removesuffix("-aif"), m["name"].casefold())]
    usable = {s["id"] for s in index["systems"] if s["status"] == "usable"}
    theirs = [s for m in owners for s in m["systems"] if s in usable]
    return theirs[0] if len(theirs) == 1 else name  # refused by name, with what was perhaps meant


def json_of(command: Any, words: Sequence[str]) -> dict[str, Any]:
    """What a command prints as JSON. Raises what it raises."""
    from aifactory_train.core import output

    args = _parsed(command, words)
    with contextlib.redirect_stdout(io.StringIO()) as printed, output.json_only():
        command.run(args)
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def _parsed(command: Any, words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command. Raises :class:`UserError` where argparse would end the program."""
    parser = _Parser(prog=command.__name__.rpartition(".")[2], allow_abbrev=False)
    command.add_arguments(parser)
    return parser.parse_args(list(words))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(message, where=self.prog)


def _options(**values: object) -> list[str]:
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in values.items() if value is not None}
    return [f"{name}={value}" for name, value in given.items()]
