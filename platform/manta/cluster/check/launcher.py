"""Files for `ray up`: Ray's own validator, and what it does not look into."""

import contextlib
import copy
import io
import itertools
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manta.cluster.check import keys, start
from manta.cluster.check.documents import Document, Problem, strings, unknown
from manta.cluster.check.pins import REQUIREMENTS, requirements_problems


def problems(document: Document) -> Iterator[Problem]:
    """Everything that is wrong in a file for `ray up`."""
    config = document.value
    provider = config.get("provider")
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        yield document.problem("provider.type is missing: local, aws or gcp", "provider")
        return
    if refused := _refusal(document):
        yield refused
        return
    kind = provider["type"]
    known = keys.PROVIDERS.get(kind, "").split()
    for key in provider:
        if known and key not in known:
            yield document.problem(unknown(key, known, f"provider {kind}"), "provider", key)
    types = config.get("available_node_types") or {}
    for name in types:
        tables = keys.NODE_CONFIG.get(kind, {})
        at = ("available_node_types", name, "node_config")
        yield from keys.problems(document, tables, "node_config", *at)
    yield from _counts(document, types)
    if kind == "aws":
        yield from _aws(document, types)
    yield from _spot(document, types)
    yield from start.problems(document)
    yield from _mounts(document)
    for path, text in strings(config):
        if "0.0.0.0" in text:
            yield document.problem("0.0.0.0 opens a port to every network", *path)


def _refusal(document: Document) -> Problem | None:
    """What Ray's validator says against the file."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(copy.deepcopy(document.value)))
    except jsonschema.ValidationError as e:
        path = [part for part in e.absolute_path if isinstance(part, str | int)]
        names = e.schema.get("properties", {}) if isinstance(e.schema, dict) else {}
        strange = set(e.instance) - set(names) if isinstance(e.instance, dict) else set()
        if e.validator == "additionalProperties" and strange and names:
            name = min(map(str, strange))
            where = ".".join(map(str, path)) or "the file"
            return document.problem(unknown(name, list(names), where), *path, name)
        return document.problem(f"Ray refuses it: {e.message[:300]}", *path)
    except (Exception, SystemExit) as e:  # (its checks of other kinds raise many kinds)
        text = " ".join((str(e) or said.getvalue() or type(e).__name__).split())
        return document.problem(f"Ray refuses it: {text[:300]}")
    return None


def _counts(document: Document, types: dict[str, Any]) -> Iterator[Problem]:
    """Numbers of workers that contradict each other."""
    config = document.value
    most = config.get("max_workers")
    fewest = 0
    for name, it in types.items():
        low, high = it.get("min_workers", 0), it.get("max_workers", most)
        at = ("available_node_types", name)
        if name != config.get("head_node_type"):
            fewest += low
        if high is not None and low > high:
            text = f"{name}: min_workers {low} is more than its max_workers {high}"
            yield document.problem(text, *at, "min_workers")
        if most is not None and high is not None and high > most:
            text = f"{name}: max_workers {high} is more than the cluster's max_workers {most}"
            yield document.problem(text, *at, "max_workers")
    if most is not None and fewest > most:
        text = f"max_workers {most}, but the node types start at least {fewest}"
        yield document.problem(text, "max_workers")


def room(config: dict[str, Any]) -> dict[str, float]:
    """The most CPUs and GPUs that the cluster can have, as far as the file says."""
    total = {"CPU": 0.0, "GPU": 0.0}
    left = config.get("max_workers", 0)
    types = config.get("available_node_types") or {}
    for name, it in sorted(types.items(), key=lambda pair: -pair[1]["resources"].get("GPU", 0)):
        head = name == config.get("head_node_type")
        n = min(it.get("max_workers", left), left) if not head else 1
        left -= 0 if head else n
        for resource in total:
            total[resource] += n * it["resources"].get(resource, 0)
    return total


def _aws(document: Document, types: dict[str, Any]) -> Iterator[Problem]:
    for name, it in types.items():
        node, at = it["node_config"], ("available_node_types", name, "node_config")
        if "ImageId" not in node and "LaunchTemplate" not in node:
            text = f"{name}: ImageId is missing, so Ray would take an image with Ubuntu 18.04"
            yield document.problem(text, *at)
        interfaces = node.get("NetworkInterfaces") or []
        if interfaces and {"SubnetId", "SubnetIds", "SecurityGroupIds"} & set(node):
            text = f"{name}: with NetworkInterfaces, subnets and groups stand in each of them only"
            yield document.problem(text, *at)
        for i, one in enumerate(interfaces):
            if missing := {"SubnetId", "Groups"} - set(one):
                text = f"{name}: an interface lacks {' and '.join(sorted(missing))}"
                yield document.problem(text, *at, "NetworkInterfaces", i)


def is_spot(node: dict[str, Any]) -> bool:
    """Whether the provider may take such a machine back."""
    scheduling = node.get("scheduling") or {}
    market = node.get("InstanceMarketOptions") or {}
    entries = scheduling if isinstance(scheduling, list) else [scheduling]
    return market.get("MarketType") == "spot" or any(
        it.get("provisioningModel") == "SPOT" or it.get("preemptible") for it in entries
    )


def _spot(document: Document, types: dict[str, Any]) -> Iterator[Problem]:
    head = document.value.get("head_node_type")
    if head in types and is_spot(types[head]["node_config"]):
        text = f"the head {head} is a spot machine: the cluster would end when it is taken back"
        yield document.problem(text, "available_node_types", head)


def _mounts(document: Document) -> Iterator[Problem]:
    """Files that are copied to the nodes, and what they install from them."""
    mounts = document.value.get("file_mounts") or {}
    for remote, local in mounts.items():
        file = Path(str(local)).expanduser()
        if str(local) == start.TOKEN:
            continue  # command.py says more of it
        if not file.exists():
            text = f"{local} is copied to the nodes, and is not here (paths are from {Path.cwd()})"
            yield document.problem(text, "file_mounts", remote)
        elif file.name == REQUIREMENTS.name:
            for text in requirements_problems(file):
                yield Problem(document.at("file_mounts", remote), f"{local}: {text}")
    commands = [
        shlex.split(it, comments=True)
        for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")
        for it in document.value.get(key) or []
        if it.count("'") % 2 == 0 and it.count('"') % 2 == 0
    ]
    for words in commands:
        for word in [b for a, b in itertools.pairwise(words) if a == "-r"]:
            if word.startswith("~") and word not in mounts:
                text = f"{word} is installed from, and no file_mounts puts it there"
                yield document.problem(text, "setup_commands")
