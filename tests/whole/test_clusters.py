"""The files in clusters/ can run only for money or on someone's machines, so all that can be
checked here is checked: each has no problem but the values that a person fills in.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private import ray_constants

from helpers.common import ROOT
from manta.cluster.check import pins
from manta.cluster.check.command import Report, inspect
from manta.cluster.check.documents import strings

CLUSTERS = ROOT / "clusters"
FILES = sorted(
    file
    for file in CLUSTERS.rglob("*")
    if file.name != "prices.yaml"
    and (file.suffix in (".yaml", ".sbatch") or file.name == "Dockerfile")
)
LAUNCHER = [file for file in FILES if file.parent == CLUSTERS and file.stem != "skypilot"]
names = {"ids": lambda path: str(path.relative_to(CLUSTERS))}


@pytest.fixture(autouse=True)
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a token, and the folder from which the commands are run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.chdir(ROOT)
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.touch(0o600)
    file.write_text("0" * 32)
    return file


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / name).read_text())


def test_every_kind_of_cluster_has_its_file() -> None:
    assert {str(file.relative_to(CLUSTERS)) for file in FILES} >= {
        *("local.yaml", "a100x8.yaml", "h100x8.yaml", "a100x8-spot.yaml", "a100x8-multinode.yaml"),
        *("gcp-a100x8.yaml", "skypilot.yaml", "slurm/pretrain.sbatch", "image/Dockerfile"),
        *("kuberay/cluster.yaml", "kuberay/job.yaml", "kuberay/home.yaml"),
    }


@pytest.mark.parametrize("file", FILES, **names)
def test_it_has_no_problem_but_what_is_left_to_fill_in(file: Path) -> None:
    problems = list(inspect(file).lines())
    assert [line for line in problems if "is left to fill in" not in line] == []
    marks = re.findall(r"FILL.IN\b", file.read_text())
    if file.suffix == ".yaml":
        assert problems and marks


@pytest.mark.parametrize("file", FILES, **names)
def test_it_is_ready_when_it_is_filled_in(file: Path, tmp_path: Path) -> None:
    report = inspect(filled(file, tmp_path))
    assert list(report.lines()) == []
    assert report.ready


def filled(file: Path, folder: Path) -> Path:
    """A copy of a cluster file with something in place of each value that is left to fill in."""
    text = file.read_text()
    text = text.replace("192.0.2.", "10.1.1.").replace("/FILL_IN/manta", "/srv/manta")
    text = re.sub(r"((?:ami|sg|subnet)-)0{8}", r"\g<1>1234abcd", text)
    copy = folder / file.name
    copy.write_text(re.sub(r"FILL.IN", "mine", text))
    return copy


def test_each_file_is_gone_through_in_the_document() -> None:
    text = (CLUSTERS / "README.md").read_text()
    for file in FILES:
        assert f"({file.relative_to(CLUSTERS)})" in text or f"`{file.name}`" in text, file
        for heading in re.findall(r'clusters/README\.md \("(.+?)"\)', file.read_text()):
            assert f"\n## {heading}\n" in text, f"{file}: {heading}"


def test_versions_stand_in_pyproject_alone() -> None:
    """An edit of pyproject.toml that is not in clusters/ fails here, and names what to run."""
    assert list(pins.requirements_problems(CLUSTERS / "requirements.txt")) == []
    tag = f"{pins.ray_version()}-py{pins.python_tag()}"
    for file in FILES:
        for image in pins.IMAGE.finditer(file.read_text()):
            assert image[0] == f"{image['name']}:{tag}", (
                f"{file}: run `python -m manta.cluster pins`"
            )
        if file.name != "requirements.txt":
            code = "\n".join(line.partition("#")[0] for line in file.read_text().splitlines())
            assert not pins.PIN.search(code.replace("^torch==", "")), f"{file} has a version"


def test_pins_write_what_is_installed(tmp_path: Path) -> None:
    """All files with other versions change, and at the second time none."""
    (tmp_path / "clusters" / "image").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["ray[default]>=2", "pyyaml"]\n'
        '[project.optional-dependencies]\ncloud = ["boto-of-nobody>=1"]\n'
    )
    (tmp_path / "clusters" / "requirements.txt").write_text("ray==1.0\nboto-of-nobody==1.5\n")
    (tmp_path / "clusters" / "a.yaml").write_text("image: rayproject/ray:1.0-py36-gpu\n")
    (tmp_path / "clusters" / "image" / "Dockerfile").write_text("FROM my.io/x/manta:1.0-py36\n")
    changed = pins.write(tmp_path)
    assert changed == ["clusters/requirements.txt", "clusters/a.yaml", "clusters/image/Dockerfile"]
    tag = f"{pins.ray_version()}-py{pins.python_tag()}"
    assert (tmp_path / "clusters" / "a.yaml").read_text() == f"image: rayproject/ray:{tag}-gpu\n"
    text = (tmp_path / "clusters" / "requirements.txt").read_text()
    assert f"ray[default]=={pins.ray_version()}\n" in text and "boto-of-nobody==1.5\n" in text
    assert pins.write(tmp_path) == []


@pytest.mark.parametrize("file", LAUNCHER, **names)
def test_only_holders_of_the_token_get_in(file: Path) -> None:
    config = load(file.name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert not any("0.0.0.0" in text for _, text in strings(config))


@pytest.mark.parametrize("file", [f for f in LAUNCHER if f.stem != "local"], **names)
def test_a_machine_that_lacks_gpus_it_promised_does_not_join(file: Path) -> None:
    """The command before `ray start` is Python that compares what Ray was promised with torch."""
    commands = load(file.name)["worker_start_ray_commands"]
    (checks,) = (i for i, it in enumerate(commands) if it.startswith("python -c"))
    (starts,) = (i for i, it in enumerate(commands) if "ray start" in it)
    assert checks < starts
    code = shlex.split(commands[checks])[2]
    run = {"PATH": os.environ["PATH"], "RAY_OVERRIDE_RESOURCES": '{"CPU": 96, "GPU": 8}'}
    here = "import types, sys; sys.modules['torch'] = t = types.ModuleType('torch'); "
    here += "t.cuda = types.SimpleNamespace(device_count=lambda: int(sys.argv[1])); "
    for has in (8, 7, 0):
        command = [sys.executable, "-c", here + code, str(has)]
        done = subprocess.run(command, env=run, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == (has == 8), done.stderr
        assert has == 8 or f"({has}, 8)" in done.stderr


def node_types(config: dict[str, Any]) -> Iterator[tuple[bool, dict[str, Any]]]:
    for name, it in config.get("available_node_types", {}).items():
        yield name == config["head_node_type"], it


@pytest.mark.parametrize("file", [f for f in LAUNCHER if f.stem != "local"], **names)
def test_a_cloud_costs_little_when_nothing_runs(file: Path) -> None:
    config = load(file.name)
    assert config["idle_timeout_minutes"] <= 15
    for is_head, it in node_types(config):
        if is_head:
            assert it["resources"] == {"CPU": 0}
            assert "InstanceMarketOptions" not in it["node_config"]
        else:
            assert it["min_workers"] == 0
    # Data is prepared without a GPU's price.
    assert any(not is_head and "GPU" not in it["resources"] for is_head, it in node_types(config))
    if config["provider"]["type"] == "aws":
        assert config["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a100x8.yaml", "p4d.24xlarge"),
        ("h100x8.yaml", "p5.48xlarge"),
        ("a100x8-spot.yaml", "p4d.24xlarge"),
        ("a100x8-multinode.yaml", "p4d.24xlarge"),
        ("gcp-a100x8.yaml", "a2-highgpu-8g"),
    ],
)
def test_a_machine_with_eight_gpus_says_so(name: str, kind: str) -> None:
    gpus = [it for _, it in node_types(load(name)) if it["resources"].get("GPU")]
    assert [it["resources"]["GPU"] for it in gpus] == [8]
    node = gpus[0]["node_config"]
    assert kind in (node.get("InstanceType"), node.get("machineType"))
    spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    assert spot == ("spot" in name)
    assert [it["InterfaceType"] for it in node.get("NetworkInterfaces", [])] == (
        ["efa"] * 4 if "multinode" in name else []
    )


def test_the_report_has_a_line_for_each_problem_in_the_files_order() -> None:
    report: Report = inspect(CLUSTERS / "local.yaml")
    numbers = [int(line.split(":")[1]) for line in report.lines()]
    assert numbers == sorted(numbers)
    text = (CLUSTERS / "local.yaml").read_text().splitlines()
    assert all(re.search(r"FILL.IN|192\.0\.2\.", text[n - 1]) for n in numbers)


@pytest.mark.parametrize("name", ["cluster", "job"])
def test_a_pod_that_is_to_go_gives_a_run_time_to_save(name: str) -> None:
    """Ray leaves by itself before Kubernetes kills it; by default it gives a run 30 s."""
    spec = load(f"kuberay/{name}.yaml")["spec"]
    for group in spec.get("rayClusterSpec", spec)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        env = {it["name"]: it["value"] for it in pod["containers"][0]["env"]}
        drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain < pod["terminationGracePeriodSeconds"] - 10
        assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S == 30
