"""`python -m manta.cluster check FILE [the job's arguments]`, before anything costs money."""

import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from manta.cluster.authentication import TOKEN_FILE
from manta.cluster.check import account, keys, kuberay, launcher, pins, request, scripts, start
from manta.cluster.check.documents import Document, Problem, load, placeholders, read
from manta.errors import ClusterError
from manta.terminal import LONGEST_LINE
from manta.terminal import line as one_line


class Report:
    """What was found in one file: problems, and lines on what is ready or was not checked."""

    def __init__(self, file: Path):
        self.file = file
        self.problems: list[Problem] = []
        self.ready: list[str] = []
        self.unchecked: list[str] = []

    def lines(self) -> Iterator[str]:
        """A line for each problem, in the order of the file."""
        for line, text in sorted(set(self.problems)):
            yield f"{self.file}:{line}: {text}" if line else f"{self.file}: {text}"


def check(path: str, job: Sequence[str] = ()) -> int:
    """Prints all problems of a cluster file, or what is ready; returns the exit code, 2 or 0.

    Raises:
        ClusterError: the file cannot be read, or is of no kind that Manta knows.
    """
    report = inspect(Path(path), job)
    for line in report.lines():
        print(f"error: {one_line(line, LONGEST_LINE)}", file=sys.stderr)
    for line in report.unchecked:
        print(f"not checked: {one_line(line, LONGEST_LINE)}")
    if report.problems:
        return 2
    for line in report.ready:
        print(f"ready: {one_line(f'{path}: {line}', LONGEST_LINE)}")
    return 0


def inspect(file: Path, job: Sequence[str] = ()) -> Report:
    """Checks a cluster file of any kind. `job` has the arguments of the job that is to run there.

    Raises:
        ClusterError: the file cannot be read, or is of no kind that Manta knows.
    """
    text = read(file)
    report = Report(file)
    report.problems += placeholders(text)
    report.problems += pins.problems(text)
    report.ready.append("every value is filled in")
    report.ready.append(
        f"its versions are those of pyproject.toml, Ray {pins.ray_version()} and this Python"
    )
    asked = request.of(job)
    if scripts.is_batch_script(text):
        report.problems += scripts.slurm(text)
        report.ready.append("sbatch knows its options; it saves and requeues at its time limit")
        _token(report)
    elif file.name == "Dockerfile" or file.suffix == ".dockerfile":
        report.problems += scripts.dockerfile(text)
        report.ready.append("the image is pinned, and does not run as root")
    else:
        _yaml(report, text, asked)
    return report


def _yaml(report: Report, text: str, asked: dict[str, object]) -> None:
    """Checks the documents of a YAML file, each by its kind."""
    try:
        documents = load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        reason = getattr(e, "problem", None) or "it cannot be parsed"
        report.problems.append(Problem(mark.line + 1 if mark else 0, f"not YAML: {reason}"))
        return
    known = 0
    for document in documents:
        value = document.value
        if not isinstance(value, dict):
            continue
        if "cluster_name" in value or "provider" in value:
            _launcher(report, document, asked)
        elif value.get("kind") in kuberay.KINDS:
            report.problems += kuberay.problems(document)
            report.ready.append(f"{value['kind']} has KubeRay's keys, token auth and a home")
        elif "apiVersion" in value and "kind" in value:
            report.unchecked.append(f"{report.file}: the keys of {value['kind']}, for Kubernetes")
        elif scripts.is_skypilot(value):
            report.problems += scripts.skypilot(document)
            report.ready.append("SkyPilot knows its keys; its own Ray is left alone")
            _token(report)
        else:
            continue
        known += 1
    if not known:
        raise ClusterError(
            f"{report.file}: neither a file for `ray up` (cluster_name, provider), nor for KubeRay "
            "(kind: RayCluster or RayJob), nor for SkyPilot (resources, run), nor a batch script "
            "(#SBATCH), nor a Dockerfile"
        )


def _launcher(report: Report, document: Document, asked: dict[str, object]) -> None:
    config = document.value
    found = list(launcher.problems(document))
    report.problems += found
    provider = config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if kind in keys.PROVIDERS:
        report.ready.append("Ray accepts it, and knows every key in provider and node_config")
    else:
        report.ready.append("Ray accepts it")
        report.unchecked.append(f"the keys in provider and node_config of the provider {kind}")
    report.ready.append("head and workers start with token auth and one MANTA_HOME")
    _token(report)
    types = config.get("available_node_types")
    if not isinstance(types, dict) or any("not the structure" in it.text for it in found):
        return
    spot = any(launcher.is_spot(it.get("node_config") or {}) for it in types.values())
    try:
        room = launcher.room(config)
    except (AttributeError, KeyError, TypeError):
        return  # Ray's validator has said why
    texts = request.problems(asked, room, spot)
    report.problems += [document.problem(text, "max_workers") for text in texts]
    if kind != "aws":
        if kind != "local":
            report.unchecked.append(f"whether the account of {kind} has what the file names")
        return
    incomplete = "values are left to fill in"
    waits = any("left to fill in" in it.text for it in report.problems)
    reached = incomplete if waits else account.connect(str(config["provider"].get("region")))
    if isinstance(reached, str):
        report.unchecked.append(
            f"image, instance profile, machine types, quotas and bucket on AWS: {reached}"
        )
        return
    report.problems += reached.problems(document)
    for command in config.get(start.HEAD) or []:
        for home in start.HOME.findall(str(command)):
            if text := reached.bucket(home):
                report.problems.append(document.problem(text, start.HEAD))
    report.unchecked += [f"{it}: AWS did not let us read it" for it in reached.unread]
    report.ready.append("the AWS account has the images, profiles, machine types and quotas")


def _token(report: Report) -> None:
    """Ray's token on this machine, which the nodes get a copy of."""
    file = TOKEN_FILE.expanduser()
    make = "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token"
    if not file.is_file():
        text = f"{file} is missing, the token that the cluster will ask for: run `{make}`"
    elif stat.S_IMODE(file.stat().st_mode) & 0o077:
        text = f"others can read {file}, which lets them run code as you: run `chmod 600 {file}`"
    elif not file.read_text().strip():
        text = f"{file} is empty: remove it and run `{make}`"
    else:
        report.ready.append(f"{file} is there, and only you can read it")
        return
    report.problems.append(Problem(0, text))
