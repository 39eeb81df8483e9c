"""Manifests for KubeRay: RayCluster and RayJob, and what else stands in the same file."""

import shlex
from collections.abc import Iterator
from typing import Any

from manta.cluster.check import keys, request
from manta.cluster.check.documents import Document, Path_, Problem

KINDS = ("RayCluster", "RayJob")


def problems(document: Document) -> Iterator[Problem]:
    """Everything that is wrong in a RayCluster or a RayJob."""
    manifest = document.value
    kind = manifest["kind"]
    if manifest.get("apiVersion") != "ray.io/v1":
        text = f"apiVersion {manifest.get('apiVersion')} of {kind} is not ray.io/v1"
        yield document.problem(text, "apiVersion")
    try:
        yield from keys.problems(document, keys.KUBERAY, kind)
        path: Path_ = ("spec",) if kind == "RayCluster" else ("spec", "rayClusterSpec")
        spec = manifest["spec"] if kind == "RayCluster" else manifest["spec"].get("rayClusterSpec")
        if spec is not None:
            yield from _cluster(document, spec, path)
        if kind == "RayJob":
            yield from _job(document, manifest["spec"], spec)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        text = f"{kind} has not the structure that KubeRay wants ({type(e).__name__}: {e})"
        yield document.problem(text, "spec")


def _groups(spec: dict[str, Any], path: Path_) -> Iterator[tuple[dict[str, Any], Path_]]:
    yield spec["headGroupSpec"], (*path, "headGroupSpec")
    for i, group in enumerate(spec.get("workerGroupSpecs") or []):
        yield group, (*path, "workerGroupSpecs", i)


def _cluster(document: Document, spec: dict[str, Any], path: Path_) -> Iterator[Problem]:
    auth = spec.get("authOptions") or {}
    if auth.get("mode") != "token":
        text = "authOptions.mode is not token: whoever reaches the cluster's ports can run code"
        yield document.problem(text, *path, "authOptions")
    homes = {}
    for group, at in _groups(spec, path):
        container = group["template"]["spec"]["containers"][0]
        inside = (*at, "template", "spec", "containers", 0)
        env = {it["name"]: it.get("value") for it in container.get("env") or []}
        homes[at] = home = str(env.get("MANTA_HOME", ""))
        mounted = [it["mountPath"] for it in container.get("volumeMounts") or []]
        if not home:
            text = "MANTA_HOME is not set: data and runs would be on the pod's own disk"
            yield document.problem(text, *inside, "env")
        elif home.startswith("/") and not any(
            home == it or home.startswith(it.rstrip("/") + "/") for it in mounted
        ):
            text = f"MANTA_HOME={home} is in no volume of the pod, so its runs go with the pod"
            yield document.problem(text, *inside, "env")
        if not container.get("resources", {}).get("limits"):
            text = "without resources.limits Ray counts the CPUs and the memory of the whole node"
            yield document.problem(text, *inside)
        low, high = group.get("minReplicas", 0), group.get("maxReplicas")
        n = group.get("replicas", low)
        if high is not None and not low <= n <= high:
            text = f"minReplicas {low}, replicas {n}, maxReplicas {high} contradict each other"
            yield document.problem(text, *at)
    if len(set(homes.values())) > 1:
        text = f"MANTA_HOME differs between the groups: {', '.join(sorted(set(homes.values())))}"
        yield document.problem(text, *path)


def _job(document: Document, job: dict[str, Any], spec: dict[str, Any] | None) -> Iterator[Problem]:
    if auth := ((spec or {}).get("authOptions") or {}).get("enableK8sTokenAuth"):
        text = f"enableK8sTokenAuth {auth} does not go with a RayJob"
        yield document.problem(text, "spec", "rayClusterSpec", "authOptions")
    if not job.get("backoffLimit"):
        text = "backoffLimit is not set, so a job that fails is not started again to continue"
        yield document.problem(text, "spec", "backoffLimit")
    if not job.get("shutdownAfterJobFinishes") and "clusterSelector" not in job:
        text = "shutdownAfterJobFinishes is not set: the cluster bills on after the job's end"
        yield document.problem(text, "spec", "shutdownAfterJobFinishes")
    words = shlex.split(job.get("entrypoint") or "")
    if not words:
        yield document.problem("entrypoint is missing: the command of the job", "spec")
    for text in request.problems(request.of(words), room(spec), False) if spec else ():
        yield document.problem(text, "spec", "entrypoint")


def room(spec: dict[str, Any]) -> dict[str, float]:
    """The most CPUs and GPUs that the worker groups can have."""
    total = {"CPU": 0.0, "GPU": 0.0}
    for group in spec.get("workerGroupSpecs") or []:
        n = group.get("maxReplicas", group.get("replicas", 0)) * group.get("numOfHosts", 1)
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        for resource, name in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")):
            text = str(limits.get(name, 0))
            each = float(text[:-1]) / 1000 if text.endswith("m") else float(text)
            total[resource] += n * each
    return total
