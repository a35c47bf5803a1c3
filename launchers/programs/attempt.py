"""Book-keeping of one attempt, inside the job: begin it, watch it, close it and decide what comes next.

Copied beside every submission and run with the host's Python there, so it uses the standard library alone and the
syntax of Python 3.6. ``aifactory status`` imports the same functions: what the job decided and what people read is one
piece of code.

Exit codes of launchers are not the truth (srun reports 143 for a rank that exited with 7, torchrun 1 for every
failure), so everything here is decided from the files that the ranks left in ``attempts/NNN``:

    outcome-RANK.json    the trainer's own word: done, stopped or failed, with exception and step
    exit-RANK.json       the rank program's word: exit code or signal of the trainer, also when the trainer could say
                         nothing
    alive-RANK.json      the last heartbeat of a rank
    alive-node-RANK.json, outcome-node-RANK.json
                         the same of several ranks of a node ({"ranks": {RANK: ...}}), written by RANK for all
    preflight-RANK.json, hang.json, node-state.txt, signal.txt
                         what the job itself saw
    stop-request.txt     the request to stop that this attempt answered: ``RUN/stop``, moved here when the attempt was
                         closed

``RUN/stop`` is the one record of who asked a run to stop. Everybody reads it; under a launcher nobody but `close` (or
`begin`, for an attempt that was cut off before it could be closed) takes it away. So what the ranks acted on is still
there to be judged.
"""

# ruff: noqa: UP031 - percent formatting and the like: this file must run on the Python 3.6 of old hosts

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time

#: Errors that a rank raises because another one is gone: never the cause while any other explanation exists.
SECONDARY = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|gloo|nccl|rccl|processgroup|timed? ?out|socket"
    r"|recvvalue|sendbytes|recvbytes|store (is|was) |remote process exited|peer|unhandled system error"
    r"|another rank could not",
    re.I,
)
SECONDARY_TYPES = {
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "DistError",
    "TimeoutError",
    "SignalException",
}
#: What drivers say of broken hardware: the node is left out and the attempt repeated elsewhere, whatever library passes
#: it on.
HARDWARE = re.compile(
    r"uncorrectable (nvlink|ecc)|ecc error|fallen off the bus|gpu (is|was) lost|device (is )?lost|\bxid\b|row remapp"
    r"|hardware (error|stack error|exception)|nvlink error|unable to determine the device "
    r"handle|hsa_status_error_(exception|fatal)"
    r"|hw exception by gpu|gpu reset|unspecified launch failure|cudaErrorECC|busy or unavailable",
    re.I,
)
#: Either the hardware or a wrong kernel: one more try, as after a crash.
AMBIGUOUS = re.compile(
    r"illegal (memory access|instruction)|memory access fault|misaligned address|hsa_status_error", re.I
)
MEMORY = re.compile(
    r"out of memory|_alloc_failed\b|cudaErrorMemoryAllocation|hipErrorOutOfMemory|can't allocate memory", re.I
)
#: What threads of NCCL and gloo print before they end a process that waited too long for the others, or lost one.
GAVE_UP = re.compile(
    r"caught collective operation timeout|collective.{0,60}timed? ?out"
    r"|what\(\): .*(gloo|nccl|rccl|connection (closed|reset)|broken pipe)",
    re.I,
)
#: Errors of Python that no broken connection raises: a first cause, also where its text speaks of NCCL or a socket.
OWN_TYPES = {
    "ValueError",
    "TypeError",
    "KeyError",
    "IndexError",
    "AttributeError",
    "NameError",
    "AssertionError",
    "ImportError",
    "ModuleNotFoundError",
    "FileNotFoundError",
    "PermissionError",
    "UserError",
    "ZeroDivisionError",
    "NotImplementedError",
}
DOWN = re.compile(r"\b(DOWN|NOT_RESPONDING|down|fail|FAIL)")
AUTOMATIC_STOPS = ("time-limit", "deadline", "preempted", "terminated")


# ---- files


def read_json(path):
    """The object in a JSON file, or None where it is missing, was cut off in the middle of being written, or is
    anything else.
    """
    if not os.path.isfile(path):  # a pipe would be waited for without end
        return None
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path, value):
    beside = "%s.%d.tmp" % (path, os.getpid())
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")
    os.replace(beside, path)


