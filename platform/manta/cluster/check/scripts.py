"""Batch scripts for Slurm, tasks for SkyPilot, and the image's Dockerfile."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from manta.cluster.check import keys, request
from manta.cluster.check.documents import Document, Problem, unknown

DIRECTIVE = re.compile(r"#SBATCH\s+(?:--([\w-]+)(?:[= ](\S+))?|-(\w)\s*(\S+)?)")

DOCKERFILE = frozenset(
    {
        *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK"),
        *("LABEL", "MAINTAINER", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME"),
        "WORKDIR",
    }
)


def is_batch_script(text: str) -> bool:
    return text.startswith("#!") and "#SBATCH" in text


def slurm(text: str) -> Iterator[Problem]:
    """What is wrong in a batch script: its directives, and how it stops and continues."""
    given: dict[str, tuple[int, str]] = {}
    commands_begin = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#SBATCH"):
            found = DIRECTIVE.match(line)
            if found is None:
                yield Problem(number, f"{line.strip()!r} is not an option of sbatch")
            elif found[1]:
                if found[1] not in keys.SBATCH.split():
                    yield Problem(number, unknown(found[1], keys.SBATCH.split(), "sbatch"))
                given[found[1]] = (number, found[2] or "")
            if commands_begin:
                yield Problem(number, f"unread: it is after the command in line {commands_begin}")
        elif line.strip() and not line.startswith("#") and not commands_begin:
            commands_begin = number
    at, signal = given.get("signal", (0, ""))
    timing = re.fullmatch(r"B:(?:SIG)?(?:USR1|10)@(\d+)", signal)
    if timing is None:
        yield Problem(at, "--signal=B:USR1@SECONDS is missing: at the time limit Slurm would end "
                            "the job without letting it save")  # fmt: skip
    elif (limit := _seconds(given.get("time", (0, ""))[1])) and int(timing[1]) >= limit:
        yield Problem(at, f"the signal comes {timing[1]} s before a limit of {limit} s")
    if "requeue" not in given:
        yield Problem(0, "--requeue is missing: Slurm would not start the job again")
    if "exclusive" not in given:
        yield Problem(0, "--exclusive is missing: `ray symmetric-run` refuses a node where another "
                         "Ray runs, and ends every Ray of this login at its end")  # fmt: skip
    if not re.search(r"^\s*trap .*\bUSR1\b", text, re.MULTILINE):
        yield Problem(0, "the script has no `trap ... USR1`, so the signal would end it")
    if "scontrol requeue" not in text:
        yield Problem(0, "the script never runs `scontrol requeue`, so nothing continues the run")
    if "RAY_AUTH_MODE=token" not in text:
        yield Problem(0, "RAY_AUTH_MODE=token is missing: anyone on the network could run code")
    yield from _syntax(text)


def _syntax(text: str) -> Iterator[Problem]:
    bash = shutil.which("bash")
    if bash is None:
        return
    done = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True, check=False)
    for found in re.finditer(r"line (\d+): (.*)", done.stderr):
        yield Problem(int(found[1]), found[2])


def _seconds(limit: str) -> int:
    """The seconds of a time limit, as sbatch takes one; 0 for one that is not understood."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        return 0
    days, *rest = [int(it) if it else None for it in found.groups()]
    a, b, c = rest
    if days is not None:
        return ((days * 24 + (a or 0)) * 60 + (b or 0)) * 60 + (c or 0)
    if c is not None:
        return ((a or 0) * 60 + (b or 0)) * 60 + c
    return (a or 0) * 60 + (b or 0)


def is_skypilot(value: Any) -> bool:
    return isinstance(value, dict) and "run" in value and "resources" in value


def skypilot(document: Document) -> Iterator[Problem]:
    """What is wrong in a task for SkyPilot."""
    task = document.value
    yield from keys.problems(document, keys.SKYPILOT, "task")
    resources = task["resources"] if isinstance(task["resources"], dict) else {}
    if resources.get("ports"):
        text = "opens ports to every network; reach the dashboard with `ssh -L 8265:...` instead"
        yield document.problem(f"resources.ports {text}", "resources", "ports")
    for key in ("setup", "run"):
        script = str(task.get(key) or "")
        code = "\n".join(line.partition(" #")[0] for line in script.splitlines()
                         if not line.lstrip().startswith("#"))  # fmt: skip
        if re.search(r"\bray stop\b", code):
            text = f"{key}: `ray stop` would end SkyPilot's own Ray, too: use clusters/stop-ray.sh"
            yield document.problem(text, key)
        for port in re.findall(r"port=(6380|8266)\b", code):
            yield document.problem(f"{key}: port {port} is SkyPilot's own Ray's", key)
        for found in _syntax(script):
            yield Problem(document.at(key) + found.line, f"{key}: {found.text}")
    run = str(task["run"])
    envs = task.get("envs") or {}
    if "RAY_AUTH_MODE=token" not in run and envs.get("RAY_AUTH_MODE") != "token":
        yield document.problem("RAY_AUTH_MODE=token is missing: anyone could run code", "run")
    if "MANTA_HOME" not in envs and "MANTA_HOME=" not in run:
        yield document.problem("MANTA_HOME is not set: runs would go with the machines", "envs")
    count = re.search(r":(\d+)", str(resources.get("accelerators", "")))
    asked = request.of(run.replace("\\\n", " ").split())
    if count and "num_workers" in asked:
        room = {"CPU": float("inf"), "GPU": float(int(count[1]) * task.get("num_nodes", 1))}
        for text in request.problems(asked, room, bool(resources.get("use_spot"))):
            yield document.problem(text, "run")


def dockerfile(text: str) -> Iterator[Problem]:
    """What is wrong in a Dockerfile: an image that floats, the user root, an unknown word."""
    user, continued = "root", False
    arguments: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        is_comment = line.lstrip().startswith("#")
        if not continued and line.strip() and not is_comment:
            word, _, rest = line.strip().partition(" ")
            if word not in DOCKERFILE:
                yield Problem(number, unknown(word, DOCKERFILE, "the Dockerfile"))
            if word == "ARG":
                name, _, value = rest.partition("=")
                arguments[name.strip()] = value
            image = re.sub(r"\$\{?(\w+)\}?", lambda it: arguments.get(it[1], it[0]), rest)
            if word == "FROM" and not re.search(r"[:@][\w.\-:$]+", image):
                yield Problem(number, f"{image} has no tag, so it changes from day to day")
            user = rest.strip() if word == "USER" else user
            if word == "EXPOSE":
                yield Problem(number, "EXPOSE opens a port; the cluster's own rules say which are")
        if not is_comment:
            continued = line.rstrip().endswith("\\")
    if user in ("root", "0"):
        yield Problem(0, "the image ends as root: add `USER ray`")
