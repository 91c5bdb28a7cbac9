"""Kubernetes: a RayJob for the KubeRay operator, with the configuration in a ConfigMap."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dmpo_dist.config.submit import KubernetesConfig
from dmpo_dist.errors import UserError
from dmpo_dist.submit.commands import ask, attempt, failure, hand_over, interruptible
from dmpo_dist.submit.job import CONFIG_FILE, Record, SubmitJob, render

MANIFEST = "rayjob.yaml"
RUN_PATH = "/etc/dmpo"
POLL_SECONDS = 2.0
MAY_BE_LOST = 5
ENDED = ("Complete", "Failed", "ValidationFailed")
GONE = "gone; the RayJob has been deleted"


def files(job: SubmitJob) -> dict[str, str]:
    """The manifest.

    Raises:
        UserError: no image or claim, or folders outside the mounted volume, which would be lost with the pods.
    """
    settings = job.submit.kubernetes
    if settings.image is None:
        raise UserError("submit.kubernetes.image is not set; name the image built from docker/Dockerfile")
    if settings.volume_claim is None:
        raise UserError(
            "submit.kubernetes.volume_claim is not set; name a ReadWriteMany claim for data and checkpoints"
        )
    mount = PurePosixPath(settings.mount_path)
    for key, path in job.folders().items():
        if job.verb != "doctor" and (mount not in PurePosixPath(path).parents or ".." in path.parts):
            raise UserError(
                f"{key}={path}: must lie below submit.kubernetes.mount_path={mount}, where the claim "
                f"{settings.volume_claim} is mounted"
            )
    shared = {"target": "kubernetes", "nodes": job.submit.nodes + 1, "retries": settings.retries}
    values = job.values() | shared | {"kubernetes": settings, "run_path": RUN_PATH, "config_text": job.config_text()}
    text = render(MANIFEST, values | {"driver": render("driver.sh", values)})
    _require_whole(text, job)
    return {MANIFEST: text, CONFIG_FILE: job.config_text()}


def _require_whole(text: str, job: SubmitJob) -> None:
    """What is rendered must be YAML that holds the configuration unchanged."""
    config_map, ray_job = yaml.safe_load_all(text)
    assert ray_job["kind"] == "RayJob"
    assert yaml.safe_load(config_map["data"][CONFIG_FILE]) == yaml.safe_load(job.config_text())


def _kubectl(namespace: str, context: str | None) -> list[str]:
    return ["kubectl", *(["--context", context] if context else []), "--namespace", namespace, "--request-timeout=30s"]


def check(job: SubmitJob) -> None:
    """Refuse what this cluster cannot run.

    Raises:
        UserError: no kubectl or cluster, no KubeRay, a claim or secret that is not there, or more than its nodes have.
    """
    settings = job.submit.kubernetes
    kubectl = _kubectl(settings.namespace, settings.context)
    done = attempt(*kubectl, "get", "--raw", "/version")
    if done.returncode:
        raise UserError(
            f"the Kubernetes cluster cannot be reached ({failure(('kubectl',), done.stderr)}); check `kubectl "
            "cluster-info` and submit.kubernetes.context, or write the manifest with --render-only"
        )
    found = attempt(*kubectl, "get", "crd", "rayjobs.ray.io", "--output=name")
    if found.returncode and "NotFound" in found.stderr:
        raise UserError("the cluster has no RayJobs; install the KubeRay operator (1.6 or later) there")
    for kind, name in _needed(settings):
        done = attempt(*kubectl, "get", kind, name, "--output=name")
        if done.returncode and "NotFound" in done.stderr:
            raise UserError(
                f"namespace {settings.namespace} has no {kind} {name}; create it, or correct submit.kubernetes"
            )
    if not settings.autoscaling:
        done = attempt(*kubectl, "get", "nodes", "--output=json")
        if done.returncode == 0:  # not everybody may list nodes
            problem = unfit(job, json.loads(done.stdout)["items"])
            if problem:
                raise UserError(problem)


def _needed(settings: KubernetesConfig) -> list[tuple[str, str]]:
    named = [
        ("persistentvolumeclaim", settings.volume_claim),
        ("secret", settings.secret),
        ("secret", settings.image_pull_secret),
        ("serviceaccount", settings.service_account),
    ]
    return [(kind, name) for kind, name in named if name is not None]


def unfit(job: SubmitJob, nodes: list[dict[str, Any]]) -> str | None:
    """Why nodes (as kubectl lists them) cannot hold the workers; None when they can, other pods left aside."""
    submit, resource = job.submit, job.submit.kubernetes.gpu_resource
    wanted, room = submit.kubernetes.node_selector, 0
    have: list[tuple[float, int]] = []
    for node in nodes:
        labels, size = node["metadata"].get("labels", {}), node["status"]["allocatable"]
        if node.get("spec", {}).get("unschedulable") or any(labels.get(k) != v for k, v in wanted.items()):
            continue
        cpus, gpus = _cpus(size["cpu"]), int(size.get(resource, 0))
        have.append((cpus, gpus))
        fit = int(cpus // submit.cpus_per_node)
        room += min(fit, gpus // submit.gpus_per_node) if submit.gpus_per_node else fit
    if room >= submit.nodes:
        return None
    return (
        f"submit.nodes={submit.nodes} pods with {submit.cpus_per_node} CPUs and {submit.gpus_per_node} {resource} "
        f"each: the cluster has room for {room} ({len(have)} nodes to choose from, {sum(c for c, _ in have):g} CPUs "
        f"and {sum(g for _, g in have)} GPUs in all); ask for less, or set submit.kubernetes.autoscaling=true if nodes "
        "are added on demand"
    )


def _cpus(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def submit(job: SubmitJob) -> Record:
    """Create the objects of the manifest.

    Raises:
        UserError: kubectl refuses it.
        Unanswered: the cluster did not answer in time.
    """
    settings = job.submit.kubernetes
    kubectl, manifest = _kubectl(settings.namespace, settings.context), str(job.folder / MANIFEST)
    with interruptible():  # Ctrl-C ends kubectl too, which would look like a job that is not there
        found = attempt(*kubectl, "get", "rayjob", job.name, "--output=name")
    if found.returncode == 0:
        raise UserError(
            f"namespace {settings.namespace} has a RayJob {job.name} already; choose another submit.name, or remove "
            f"it: kubectl --namespace {settings.namespace} delete rayjob,configmap {job.name}"
        )
    # apply, not create: a ConfigMap that an earlier, finished job left is no obstacle
    hand_over(*kubectl, "apply", "-f", manifest)
    return Record("kubernetes", job.name, settings.namespace, context=settings.context)


def announce(record: Record, folder: Path) -> str:
    """What was submitted, in a line."""
    return f"{record.label} is created in namespace {record.where}"


def look(job: SubmitJob) -> str:
    """The commands that show whether the cluster has the job, and end it."""
    return f"kubectl --namespace {job.submit.kubernetes.namespace} get|delete rayjob {job.name}"


@dataclass(frozen=True)
class State:
    """What KubeRay says of a RayJob, and Ray of its driver; every try of ``retries`` has an ``attempt`` of its own."""

    deployment: str = ""
    driver: str = ""
    message: str = ""
    attempt: str = ""

    @property
    def ended(self) -> bool:
        """Whether no try is running and none will follow."""
        return self.deployment in ENDED

    def __str__(self) -> str:
        words = " ".join(filter(None, (self.deployment, self.driver, self.message)))
        return words or "new; KubeRay has not taken it up yet"


def status(record: Record) -> str:
    """The job's state as KubeRay reports it, with the driver's."""
    found = _state(record)
    return GONE if found is None else str(found)


def _state(record: Record) -> State | None:
    """None where the RayJob is not there.

    Raises:
        UserError: kubectl does not say.
    """
    kubectl = _kubectl(record.where, record.context)
    done = attempt(*kubectl, "get", "rayjob", record.id, "--output=json")
    if done.returncode and "NotFound" in done.stderr:
        return None
    if done.returncode:
        raise UserError(failure(tuple(kubectl[:1]), done.stderr))
    said = json.loads(done.stdout).get("status") or {}
    names = ("jobDeploymentStatus", "jobStatus", "message", "jobId")
    return State(*(str(said.get(name) or "").strip() for name in names))


def follow(record: Record, folder: Path, echo: Callable[[str], None]) -> None:
    """Show the output of each try of the driver, and the job's state between them, until the RayJob has ended.

    Raises:
        UserError: the job failed or was deleted, or kubectl fails again and again.
    """
    shown, said, lost = "", "", 0
    while True:
        try:
            state = _state(record)
        except UserError as error:
            lost += 1
            if lost == MAY_BE_LOST:
                raise UserError(f"{error}; the job may still run there: dmpo submit status {folder}") from None
            time.sleep(POLL_SECONDS)
            continue
        if state is None:
            raise UserError(
                f"{record.label} is {GONE}, and its end is not known; the run's folder says how far it came"
            )
        if str(state) != said:
            said = str(state)
            echo(f"{record.label}: {said}")
        # the pod with the output is made when the cluster of a try is there
        if state.attempt != shown and (state.ended or state.deployment == "Running"):
            if _show_output(record) or state.ended:
                shown, lost = state.attempt, 0
            else:
                lost += 1
        if state.ended:
            break
        if lost == MAY_BE_LOST:
            raise UserError(f"no output: {said}; the pods say why: kubectl --namespace {record.where} get pods")
        time.sleep(POLL_SECONDS)
    if state.driver != "SUCCEEDED":
        raise UserError(f"the job ended as {said}; its output is above, or with the pods")


def _show_output(record: Record) -> bool:
    """Show what the pod prints that hands the driver over and waits for it; False where kubectl could not."""
    kubectl = [part for part in _kubectl(record.where, record.context) if not part.startswith("--request-timeout")]
    arguments = ("logs", "--follow", "--pod-running-timeout=30m", f"job/{record.id}")
    return subprocess.run([*kubectl, *arguments]).returncode == 0


def stop(record: Record) -> None:
    """Delete the RayJob, with its cluster, and the ConfigMap."""
    kubectl = _kubectl(record.where, record.context)
    ask(*kubectl, "delete", "rayjob,configmap", record.id, "--ignore-not-found")
