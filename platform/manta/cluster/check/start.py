"""The commands of a `ray up` file that start Ray: what has to be in them, on head and workers."""

import re
from collections.abc import Iterator
from typing import Any

from manta.cluster.check.documents import Document, Problem

HEAD = "head_start_ray_commands"
WORKER = "worker_start_ray_commands"
TOKEN = "~/.ray/auth_token"
HOME = re.compile(r"\bMANTA_HOME=(\S+)")


def problems(document: Document) -> Iterator[Problem]:
    """What is missing or wrong in the commands that start Ray."""
    config: dict[str, Any] = document.value
    local = config["provider"].get("type") == "local"
    for key, head in ((HEAD, True), (WORKER, False)):
        commands = [it for it in config.get(key) or [] if isinstance(it, str)]
        starts = [it for it in commands if re.search(r"\bray start\b", it)]
        if len(starts) != 1:
            yield document.problem(f"{key} has {len(starts)} `ray start`, and needs one", key)
            continue
        at = (key, commands.index(starts[0]))
        for missing, why in _missing(starts[0], head, local):
            yield document.problem(f"{key}: {missing} is missing: {why}", *at)
        if local and any(re.search(r"\bray stop\b", it) for it in commands):
            text = (
                f"{key}: `ray stop` would end every Ray of this login on the machine; end this "
                "cluster's own with clusters/stop-ray.sh"
            )
            yield document.problem(text, key)
    yield from _token(document)
    yield from _home(document)


def _missing(start: str, head: bool, local: bool) -> Iterator[tuple[str, str]]:
    """What a command that starts Ray lacks, and what it is for."""
    before, _, after = start.partition("ray start")
    wanted = [
        (before, "RAY_AUTH_MODE=token", "without it anyone who reaches Ray's ports can run code"),
        (before, "RAY_TRAIN_ENABLE_STATE_TRACKING=1", "the dashboard's view of training is empty"),
        (after, "--object-store-memory=", "Ray would take 30% of the machine's memory"),
        (after, "--object-spilling-directory=", "say which disk takes what memory cannot"),
    ]
    if head:
        wanted += [
            (after, "--head", "this node is the head"),
            (after, "--dashboard-host=127.0.0.1", "the dashboard runs code for whoever reaches it"),
            (after, "--autoscaling-config=~/ray_bootstrap_config.yaml", "no worker would start"),
            (before, "RAY_JOB_STOP_WAIT_TIME_S=", "`ray job stop` would kill a job after 3 s, "
             "before it has saved: set 60"),
        ]  # fmt: skip
        if local:
            wanted.append(
                (before, "RAY_enable_autoscaler_v2=0", "version 2 of the autoscaler never counts a "
                 "local head as running, and starts no worker")
            )  # fmt: skip
    else:
        wanted.append((after, "--address=$RAY_HEAD_IP:", "the worker would not find its head"))
    return ((what, why) for text, what, why in wanted if what not in text.split("#")[0])


def _token(document: Document) -> Iterator[Problem]:
    config = document.value
    if TOKEN not in (config.get("file_mounts") or {}):
        yield document.problem(
            f"file_mounts lacks {TOKEN}: {TOKEN}, so the nodes have no token", "file_mounts"
        )
    setup = [config.get(key) or [] for key in ("setup_commands", HEAD)]
    if not any(f"chmod 600 {TOKEN}" in str(it) for commands in setup for it in commands):
        text = f"no command runs `chmod 600 {TOKEN}`: rsync keeps the mode that it has here"
        yield document.problem(text, "setup_commands")


def _home(document: Document) -> Iterator[Problem]:
    """MANTA_HOME, which all nodes have to share."""
    config = document.value
    homes = {}
    for key in (HEAD, WORKER):
        found = {
            home
            for it in config.get(key) or []
            if re.search(r"\bray start\b", str(it))
            for home in HOME.findall(str(it))
        }
        if len(found) != 1:
            text = f"{key}: set MANTA_HOME once, the folder for data and runs that all nodes share"
            yield document.problem(text, key)
        else:
            homes[key] = found.pop()
    if len(set(homes.values())) == 2:
        text = f"MANTA_HOME is {homes[HEAD]} on the head and {homes[WORKER]} on workers: share one"
        yield document.problem(text, WORKER)
    home = homes.get(HEAD, "")
    mounted = any(
        option.partition(":")[0].split()[-1:] == [folder]
        for option in (config.get("docker") or {}).get("run_options") or []
        for folder in [home, *_above(home)]
    )
    if home.startswith(("/", "~")) and config["provider"].get("type") != "local" and not mounted:
        text = (
            f"MANTA_HOME={home} is on a disk that goes with its machine: use a bucket "
            "(s3://, gs://), or mount a shared file system there (-v in docker.run_options)"
        )
        yield document.problem(text, HEAD)


def _above(folder: str) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[:n]) for n in range(2, len(parts))]