def read_text(path):
    if not os.path.isfile(path):
        return ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def ranked(folder, kind):
    """{rank: content} of the files ``KIND-RANK.json`` in a folder, and of ``KIND-node-RANK.json``, which hold several.

    Of several heartbeats of a rank the latest counts: another rank of the node publishes them where the first is gone.
    Otherwise a file of its own counts before what was written for it.
    """
    found = {}  # type: dict
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in sorted(names, key=lambda name: "-node-" not in name):
        match = re.match(r"%s-(node-)?0*(\d+)\.json$" % kind, name)
        value = read_json(os.path.join(folder, name)) if match else None
        if match is None or value is None:
            continue
        held = {match.group(2): value}
        if match.group(1):
            held = value["ranks"] if isinstance(value.get("ranks"), dict) else {}
        for rank, one in held.items():
            if not (re.match(r"\d{1,9}$", rank) and isinstance(one, dict)):
                continue
            known = found.get(int(rank), {})
            if (seconds(one.get("time")) or 0) >= (seconds(known.get("time")) or 0):
                found[int(rank)] = one
    return found


def attempt_numbers(run):
    try:
        return sorted(int(name) for name in os.listdir(os.path.join(run, "attempts")) if re.match(r"\d{3,}$", name))
    except OSError:
        return []


def attempt_dir(run, number):
    return os.path.join(run, "attempts", "%03d" % number)


def latest_checkpoint(run):
    """Step of the newest checkpoint that carries its COMPLETE marker, or 0."""
    best = 0
    folder = os.path.join(run, "checkpoints")
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    for name in names:
        match = re.match(r"step-0*(\d+)$", name)
        if match and os.path.exists(os.path.join(folder, name, "COMPLETE")):
            best = max(best, int(match.group(1)))
    return best


def by_a_person(request):
    """Whether a request to stop is somebody's wish, not the scheduler's: anything else that is in the file, also
    nothing at all.
    """
    return request is not None and (request.split() or [""])[0] not in AUTOMATIC_STOPS


def pending_stop(run):
    """The text of ``RUN/stop``, or None where nobody asks the run to stop."""
    path = os.path.join(run, "stop")
    return read_text(path) if os.path.exists(path) else None


def take_stop(run, number):
    """Take the request away, into the folder of the attempt that answers it. Returns its text, None where there is
    none.

    One rename: a request that is made a moment later is another one, and stays for the next attempt.
    """
    kept = os.path.join(attempt_dir(run, number), "stop-request.txt")
    with contextlib.suppress(FileNotFoundError):
        os.replace(os.path.join(run, "stop"), kept)
    return read_text(kept) if os.path.exists(kept) else None


def this_machine():
    """What processes have in common that can look at each other: the boot of the machine and the name space of their
    numbers.
    """
    try:
        return "%s %s" % (
            read_text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
            os.readlink("/proc/self/ns/pid"),
        )
    except OSError:
        return socket.gethostname()


def process_start(pid):
    """Start of a process of this machine in clock ticks, "" where it is gone (or only waits to be collected)."""
    fields = read_text("/proc/%d/stat" % pid).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def runs_here(record, shell):
    """Whether an attempt that nobody closed is at work on this machine: its batch shell lives, and is not ``shell``
    itself.
    """
    theirs = record.get("shell") or {}
    if "state" in record or theirs.get("machine") != this_machine() or theirs.get("pid") == shell:
        return False
    return bool(theirs.get("started")) and process_start(theirs["pid"]) == theirs["started"]


def occupied(record):
    """Whether an attempt was refused because another one trained in the folder: it did nothing, and says nothing about
    the run.
    """
    return (record.get("cause") or {}).get("kind") == "occupied"


