"""Pre-flight of one rank, inside the job: meet the others, exchange a tensor, look at GPU, disk and versions. Seconds, not minutes.

Copied beside every submission and started like the training itself. Each rank writes ``preflight-RANK.json``; the batch script
judges them together. Needs torch; nothing of aifactory-train.
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
import sys
import time

CHUNK_MIB = 64  # of each all-reduce on GPUs; 4 on CPUs
ROUNDS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="GPUs expected on each node")
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--transport", default=None, help="regular expression that the library's log must match")
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
    except Exception as error:  # the report must be written whatever breaks; the error is its content
        problems.append("%s: %s" % (type(error).__name__, " ".join(str(error).split())[:400]))
    report["ok"] = not problems
    report["seconds"] = round(time.time() - began, 2)
    write(os.path.join(args.dir, "preflight-%d.json" % rank), report)
    for problem in problems:
        print("preflight: rank %d on %s: %s" % (rank, report["node"], problem), flush=True)
    # Leave without waiting for a process group that may be broken: everything is written.
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
    if args.gpus and torch.version.cuda is None and torch.version.hip is None:
        # The mini-cluster of the tests has GPUs that exist for the scheduler only.
        report["note"] = "this torch has no GPU support; %d GPUs were asked for" % args.gpus
    elif args.gpus and report["gpus"] < args.gpus and report["gpus"] != 1:
        problems.append("%d of %d GPUs are visible" % (report["gpus"], args.gpus))
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info()
        report["gpu"] = torch.cuda.get_device_name()
        report["gpu_free_gib"], report["gpu_total_gib"] = round(free / 2**30, 2), round(total / 2**30, 2)
        if free < 0.9 * total:
            problems.append(
                "only %.1f of %.1f GiB GPU memory are free: something else runs there" % (free / 2**30, total / 2**30)
            )
    import datetime

    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=90))
    report["backend"] = dist.get_backend()
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
