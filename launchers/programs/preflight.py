"""Pre-flight of one rank, inside the job: meet the others, exchange a tensor, look at GPU, disk and versions. Seconds,
not minutes.

Copied beside every submission and started like the training itself. Each rank writes ``preflight-RANK.json``; the batch
script judges them together. Needs torch; nothing of aifactory-train.
"""

# ruff: noqa: UP031 - runs on whatever Python has torch at a site; the same style as attempt.py

import argparse
import glob
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time

CHUNK_MIB = 64  # of each all-reduce on GPUs; 4 on CPUs
ROUNDS = 5
GROUP_S = 60  # seconds for a further group and its first collective
#: GPUs whose memory is the host's, and GPUs whose memory the host may use too: the page cache lies in it and the driver
#: counts it as used, but the kernel gives it back when it is asked for.
INTEGRATED = re.compile(r"MI300A|GB10\b", re.I)
COHERENT = re.compile(r"GH200|GB200|GB300", re.I)


class Problem(Exception):
    """Something wrong that this program can put into words of its own."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="GPUs expected on each node")
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--unified", action="store_true", help="the profile says that GPU and host share one memory")
    parser.add_argument("--transport", default=None, help="regular expression that the library's log must match")
    parser.add_argument(
        "--groups", type=int, default=0, help="ranks of a group that the engine forms; 0: it forms none"
    )
    parser.add_argument("--timeout", type=float, default=90, help="seconds that the ranks wait for each other")
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    began = time.time()
    report = {
        "rank": rank,
        "node": os.environ.get("AIFACTORY_NODE") or socket.gethostname(),
        "host": socket.gethostname(),
        "isa": platform.machine(),
        "python": platform.python_version(),
    }  # type: dict
    problems = []  # type: list
    report["problems"] = problems  # check() adds to it
    try:
        check(args, rank, world, local_rank, report)
    except Problem as problem:
        problems.append(str(problem))
    except Exception as error:  # the report must be written whatever breaks; the error is its content
        problems.append("%s: %s" % (type(error).__name__, " ".join(str(error).split())[:400]))
    leave(args, report, began)


def leave(args, report, began):
    """Write the report and end without waiting for a process group that may be broken."""
    report["ok"] = not report["problems"]
    report["seconds"] = round(time.time() - began, 2)
    write(os.path.join(args.dir, "preflight-%d.json" % report["rank"]), report)
    for problem in report["problems"]:
        print("preflight: rank %d on %s: %s" % (report["rank"], report["node"], problem), flush=True)
    sys.stdout.flush()
    os._exit(0)


def write(path, value):
    with open(path + ".tmp", "w") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)


def check(args, rank, world, local_rank, report):
    problems = report["problems"]
    scratch_write(args.scratch, rank, report)
    import torch
    import torch.distributed as dist

    report["torch"] = torch.__version__
    report["cuda"] = torch.version.cuda
    report["rocm"] = torch.version.hip
    cuda = torch.cuda.is_available()
    report["gpus"] = torch.cuda.device_count() if cuda else 0
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus_seen(args, local_size, report)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        report["gpu"] = torch.cuda.get_device_name()
        memory(args, torch, report)
    if args.gpus and local_rank == 0:
        report["kernels"] = toolchain()
        if report["kernels"]:
            print("preflight: rank %d on %s: %s" % (rank, report["node"], report["kernels"]), flush=True)
    meet(args, torch, dist, rank, world, local_size, report)
    count = (CHUNK_MIB if cuda else 4) * 2**20 // 4
    tensor = torch.full((count,), float(rank + 1), device=device)
    dist.all_reduce(tensor)
    expected = world * (world + 1) / 2
    if abs(tensor[0].item() - expected) > 1e-3 * expected or abs(tensor[-1].item() - expected) > 1e-3 * expected:
        problems.append("the all-reduce is wrong: %s instead of %s" % (tensor[0].item(), expected))
    if cuda:
        torch.cuda.synchronize()
    dist.barrier()
    start = time.time()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor)
        tensor.fill_(1.0)
    if cuda:
        torch.cuda.synchronize()
    took = (time.time() - start) / ROUNDS
    report["allreduce_mib"] = count * 4 / 2**20
    # Bus bandwidth as nccl-tests defines it: 2 (n - 1) / n times the size over the time.
    report["allreduce_gb_s"] = round(2 * (world - 1) / world * count * 4 / max(took, 1e-9) / 1e9, 3)
    report["allreduce_ms"] = round(took * 1e3, 3)
    if args.transport and cuda and args.nodes > 1:
        transport(args, rank, report)
    dist.barrier()
    if args.groups and world > 1:
        more_groups(args, torch, dist, rank, world, device, report)


def more_groups(args, torch, dist, rank, world, device, report):
    """Further groups as the engine will form them: all ranks again, the ranks that share a copy, and those that hold
    the same part. The first collective of a group may never return, which raises nothing: a timer tells.
    """
    size = args.groups if world % args.groups == 0 else world
    members = {
        "all ranks": list(range(world)),
        "ranks that share a copy": [rank - rank % size + i for i in range(size)],
        "ranks with the same part": list(range(rank % size, world, size)),
    }
    report["groups"] = {}
    for name, ranks in members.items():
        if len(ranks) < 2:
            continue
        began = time.time()
        patience = threading.Timer(GROUP_S, group_hangs, (args, report, name, ranks, began))
        patience.daemon = True
        patience.start()
        group = dist.new_group(ranks, use_local_synchronization=True)
        tensor = torch.ones(1024, device=device)
        dist.all_reduce(tensor, group=group)
        wrong = abs(tensor[0].item() - len(ranks)) > 1e-3  # .item() waits for the device
        patience.cancel()
        report["groups"][name] = round(time.time() - began, 3)
        if wrong:
            report["problems"].append("the all-reduce of a further group (%s) is wrong" % name)


def group_hangs(args, report, name, ranks, began):
    """The first collective of a further group did not return: say so and go. Other nodes would do no better."""
    report["kind"] = "environment"
    report["problems"].append(
        "a second process group hangs: the first collective of the group of %s (%d ranks, first %s) did not return in "
        "%d s, while the group of all ranks works; the engine asked for forms such groups: --set parallel.engine=fsdp2 "
        "or ddp needs one group alone, or another image" % (name, len(ranks), ranks[:8], time.time() - began)
    )
    leave(args, report, began)


def gpus_seen(args, local_size, report):
    """A GPU job whose torch computes on the CPU, or on fewer GPUs than were asked for, must not begin."""
    asked, seen = args.gpus, report["gpus"]
    if not asked or seen >= asked:
        return
    if seen == 0:
        built = report["cuda"] is not None or report["rocm"] is not None
        text = "torch %s %s; %d GPUs a node were asked for" % (
            report["torch"],
            "sees no GPU" if built else "has no GPU support (a CPU build for %s)" % report["isa"],
            asked,
        )
        if os.environ.get("AIFACTORY_ALLOW_CPU") == "1":
            report["note"] = text + "; AIFACTORY_ALLOW_CPU=1 allows it"
            return
        if not built:
            report["kind"] = "environment"  # another node would have the same torch
            text += ": install a build of torch for these GPUs"
        report["problems"].append(text + " (AIFACTORY_ALLOW_CPU=1 trains on the CPU)")
    elif seen > 1 or local_size == 1:
        report["problems"].append("%d of %d GPUs are visible" % (seen, asked))
    # One GPU of several, and several ranks: each may have been given its own. same_gpu() looks at whose it is.


def toolchain():
    """Why Triton cannot build its kernels on this node, in words; None where it can. No reason to stop: the trainer
    then takes the model's own operators, which are slower, and a cache that was filled before may need no compiler.
    """
    missing = None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        missing = "no C compiler (gcc, clang or CC)"
    else:
        folder = tempfile.mkdtemp()
        try:
            source = os.path.join(folder, "a.c")
            with open(source, "w") as file:
                file.write("#include <Python.h>\nint main(void) { return 0; }\n")
            command = [compiler, "-c", "-I", sysconfig.get_paths()["include"], source, "-o", source + ".o"]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
            if done.returncode:
                lines = done.stdout.decode(errors="replace").strip().splitlines() or ["exit code %d" % done.returncode]
                said = [line for line in lines if "error" in line] or lines
                missing = "%s cannot compile a file that includes Python.h: %s" % (compiler, said[0].strip()[:200])
        except (OSError, subprocess.SubprocessError) as error:
            missing = "%s does not run: %s" % (compiler, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if missing is None:
        return None
    advice = "Triton cannot build kernels here and the model's own operators are slower; gcc and Python's headers help"
    return "%s: %s" % (missing, advice)


def memory(args, torch, report):
    """Whether the GPU's memory is free; what the page cache holds of it counts as free where host and GPU share
    memory.
    """
    free, total = torch.cuda.mem_get_info()
    report["gpu_free_gib"], report["gpu_total_gib"] = round(free / 2**30, 2), round(total / 2**30, 2)
    if free >= 0.9 * total:
        return
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    one_memory = args.unified or getattr(properties, "is_integrated", False) or INTEGRATED.search(report["gpu"])
    text = "only %.1f of %.1f GiB GPU memory are free" % (free / 2**30, total / 2**30)
    if not (one_memory or COHERENT.search(report["gpu"])):
        report["problems"].append(text + ": something else runs there")
        return
    cached = reclaimable(numa_node(properties))
    report["gpu_cache_gib"] = round(cached / 2**30, 2)
    if one_memory:
        # Counted, not tried: what is asked of the host's own memory may cost another process its life.
        if free + cached < 0.8 * total:
            report["problems"].append(
                text + ", and the page cache holds %.1f GiB: something else runs there" % (cached / 2**30)
            )
        return
    try:
        tried = torch.empty(int(0.8 * total), dtype=torch.uint8, device="cuda")
    except RuntimeError as error:
        report["problems"].append(
            text
            + ", and 80 %% of it cannot be had: something else runs there (%s)" % " ".join(str(error).split())[:200]
        )
        return
    del tried
    torch.cuda.empty_cache()
    report["gpu_memory_tried"] = True


def numa_node(properties):
    """The NUMA node of a GPU, or None where the system does not tell."""
    try:
        where = "%04x:%02x:%02x.0" % (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
        with open("/sys/bus/pci/devices/%s/numa_node" % where) as file:
            node = int(file.read())
    except (AttributeError, TypeError, OSError, ValueError):
        return None
    return node if node >= 0 else None


def reclaimable(node, root="/sys/devices/system/node"):
    """Bytes of page cache and reclaimable kernel memory of a NUMA node (None: of all) that the kernel gives back on
    demand.
    """
    total = 0
    for path in glob.glob(os.path.join(root, "node%s" % ("[0-9]*" if node is None else node), "meminfo")):
        with open(path) as file:
            found = dict(re.findall(r"(\w+): +(\d+) kB", file.read()))
        # Shared memory (tmpfs) is counted among the file pages and stays.
        kib = int(found.get("FilePages", 0)) - int(found.get("Shmem", 0)) + int(found.get("SReclaimable", 0))
        total += max(0, kib) * 1024
    return total


def meet(args, torch, dist, rank, world, local_size, report):
    """Form the very group that training forms, and use its CPU side as training does at every step."""
    import datetime

    cuda = report["gpus"] > 0
    report["backend"] = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    report["gloo_interface"] = os.environ.get("GLOO_SOCKET_IFNAME")
    formed = False
    began = time.time()
    # gloo waits for ever for a rank that cannot reach it, whatever time-out it was given.
    patience = threading.Timer(args.timeout + 15, waited, (args, report, began))
    patience.daemon = True
    patience.start()
    try:
        dist.init_process_group(report["backend"], timeout=datetime.timedelta(seconds=args.timeout))
        formed = True
        small = torch.full((4,), float(rank + 1))
        dist.all_reduce(small)
        places = [None] * world  # type: list
        dist.all_gather_object(places, place(torch, report))
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=args.timeout))
        box = [world if rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=group)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        patience.cancel()
        if not formed and not re.search(
            r"gloo|connectFullMesh|ifname|unable to find (an )?(address|interface)", text, re.I
        ):
            raise  # the ranks did not even find rank 0, or there is no NCCL
        raise Problem(
            "gloo, which carries the control messages of every step, failed on %s: %s: %s; GLOO_SOCKET_IFNAME (--env, "
            "or "
            "interconnect.socket_interfaces of the profile) names the interface"
            % (gloo_place(), type(error).__name__, text)
        ) from error
    patience.cancel()
    if small[0].item() != world * (world + 1) / 2 or box[0] != world:
        raise Problem("gloo's all-reduce or broadcast on %s is wrong" % gloo_place())
    same_gpu(args, places, local_size, report)


def waited(args, report, began):
    """The others did not come: say so and go."""
    report["problems"].append(
        "timed out: waited %d s for the others to form the group, with gloo on %s" % (args.timeout + 15, gloo_place())
    )
    leave(args, report, began)


def gloo_place():
    """Where gloo binds to, in words."""
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    if given:
        return "interface %s" % given
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "the loopback"
    return "%s, which the name of host %s resolves to" % (address, socket.gethostname())


def place(torch, report):
    """Node and GPU of this rank, for the others to compare with theirs."""
    gpu = None
    if report["gpus"]:
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = [str(getattr(p, n, None)) for n in ("uuid", "pci_domain_id", "pci_bus_id", "pci_device_id")]
    return [report["host"], report["node"], gpu]


def same_gpu(args, places, local_size, report):
    """Where each rank sees one GPU of several, the ranks of a node must see different ones, and as many as were asked
    for.
    """
    if report["gpus"] != 1 or args.gpus <= 1 or local_size == 1:
        return
    mine = [gpu for host, node, gpu in places if (host, node) == (report["host"], report["node"])]
    distinct = len({tuple(gpu or ()) for gpu in mine})
    if distinct < len(mine):
        report["problems"].append(
            "%d ranks of this node see %d GPUs, one each: some share one; %d were asked for"
            % (len(mine), distinct, args.gpus)
        )


def scratch_write(folder, rank, report):
    usage = shutil.disk_usage(folder)
    report["scratch_free_gib"] = round(usage.free / 2**30, 1)
    if usage.free < 2**30:
        report["problems"].append("less than 1 GiB is free in %s" % folder)
    path = os.path.join(folder, ".preflight-%d" % rank)
    data = os.urandom(2**20) * 8
    start = time.time()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    with open(path, "rb") as file:
        same = file.read() == data
    os.unlink(path)
    report["scratch_mb_s"] = round(len(data) / 1e6 / max(time.time() - start, 1e-9), 1)
    if not same:
        report["problems"].append("what was written to %s came back different" % folder)


def transport(args, rank, report):
    """The communication library must say in its log that it uses the fabric that the profile names."""
    text = ""
    for path in glob.glob(os.path.join(args.dir, "nccl-*.log")):
        with open(path, errors="replace") as file:
            text += file.read()
    if not re.search(args.transport, text):
        report["problems"].append(
            "the communication library does not use the fabric (no '%s' in its log)" % args.transport
        )
    report["transport_checked"] = True


if __name__ == "__main__":
    main()