def seconds(value):
    """A time stamp as epoch seconds (numbers and ISO texts are both in use), or None."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        text = value.strip().replace("Z", "+0000")
        text = re.sub(r"([+-]\d\d):(\d\d)$", r"\1\2", text)
        for form in ("%Y-%m-%dT%H:%M:%S.%f%z", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%dT%H:%M:%S"):
            try:
                return time.mktime(time.strptime(text, form)) if "z" not in form else _with_zone(text, form)
            except ValueError:
                continue
    return None


def _with_zone(text, form):
    import datetime

    return datetime.datetime.strptime(text, form).timestamp()


# ---- what happened


def signal_name(number):
    try:
        return signal.Signals(int(number)).name
    except (ValueError, TypeError):
        return "signal %s" % number


def _number(value):
    """A signal given as number or name."""
    if isinstance(value, str):
        if value.isdigit():
            return int(value)
        try:
            return int(getattr(signal, value if value.startswith("SIG") else "SIG" + value))
        except AttributeError:
            return None
    return value


def diagnose(folder, world=None, rc=None):
    """(state, cause) of the attempt whose files lie in ``folder``.

    state: done | stopped | failed; cause: None or {rank, node, kind, message, step}. ``world`` is the number of ranks
    that were started, ``rc`` the launcher's exit status (used only where no file tells anything).
    """
    outcome = ranked(folder, "outcome")
    record = read_json(os.path.join(folder, "attempt.json")) or {}
    count = world or record.get("world")
    if (
        isinstance(count, int)
        and count > 0
        and all(outcome.get(rank, {}).get("status") == "done" for rank in range(count))
    ):
        return "done", None  # thousands of other files need not be read
    gone, alive = ranked(folder, "exit"), ranked(folder, "alive")
    for rank, place in ranked(folder, "place").items():
        # The scheduler's name of the node: several of them may be one host, and host names carry domains or not.
        for found in (outcome, gone, alive):
            if rank in found:
                found[rank]["node"] = place.get("node")
        alive.setdefault(rank, {"node": place.get("node"), "step": None, "time": place.get("started")})
    world = world or record.get("world") or (max([*outcome, *gone, *alive], default=-1) + 1)

    outcome = {r: o for r, o in outcome.items() if r < world}
    node_cause = _node_failure(folder, record, outcome, alive)
    if outcome and len(outcome) >= world and all(o.get("status") == "done" for o in outcome.values()):
        return "done", None
    if outcome and len(outcome) >= world and all(o.get("status") in ("done", "stopped") for o in outcome.values()):
        # Every rank could still save: the run is whole, but a lost node stays the reason why it stopped.
        return "stopped", node_cause or _stop_cause(folder, outcome, record)
    if node_cause:
        return "failed", node_cause
    preflight = _preflight_cause(folder)
    if preflight and not outcome:
        return "failed", preflight
    hang = read_json(os.path.join(folder, "hang.json"))
    cause = _first_cause(folder, outcome, gone, alive, world, hang)
    if cause is None and not (outcome or gone or alive):
        tail = _log_tail(folder)
        text = "no rank left a file: the launcher ended%s before any rank began" % (
            "" if rc is None else " with status %s" % rc
        )
        cause = {
            "rank": None,
            "node": None,
            "kind": "launch",
            "message": text + (": " + tail if tail else ""),
            "step": None,
        }
    return "failed", cause


def _stop_cause(folder, outcome, record):
    reason = record.get("stop_reason") or read_text(os.path.join(folder, "signal.txt")).split("\n")[0]
    rank = min(outcome)
    for candidate in sorted(outcome):
        if outcome[candidate].get("status") == "stopped":
            rank = candidate
            break
    o = outcome[rank]
    text = o.get("message") or reason or "stopped on request"
    return {"rank": None, "node": None, "kind": "stopped", "message": text, "step": o.get("step")}


def _node_failure(folder, record, outcome, alive):
    """The node that the scheduler reports down, if one of this attempt is."""
    down = []
    for line in read_text(os.path.join(folder, "node-state.txt")).split("\n"):
        name, _, state = line.strip().partition(" ")
        if record.get("nodes") and name not in record["nodes"]:
            continue  # down, but none of this attempt's
        if name and (DOWN.search(state) or state.strip().endswith("*")):
            down.append((name, state.strip()))
    scheduler = read_json(os.path.join(folder, "scheduler.json")) or {}
    if not down and scheduler.get("state") == "NODE_FAIL":
        named = scheduler.get("failed_node")
        down = [(named, "NODE_FAIL")] if named else [(None, "NODE_FAIL")]
    if not down:
        return None
    name, state = down[0]
    ranks = sorted(
        rank
        for rank, beat in alive.items()
        if rank not in outcome and name and beat.get("node", beat.get("host")) == name
    )
    steps = [b.get("step") for b in alive.values() if isinstance(b.get("step"), int)]
    who = ", ".join(n for n, _ in down if n) or "a node of the job"
    return {
        "rank": ranks[0] if ranks else None,
        "node": name,
        "kind": "node-failure",
        "message": "lost node %s (the scheduler says %s)" % (who, state),
        "step": max(steps) if steps else None,
    }


def _preflight_cause(folder):
    verdict = read_json(os.path.join(folder, "preflight.json"))
    if not verdict or verdict.get("ok", True):
        return None
    return {
        "rank": verdict.get("rank"),
        "node": (verdict.get("nodes") or [None])[0],
        "kind": verdict.get("kind", "preflight"),
        "message": "pre-flight failed: " + str(verdict.get("message")),
        "step": None,
    }


def _first_cause(folder, outcome, gone, alive, world, hang):
    """The rank that broke first, told apart from those that broke because of it."""
    killed, raised, secondary, silent = [], [], [], []
    reported = [other.get("step") for other in outcome.values()]

    def node_of(rank):
        files = [f for f in (outcome.get(rank), gone.get(rank), alive.get(rank)) if f]
        return next((f.get("node") or f.get("host") for f in files if f.get("node") or f.get("host")), None)

    for rank in range(world):
        o, e, a = outcome.get(rank), gone.get(rank), alive.get(rank)
        node = node_of(rank)
        step = (o or {}).get("step")
        if step is None:
            step = (a or {}).get("step")
            if e is not None:
                # A heartbeat may be some seconds old. Ranks make their steps together, and others could still tell
                # theirs.
                step = max((s for s in [step, *reported] if isinstance(s, int)), default=None)
        if o is not None and o.get("status") in ("done", "stopped"):
            continue
        if o is not None:
            when = seconds(o.get("ended")) or 1e18
            kind = str(o.get("exception") or "").rpartition(".")[2]
            text = str(o.get("message") or "")
            number = _number(o.get("signal"))
            own = kind in OWN_TYPES
            if kind and ("outofmemory" in kind.lower().replace("_", "") or (not own and MEMORY.search(text))):
                entry = (when, rank, node, "out-of-memory", "%s: %s" % (kind, text), step)
                raised.append(entry)
            elif kind == "RunIsLive":
                raised.append((when, rank, node, "occupied", text, step))
            elif kind == "Hang":
                raised.append((when, rank, node, "hang", text, step))
            elif number and not kind:
                silent.append((when, rank, node, "signal", "ended by %s" % signal_name(number), step, False))
            elif not own and HARDWARE.search(text):
                raised.append((when, rank, node, "gpu-fault", "%s: %s" % (kind, text) if kind else text, step))
            elif not own and AMBIGUOUS.search(text):
                raised.append((when, rank, node, "gpu-error", "%s: %s" % (kind, text) if kind else text, step))
            elif kind in SECONDARY_TYPES or (not own and SECONDARY.search(text)):
                secondary.append((when, rank, node, "communication", "%s: %s" % (kind, text) if kind else text, step))
            else:
                label = "%s: %s" % (kind, text) if kind else text or "exit code %s" % o.get("exit_code")
                by = o.get("cause_rank")  # every rank raises an error that concerns all
                by = by if isinstance(by, int) and 0 <= by < world else rank
                raised.append((when, by, node_of(by), "exception", label, step))
            continue
        if e is not None:
            when = seconds(e.get("ended")) or 1e18
            number = _number(e.get("signal"))
            if e.get("terminated"):
                silent.append((when, rank, node, "terminated", "ended after the launcher's SIGTERM", step, True))
            elif number:
                kind, text = "signal", "killed by %s" % signal_name(number)
                if int(number) == 9:
                    text += " (by the operator, the node's out-of-memory killer or a limit)"
                said = _last_words(folder, rank) if int(number) == signal.SIGABRT else ""
                if said:
                    text += ": " + said
                    kind = "gpu-fault" if HARDWARE.search(said) else "gpu-error" if AMBIGUOUS.search(said) else kind
                if kind == "signal" and said:  # it waited for the others
                    secondary.append((when, rank, node, "communication", text, step))
                else:
                    killed.append((when, rank, node, kind, text, step))
            else:  # also with 0: a rank whose work is done leaves an outcome
                text = "exit code %s without an outcome; see rank-%s.log" % (e.get("exit_code"), rank)
                raised.append((when, rank, node, "exit", text, step))
            continue
        when = seconds((a or {}).get("time")) or 1e18
        text = "no outcome and no exit status: the process vanished"
        if a is not None:
            text += " (last heartbeat at step %s)" % a.get("step")
        silent.append((when, rank, node, "lost", text, step, False))

    if hang:
        return {
            "rank": hang.get("rank"),
            "node": node_of(hang.get("rank")) or hang.get("node"),
            "kind": "hang",
            "message": hang.get("message", "no progress"),
            "step": hang.get("step"),
        }
    primary = sorted(killed + raised)
    if primary:
        return _cause(primary[0])
    # Others gave up waiting while one rank said nothing at all: that one hung.
    waiting = [s for s in secondary if re.search(r"timed? ?out|timeout", s[4], re.I)]
    if waiting:
        mute = sorted((s[5] if isinstance(s[5], int) else -1, s[0], s) for s in silent)
        if mute:
            who = mute[0][2]
            text = "hung at step %s; the others gave up waiting: %s" % (who[5], _short(waiting[0][4]))
            return _cause((who[0], who[1], who[2], "hang", text, who[5]))
    vanished = sorted(s for s in silent if s[3] == "lost" and s[5] is not None)
    if vanished and secondary:
        return _cause(vanished[0][:6])
    if secondary:
        return _cause(sorted(secondary)[0])
    ended = sorted(s[:6] for s in silent if s[3] == "signal") or sorted(s[:6] for s in silent if s[0] < 1e18)
    if ended:
        return _cause(ended[0])
    return None


def _last_words(folder, rank):
    """Why a rank's process was aborted, where a driver or NCCL's own thread printed it into the rank's log (no
    exception could tell); else an empty text.
    """
    path = os.path.join(folder, "rank-%d.log" % rank)
    if not os.path.isfile(path):
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    for pattern in (HARDWARE, AMBIGUOUS, GAVE_UP):
        for line in lines:
            if pattern.search(line):
                return _short(line, 300)
    return ""


def _cause(entry):
    _, rank, node, kind, text, step = entry
    return {"rank": rank, "node": node, "kind": kind, "message": _short(text), "step": step}


def _short(text, length=600):
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _log_tail(folder):
    for name in ("launcher.log", "preflight.log"):
        text = read_text(os.path.join(folder, name))
        if text:
            lines = [line for line in text.split("\n") if line.strip()]
            errors = [line for line in lines if re.search(r"error|denied|not found|no such|invalid|fatal", line, re.I)]
            return _short((errors or lines)[-1], 300)
    return ""


# ---- what comes next


def counters(run):
    """How often the run was started again, by kind, from the closed attempts."""
    count = {"time": 0, "node": 0, "crash": 0, "preempted": 0}
    for number in attempt_numbers(run):
        record = _record(run, number)
        kind = (record.get("decision") or {}).get("counted_as")
        if kind in count:
            count[kind] += 1
    return count


def decide(run, number, state, cause, stop_reason, policy):
    """{action, why, counted_as, exclude, final}: end | requeue | chain | next-link, by the kind of end and the
    counters.
    """
    record = _record(run, number)
    earlier = [_record(run, n) for n in attempt_numbers(run) if n < number]
    earlier = [r for r in earlier if not occupied(r)]
    after = latest_checkpoint(run)
    moved = after > (record.get("step_from") or 0)

    def end(why, final=True):
        return {"action": "end", "why": why, "counted_as": None, "exclude": [], "final": final}

    if state == "done":
        return end("the run is finished")
    kind = (cause or {}).get("kind")
    if kind == "occupied":
        return end("another attempt is at work in this folder; this one did nothing", final=False)
    if stop_reason and by_a_person(stop_reason):
        # Whatever else happened to the attempt: nobody wants another one.
        what = "stopped by request (%s); resumable" if state == "stopped" else "a stop was asked for (%s)"
        return end(what % _short(stop_reason, 80))
    exclude = []
    if state == "stopped" and kind in ("node-failure", "preempted"):
        counted = "node" if kind == "node-failure" else "preempted"
    elif state == "stopped":
        counted = "preempted" if stop_reason.startswith(("preempted", "terminated")) else "time"
    elif kind == "preempted":
        counted = "preempted"
    elif kind in ("node-failure", "preflight", "gpu-fault"):
        counted = "node"
        if (cause or {}).get("node"):
            exclude = [cause["node"]]
    elif kind in ("signal", "lost", "hang", "communication", "terminated", "gpu-error"):
        counted = "crash"
    else:
        return end("the program failed by itself (%s); starting again would fail again" % kind)

    limits = policy.get("restarts") or {}
    used = counters(run)[counted]
    if used >= int(limits.get(counted, 0)):
        return end("%d restarts for '%s' were used, the limit is %d" % (used, counted, int(limits.get(counted, 0))))
    if counted == "crash":
        for other in reversed(earlier):
            if (other.get("decision") or {}).get("counted_as") == "crash":
                step, before = (cause or {}).get("step"), (other.get("cause") or {}).get("step")
                if step is not None and step == before:
                    return end("crashed twice at step %s" % step)
                break
    if counted != "node" and not moved and earlier and not earlier[-1].get("progress", True):
        return end("two attempts in a row saved no new checkpoint")
    for other in [*earlier, {"decision": {"exclude": policy.get("exclude") or []}}]:
        # A later job must not fall back on the nodes that an earlier one learnt to avoid.
        exclude += [n for n in (other.get("decision") or {}).get("exclude") or [] if n not in exclude]
    how = policy.get("resubmit") or "none"
    if how == "none" or not policy.get("unattended", True):
        return end("stopped, resumable: this site or your request requires a person to submit again", final=False)
    if policy.get("links"):
        action = "next-link"
    elif counted in ("time", "preempted") and how == "requeue":
        action = "requeue"
    else:
        action = "chain"
    return {
        "action": action,
        "why": "restart %d for '%s'" % (used + 1, counted),
        "counted_as": counted,
        "exclude": exclude,
        "final": False,
    }


# ---- commands


def begin(args):
    """Close what an interrupted attempt left open, then claim the next number. Prints ``go NUMBER`` or ``end WHY``."""
    run = args.run
    again = os.path.join(run, "submission", "again")
    while True:
        numbers = attempt_numbers(run)
        fresh = os.path.exists(again)
        why = _nothing_to_do(args, numbers, again if fresh else None)
        if why:
            print("end %s" % why)
            return 0
        if fresh:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(again)
        number = (numbers[-1] if numbers else 0) + 1
        try:
            os.makedirs(attempt_dir(run, number))
            break
        except FileExistsError:
            continue  # another one began it in this moment: all is to be judged again
    write_json(
        os.path.join(attempt_dir(run, number), "attempt.json"),
        {
            "number": number,
            "job": args.job,
            "restart": args.restart,
            "backend": args.backend,
            "host": socket.gethostname(),
            "nodes": [n for n in args.nodes.split(",") if n],
            "world": args.world,
            "gpus": args.gpus,
            "started": time.time(),
            "deadline": args.deadline,
            "step_from": latest_checkpoint(run),
            "shell": args.shell
            and {"pid": args.shell, "machine": this_machine(), "started": process_start(args.shell)},
        },
    )
    print("go %03d" % number)
    return 0


def _nothing_to_do(args, numbers, again):
    """Why no attempt is to begin now, or an empty text. ``again`` is the file of an explicit resumption, None where
    there is none.
    """
    run = args.run
    if again and not _asked_after(run, again):
        _drop_stop(run, lambda request: True)  # somebody resumed the run since then
    number = next((n for n in reversed(numbers) if not occupied(_claimed(run, n))), None)
    if number is not None:
        record = _record(run, number)
        if runs_here(record, args.shell):
            return "attempt %03d is at work on this machine (process %d)" % (number, record["shell"]["pid"])
        if "state" not in record:
            # A request that is newer than the resumption is for the attempt that is about to begin. One that another
            # job sees stays where it is: that attempt may be at work elsewhere, and must hear of it.
            same_job = record.get("job") == args.job
            request = None if again else take_stop(run, number) if same_job else pending_stop(run)
            _close_interrupted(run, number, attempt_dir(run, number), record, args, _policy(run), request)
        decision = _record(run, number).get("decision") or {}
        if decision.get("final") and not again:
            return decision.get("why")
    if not _drop_stop(run, lambda request: not by_a_person(request)):
        # It stays where it is: jobs that are queued behind this one must see it, too.
        return "a stop was asked for: %s" % _short(pending_stop(run) or "stop file", 80)
    return ""


def _record(run, number):
    return read_json(os.path.join(attempt_dir(run, number), "attempt.json")) or {}


def _claimed(run, number):
    """The record of an attempt; an empty folder is a number that somebody is just claiming, whose record is waited
    for.
    """
    end = time.time() + 5
    while not os.listdir(attempt_dir(run, number)) and time.time() < end:
        time.sleep(0.05)
    return _record(run, number)


def _asked_after(run, again):
    """Whether the request to stop is newer than the resumption (both files are on one file system, so one clock wrote
    them).
    """
    try:
        return os.stat(os.path.join(run, "stop")).st_mtime >= os.stat(again).st_mtime
    except OSError:
        return False


def _drop_stop(run, stale):
    """Remove a request for which ``stale(text)`` holds; returns whether none is left. One made meanwhile is not
    lost.
    """
    path = os.path.join(run, "stop")
    beside = "%s.%d.tmp" % (path, os.getpid())
    while os.path.exists(path):
        if not stale(read_text(path)):
            return False
        try:
            os.rename(path, beside)
        except FileNotFoundError:
            continue
        if not stale(read_text(beside)):  # replaced between the two
            os.rename(beside, path)
            return False
        os.unlink(beside)
    return True


def _close_interrupted(run, number, folder, record, args, policy, request):
    """The batch shell of this attempt was killed before it could close it: by a lost node, a cancel or a preemption."""
    world = record.get("world")
    if args.node_state:
        with open(os.path.join(folder, "node-state.txt"), "a", encoding="utf-8") as file:
            file.write(args.node_state.rstrip("\n") + "\n")
    state, cause = diagnose(folder, world)
    same_job = record.get("job") == args.job
    noted = read_text(os.path.join(folder, "signal.txt"))
    if (
        state == "failed"
        and same_job
        and (cause is None or cause["kind"] in ("lost", "terminated", "launch", "signal", "communication"))
    ):
        # The scheduler itself put the job back: a node was lost, or the job was preempted or requeued by hand.
        kind = "preempted" if noted.startswith("TERM") and not args.node_state else "requeued-by-scheduler"
        cause = {
            "rank": None,
            "node": (cause or {}).get("node"),
            "kind": "node-failure" if kind == "requeued-by-scheduler" else "preempted",
            "message": "the scheduler took the job off its nodes and queued it again (node failure or preemption)",
            "step": (cause or {}).get("step"),
        }
    reason = _reason(folder, request)
    if by_a_person(request) and _nothing_began(folder):
        state, cause = "stopped", _before_it_began(reason)
    if state == "stopped" and same_job and cause and cause["kind"] == "stopped" and noted.startswith("TERM"):
        text = "the scheduler took the job off its nodes and queued it again (preemption, or a lost node that is back)"
        cause = {"rank": None, "node": None, "kind": "preempted", "message": text, "step": cause.get("step")}
    decision = decide(run, number, state, cause, reason, policy)
    if same_job and decision["action"] != "end":
        decision["action"] = "requeued"
    _finish(folder, record, state, cause, None, reason, decision, latest_checkpoint(run))


def _finish(folder, record, state, cause, rc, reason, decision, step):
    record.update(
        {
            "state": state,
            "cause": cause,
            "rc": rc,
            "ended": time.time(),
            "stop_reason": reason or None,
            "step_to": step,
            "progress": step > (record.get("step_from") or 0),
            "decision": decision,
        }
    )
    write_json(os.path.join(folder, "attempt.json"), record)


def _policy(run):
    return read_json(os.path.join(run, "submission", "policy.json")) or {}


def _reason(folder, request):
    """Why the attempt was asked to stop: the request that was taken, else what the ranks say they acted on, else an
    empty text.

    A person's word counts before the scheduler's: the warning of the time limit may come while the ranks save because
    somebody asked them to.
    """
    if by_a_person(request):
        return request or "stop file"
    outcomes = [o for o in ranked(folder, "outcome").values() if o.get("status") == "stopped"]
    reported = [o["stop_request"] for o in outcomes if o.get("stop_request") is not None]
    for text in reported:
        if by_a_person(text):
            return text or "stop file"
    if request or reported:
        return request or reported[0]
    if any("stop file" in str(o.get("message")) for o in outcomes):
        return "stop file"  # it is gone, and the job's own requests are not taken back
    return ""


def _nothing_began(folder):
    return not any(ranked(folder, kind) for kind in ("outcome", "exit", "alive")) and not _preflight_cause(folder)


def _before_it_began(reason):
    text = "asked to stop before any rank began (%s)" % _short(reason, 80)
    return {"rank": None, "node": None, "kind": "stopped", "message": text, "step": None}


def close(args):
    """Judge the attempt from its files. Prints ``ACTION STATE EXCLUDED-NODES-OR-DASH`` and, on standard error, the
    reason.
    """
    folder = attempt_dir(args.run, args.attempt)
    record = read_json(os.path.join(folder, "attempt.json")) or {"number": args.attempt}
    state, cause = diagnose(folder, record.get("world"), args.rc)
    # A request is answered by the attempt that trained: one that was refused because of it leaves the file to it.
    request = None if (cause or {}).get("kind") == "occupied" else take_stop(args.run, args.attempt)
    reason = _reason(folder, request) or args.reason
    if request is not None and _nothing_began(folder):
        state, cause = "stopped", _before_it_began(reason)  # the batch script starts no ranks then
    if state == "stopped" and not reason:
        reason = "deadline"
    decision = decide(args.run, args.attempt, state, cause, reason, _policy(args.run))
    _finish(folder, record, state, cause, args.rc, reason, decision, latest_checkpoint(args.run))
    reported = "attempt %03d: %s" % (args.attempt, state)
    if cause:
        reported += " (%s%s%s: %s)" % (
            cause["kind"],
            "" if cause["rank"] is None else ", rank %s" % cause["rank"],
            "" if not cause["node"] else " on %s" % cause["node"],
            cause["message"],
        )
    print("%s; %s: %s" % (reported, decision["action"], decision["why"]), file=sys.stderr)
    nodes = [n for n in decision["exclude"] if re.match(r"[A-Za-z0-9][A-Za-z0-9_.-]*$", n)]
    print("%s %s %s" % (decision["action"], state, ",".join(nodes) or "-"))
    return 0


def _waited(report):
    """Whether a rank only says that the others did not come."""
    return all(re.search("timed out: waited|Store", p) for p in report.get("problems", []))


def preflight(args):
    """Judge the ranks' pre-flight reports; exit code 1 where one is bad or missing. Writes ``preflight.json``."""
    folder = attempt_dir(args.run, args.attempt)
    record = read_json(os.path.join(folder, "attempt.json")) or {}
    world = record.get("world") or 1
    reports, places = ranked(folder, "preflight"), ranked(folder, "place")
    bad = sorted(r for r, report in reports.items() if not report.get("ok", False))
    missing = [r for r in range(world) if r not in reports]
    verdict = {"ok": not bad and not missing, "ranks": len(reports), "missing": missing[:64]}  # type: dict
    speeds = [r["allreduce_gb_s"] for r in reports.values() if r.get("allreduce_gb_s") is not None]
    if speeds:
        verdict["allreduce_gb_s"] = min(speeds)
    slow = {str(r.get("node")): r["kernels"] for r in reports.values() if r.get("kernels")}
    if slow:
        verdict["kernels"] = slow
        print("pre-flight: %s (on %s)" % (min(slow.values()), ", ".join(sorted(slow))), file=sys.stderr)
    primary = [r for r in bad if not all(SECONDARY.search(p) for p in reports[r].get("problems", []))]
    if missing and not primary:
        # Nodes none of whose ranks answered are suspect; where some rank of every node answered, the ranks' places
        # tell.
        silent = [n for n in record.get("nodes", []) if not any(r.get("node") == n for r in reports.values())]
        verdict["nodes"] = silent or sorted({places[r]["node"] for r in missing if r in places})
        verdict["rank"] = missing[0]
        verdict["message"] = "%d of %d ranks did not finish it" % (len(missing), world)
        if bad:
            reported = min(bad, key=lambda r: _waited(reports[r]))
            verdict["message"] += "; rank %d: %s" % (reported, "; ".join(reports[reported].get("problems", [])))
    elif bad:
        primary = primary or sorted(bad, key=lambda r: (_waited(reports[r]), r))
        first = reports[primary[0]]
        verdict["nodes"] = sorted({reports[r].get("node") for r in primary if reports[r].get("node")})
        verdict["rank"] = primary[0]
        verdict["message"] = "; ".join(first.get("problems", []))
        if all(reports[r].get("kind") == "environment" for r in primary):
            verdict["kind"] = "environment"  # other nodes would do no better
    write_json(os.path.join(folder, "preflight.json"), verdict)
    if verdict["ok"]:
        print(
            "pre-flight: %d ranks met%s" % (world, ", all-reduce %.2f GB/s" % min(speeds) if speeds else ""),
            file=sys.stderr,
        )
        return 0
    print(
        "pre-flight failed: %s (nodes: %s)" % (verdict["message"], ", ".join(verdict["nodes"]) or "unknown"),
        file=sys.stderr,
    )
    return 1


