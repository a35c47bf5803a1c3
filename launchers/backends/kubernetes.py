"""Kubernetes with Kueue: one Job on one node, and a ConfigMap that carries the submission's files into the pod.

No cluster has seen these manifests: they are validated against the published schemas only. The run folder lies on a
persistent volume; ``user.project`` of the site file names its claim, ``user.work_dir`` the path where it is mounted.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from aifactory_train.launchers import request as rq
from aifactory_train.launchers.backends.base import Backend, Job, register
from aifactory_train.launchers.backends.commands import ask, succeeded
from aifactory_train.launchers.request import Refusal
from aifactory_train.launchers.submission import Submission

#: Fixed text: what a pod runs. The run folder comes in as "$1", never as part of the text.
START = (
    'set -eu; mkdir -p "$1/submission" "$1/logs"; cp -L /aifactory/submission/* "$1/submission/"; '
    'chmod +x "$1"/submission/*.sh "$1"/submission/*.py; exec bash "$1/submission/job.sh"'
)


#: Stands in a manifest that is only looked at; no registry has it.
NO_IMAGE = "name-an-image-with--container"


def manifest(sub: Submission) -> str:
    """The manifest as YAML: ConfigMap and Job."""
    import yaml

    shape, system = sub.shape, sub.system
    if shape.nodes > 1:
        raise Refusal(
            "kubernetes-one-node",
            f"{shape.nodes} nodes: jobs at {system.name} are written for one node",
            where="--nodes",
            fix=f"--nodes 1 with up to {system.node.gpus or 8} GPUs",
        )
    name = re.sub(r"[^a-z0-9-]+", "-", sub.name.lower()).strip("-")[:50].strip("-") or "run"
    namespace = shape.account
    claim = system.user.project or "aifactory"
    mount = system.user.work_dir or str(sub.run_dir.parent)
    sub.notes.append(
        f"the run folder {sub.run_dir} must lie on the volume of claim '{claim}', mounted at {mount} (user.project "
        f"and user.work_dir)"
    )
    labels = {"app.kubernetes.io/name": "aifactory-train", "app.kubernetes.io/instance": name}
    queue = shape.partition_key
    if queue:
        labels["kueue.x-k8s.io/queue-name"] = f"{namespace}-{queue}" if namespace else queue
        labels["kueue.x-k8s.io/max-exec-time-seconds"] = str(shape.time_s)
    data = {
        f.path.removeprefix("submission/"): f.content
        for f in sub.files
        if re.fullmatch(r"submission/[^/]+", f.path) and (f.content or f.path.endswith("/environment"))
    }
    meta: dict[str, Any] = {"name": f"{name}-submission", "labels": labels}
    if namespace:
        meta["namespace"] = namespace
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "binaryData": {key: base64.b64encode(value).decode() for key, value in sorted(data.items())},
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**meta, "name": name},
        "spec": _job_spec(sub, name, labels, claim, mount),
    }
    head = f"# {sub.name} at {system.id}: written by aifactory-train; submit with kubectl create --filename\n"
    return head + yaml.dump_all([config, job], Dumper=_plain_dumper(), sort_keys=False, allow_unicode=True)


def _image(sub: Submission) -> str:
    # Without one, the rule `container-needed` refuses to submit it.
    image = sub.request.container or sub.system.user.container_image or NO_IMAGE
    rq.image(image, "user.container_image")
    return image


def _resources(sub: Submission) -> dict[str, Any]:
    """GPUs, cores and memory of the pod."""
    shape = sub.shape
    resource = sub.system.request.gres_name or "nvidia.com/gpu"
    cpus = shape.cpus_per_task or 8 * shape.gpus_per_node
    memory = f"{shape.memory[1] if shape.memory else 64 * shape.gpus_per_node}Gi"
    return {resource: shape.gpus_per_node, "cpu": str(cpus), "memory": memory}


def _job_spec(sub: Submission, name: str, labels: dict[str, str], claim: str, mount: str) -> dict[str, Any]:
    """One pod that runs the job's script once, with the run folder's volume, the submission and shared memory
    mounted.
    """
    shape, asked = sub.shape, _resources(sub)
    return {
        "backoffLimit": 0,
        "completions": 1,
        "parallelism": 1,
        "activeDeadlineSeconds": shape.time_s,
        "template": {
            "metadata": {"labels": labels},
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": max(30, shape.grace_s),
                "containers": [
                    {
                        "name": "train",
                        "image": _image(sub),
                        "command": ["bash", "-c", START, "start", str(sub.run_dir)],
                        "env": [{"name": "USER", "value": "aifactory"}],
                        "resources": {"limits": asked, "requests": asked},
                        "volumeMounts": [
                            {"name": "work", "mountPath": mount},
                            {"name": "submission", "mountPath": "/aifactory/submission", "readOnly": True},
                            {"name": "shm", "mountPath": "/dev/shm"},
                        ],
                    }
                ],
                "volumes": [
                    {"name": "work", "persistentVolumeClaim": {"claimName": claim}},
                    {"name": "submission", "configMap": {"name": f"{name}-submission", "defaultMode": 0o555}},
                    {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
                ],
            },
        },
    }


def _plain_dumper() -> Any:
    """SafeDumper without anchors: a repeated block is written out, as people expect in a manifest."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Plain


def _kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return ask("kubectl", *arguments, fix="submit from a machine with kubectl; --dry-run prints the manifest anywhere")


@register
class Kubernetes(Backend):
    """One pod on one node; its image is the environment, and the manifest carries script and files."""

    name = "kubernetes"
    title = "Kubernetes"
    aliases = ("k8s",)
    schedulers = ("kubernetes",)
    programs = ("kubectl",)
    unseen = "no Kubernetes cluster has seen this manifest: it was validated against the published schemas only"
    software = "image"
    arrays = False
    chain = False
    followed = False
    script_file = "job.yaml"
    job_id = "$(hostname)"
    node_rank = '"${JOB_COMPLETION_INDEX:-0}"'

    def document(self, sub: Submission, script: str) -> str:
        return manifest(sub)

    def submit(self, run_dir: Path, *, test_only: bool = False) -> str:
        file = run_dir / "submission" / "job.yaml"
        done = _kubectl("create", f"--filename={file}", "--output=name", *(["--dry-run=server"] if test_only else []))
        succeeded(done, "kubectl refused the manifest", where=str(file))
        return next((line for line in done.stdout.split() if line.startswith("job")), done.stdout.strip())

    def query(self, job: str) -> Job | None:
        done = _kubectl("get", job, "--output=json")
        if done.returncode != 0:
            return None
        status = json.loads(done.stdout).get("status", {})
        kinds = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
        if "Complete" in kinds:
            state, reason = "done", None
        elif "Failed" in kinds:
            reason = kinds["Failed"].get("reason")
            state = "timeout" if reason == "DeadlineExceeded" else "failed"
        else:
            state, reason = (
                ("running", None)
                if status.get("active")
                else ("pending", "Suspended" if "Suspended" in kinds else None)
            )
        return Job(
            id=job,
            state=state,
            reason=reason,
            started=status.get("startTime"),
            ended=status.get("completionTime"),
            raw=",".join(kinds),
        )

    def cancel(self, job: str) -> None:
        succeeded(_kubectl("delete", job), f"kubectl delete {job}")
