"""What ``aifactory sites`` tells of access, cost, login, queue, data and help, and of faults that are known."""

from __future__ import annotations

from typing import Any


def show_access(member: dict[str, Any]) -> None:
    """Where to run today, how to get access and whom to ask, for one member (a row of the index)."""
    from aifactory_train.sites.access import of_member

    access = of_member(member["id"])
    own, linked = member["systems"], member["linked_systems"]
    print("\nwhere to run today: " + (", ".join(own) or ", ".join(linked) or "on EuroHPC systems, by the routes below"))
    for system in own:
        print(f"  aifactory sites {system}: partitions, limits, what an hour costs, login, help")
    print("how to get access:")
    for route in access["routes"]:
        print(f"  {route['name']}: {route['what']}")
        rest = [("for", "who"), ("runs", "length"), ("decided", "decision"), ("cost", "cost")]
        print("    " + "; ".join(f"{label}: {route[key]}" for label, key in rest if route.get(key)))
        print(f"    {route['link']} (as of {route['as_of']}, {route['confidence']})")
    if access["note"]:
        print(f"  note: {access['note']}")
    for text in access["common"]:
        print(f"  note: {text}")
    unknown = "" if access["contact_known"] else "not published by the member as far as was found; "
    print(f"whom to ask: {unknown}{access['contact']}")


def summary(system: Any) -> list[tuple[str, str]]:
    """What a user asks before and after a job, a line each."""
    bill, login, queue, data, helps = system.accounting, system.login, system.queue, system.data, system.help
    rates = [f"{bill.per_node_hour:g} a node and hour" if bill.per_node_hour else ""]
    rates += [f"{bill.per_gpu_hour:g} a GPU and hour" if bill.per_gpu_hour else ""]
    rates += [f"what is left: {bill.balance_command}" if bill.balance_command else ""]
    factor = f"second factor: {login.second_factor}" if login.second_factor else ""
    hours = f", for {login.certificate_hours:g} h" if login.certificate_hours else ""
    lines = [
        ("billed in", [bill.unit or "", *rates] if bill.unit else []),
        ("login by", [login.method + hours if login.method else "", factor, _jump(login.jump_host)]),
        ("queue", [f"at most {queue.max_submitted} jobs of one user" if queue.max_submitted else ""]),
        ("data", [data.transfer or "", f"quota: {data.quota_command}" if data.quota_command else ""]),
        ("model cache", [data.model_cache or ""]),
        ("help", [helps.support or "", helps.documentation or "", f"status: {helps.status}" if helps.status else ""]),
    ]
    members = _members(system.id)
    if members:
        lines.append(("access", [f"by way of {' or '.join(members)}: aifactory sites {members[0]}"]))
    return [(label, "; ".join(filter(None, parts))) for label, parts in lines]


def _jump(host: str | None) -> str:
    return f"through {host}" if host and host != "none" else ""


def _members(system: str) -> list[str]:
    from aifactory_train.sites.index import load_index

    return [m["id"] for m in load_index()["members"] if system in m["systems"]]


def show_unknown(system: Any) -> None:
    """What nobody has published, with where one would ask."""
    from aifactory_train.sites.services import SECTIONS

    rows = [(f"{key}.{name}", ask) for key in SECTIONS for name, ask in getattr(system, key).unknown.items()]
    if rows:
        print("\nnot published; ask:")
        width = max(len(name) for name, _ in rows)
        for name, ask in rows:
            print(f"  {name:{width}}  {ask}")


def show_known_faults(system: Any) -> None:
    """Faults that may meet a job there, with remedy and source."""
    from aifactory_train.sites import known_faults

    found = known_faults.of_system(system)
    if found:
        print("\nknown faults")
    for fault in found:
        print(f"- {fault.sentence()}")