def watch(args):
    """Look at the heartbeats until ``--pid`` is gone; ``--hang`` seconds without any news end the attempt (exit code
    1).
    """
    folder = attempt_dir(args.run, args.attempt)
    last, since = None, time.time()
    while True:
        time.sleep(args.every)
        try:
            os.kill(args.pid, 0)
        except OSError:
            return 0
        beats = ranked(folder, "alive")
        seen = tuple(sorted((rank, b.get("step"), b.get("phase")) for rank, b in beats.items()))
        if seen != last:
            last, since = seen, time.time()
            continue
        if not beats or time.time() - since < args.hang:
            continue
        done = ranked(folder, "outcome")
        waiting = sorted(
            (b.get("step") or 0, seconds(b.get("time")) or 0, rank) for rank, b in beats.items() if rank not in done
        )
        if not waiting:
            continue
        step, _, rank = waiting[0]
        write_json(
            os.path.join(folder, "hang.json"),
            {
                "rank": rank,
                "node": beats[rank].get("node") or beats[rank].get("host"),
                "step": step,
                "message": "no rank made a step for %d s; rank %d is the furthest behind, at step %s"
                % (args.hang, rank, step),
                "time": time.time(),
            },
        )
        with contextlib.suppress(OSError):
            os.kill(args.pid, signal.SIGTERM)
        return 1


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("begin")
    one.add_argument("--run", required=True)
    one.add_argument("--job", default="")
    one.add_argument("--restart", type=int, default=0)
    one.add_argument("--backend", default="")
    one.add_argument("--nodes", default="")
    one.add_argument("--world", type=int, default=None)
    one.add_argument("--gpus", type=int, default=0)
    one.add_argument("--deadline", type=int, default=None)
    one.add_argument("--node-state", default="")
    one.add_argument("--shell", type=int, default=None)
    one.set_defaults(run_command=begin)
    two = commands.add_parser("close")
    two.add_argument("--run", required=True)
    two.add_argument("--attempt", type=int, required=True)
    two.add_argument("--rc", type=int, default=None)
    two.add_argument("--reason", default="")
    two.set_defaults(run_command=close)
    four = commands.add_parser("preflight")
    four.add_argument("--run", required=True)
    four.add_argument("--attempt", type=int, required=True)
    four.add_argument("--nodes", default="")
    four.set_defaults(run_command=preflight)
    three = commands.add_parser("watch")
    three.add_argument("--run", required=True)
    three.add_argument("--attempt", type=int, required=True)
    three.add_argument("--pid", type=int, required=True)
    three.add_argument("--hang", type=float, required=True)
    three.add_argument("--every", type=float, default=15)
    three.set_defaults(run_command=watch)
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("begin, close or watch")
    return args.run_command(args)


if __name__ == "__main__":
    sys.exit(main())
