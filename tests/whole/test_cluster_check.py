"""`python -m manta.cluster check` finds each kind of mistake in a cluster file, before it costs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import ROOT
from manta.cluster.__main__ import main
from manta.cluster.check import keys
from manta.cluster.check.command import inspect
from manta.cluster.check.documents import load, placeholders
from manta.errors import ClusterError

CLUSTERS = ROOT / "clusters"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray" / "auth_token"
    token.write_text("0" * 32)
    token.chmod(0o600)
    return tmp_path


def problems(name: str, old: str, new: str, folder: Path, *job: str) -> list[str]:
    """The problems of a cluster file in which `old` is replaced, without values to fill in."""
    text = (CLUSTERS / name).read_text()
    assert old in text, f"{old} is not in {name}"
    file = folder / Path(name).name
    file.write_text(text.replace(old, new))
    found = inspect(file, job).lines()
    return [line for line in found if "is left to fill in" not in line]


MISTAKES = [
    ("a100x8.yaml", "max_workers: 2\n", "max_worker: 2\n", "did you mean max_workers?"),
    ("a100x8.yaml", "cache_stopped_nodes", "cached_stopped_nodes", "did you mean cache_stopped"),
    ("a100x8.yaml", "      ImageId:", "      ImageID:", "node_config has no key ImageID"),
    ("a100x8.yaml", "VolumeSize", "VolumSize", "Ebs has no key VolumSize; did you mean VolumeSize"),
    ("a100x8.yaml", "head_node_type: head", "head_node_type: haed", "Ray refuses it"),
    ("a100x8.yaml", "    min_workers: 0 ", "    min_workers: 3 ", "smaller than the sum of"),
    ("a100x8.yaml", "\nmax_workers: 2", "\nmax_workers: 0", "more than the cluster's max_workers"),
    ("a100x8.yaml", "ray:2.60.0-py311", "ray:2.59.0-py311", "another Ray or Python"),
    ("a100x8.yaml", "ray:2.60.0-py311", "ray:2.60.0-py310", "another Ray or Python"),
    ("a100x8.yaml", "ray:2.60.0-py311-gpu", "ray:latest", "latest or nightly"),
    ("a100x8.yaml", "pip install -r", "pip install torch==1.0 -r", "pyproject.toml says torch=="),
    ("a100x8.yaml", "s3://FILL-IN/manta", "/home/ray/manta", "goes with its machine"),
    ("a100x8.yaml", "MANTA_HOME=s3://FILL-IN/manta RAY_JOB", "MANTA_HOME=s3://b RAY_JOB",
     "MANTA_HOME is s3://b on the head and"),
    ("a100x8.yaml", "RAY_JOB_STOP_WAIT_TIME_S=60", "", "would kill a job after 3 s"),
    ("a100x8.yaml", "RAY_AUTH_MODE=token", "", "anyone who reaches Ray's ports"),
    ("a100x8.yaml", "RAY_TRAIN_ENABLE_STATE_TRACKING=1", "", "view of training is empty"),
    ("a100x8.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "every network"),
    ("a100x8.yaml", "--object-store-memory=2000000000", "", "30% of the machine's memory"),
    ("a100x8.yaml", '  "~/.ray/auth_token": "~/.ray/auth_token"\n', "", "nodes have no token"),
    ("a100x8.yaml", "clusters/requirements.txt", "clusters/requirement.txt", "is not here"),
    ("a100x8.yaml", "-r ~/.manta/", "-r ~/.mantas/", "no file_mounts puts it there"),
    ("a100x8.yaml", "  type: aws", "  type: [", "not YAML"),
    ("a100x8-spot.yaml", "      InstanceType: m6i.xlarge\n",
     "      InstanceType: m6i.xlarge\n      InstanceMarketOptions: {MarketType: spot}\n",
     "the head head is a spot machine"),
    ("a100x8-multinode.yaml", "          Groups: [sg-00000000000000000]\n", "", "lacks Groups"),
    ("a100x8-multinode.yaml", "InterfaceType", "InterfaceTyp", "did you mean InterfaceType?"),
    ("gcp-a100x8.yaml", "machineType", "machinetype", "did you mean machineType?"),
    ("gcp-a100x8.yaml", "onHostMaintenance", "onHostMaintainance", "did you mean onHostMaint"),
    ("gcp-a100x8.yaml", "project_id:", "project:", "provider gcp has no key project"),
    ("local.yaml", "worker_ips", "workers_ips", "worker_ips"),
    ("local.yaml", "RAY_enable_autoscaler_v2=0", "", "starts no worker"),
    ("local.yaml", "  - sh ~/.manta/stop-ray.sh /tmp/manta-$USER\n", "  - ray stop\n",
     "end every Ray of this login"),
    ("local.yaml", "python3.11 -m venv", "python3.10 -m venv", "Ray wants the same minor version"),
    ("kuberay/cluster.yaml", "{mode: token}", "{mode: disabled}", "is not token"),
    ("kuberay/cluster.yaml", 'rayVersion: "2.60.0"', "rayVersion: 2.50.0", "this machine has Ray"),
    ("kuberay/cluster.yaml", "workerGroupSpecs", "workerGroupSpec", "did you mean workerGroup"),
    ("kuberay/cluster.yaml", "mountPath: /manta", "mountPath: /mantas", "in no volume of the pod"),
    ("kuberay/cluster.yaml", "minReplicas: 0 ", "minReplicas: 3 ", "contradict each other"),
    ("kuberay/cluster.yaml", "{name: MANTA_HOME, value: /manta}\n              - {name: RAY_TRAIN"
     '_ENABLE_STATE_TRACKING, value: "1"}\n              - {name: RAY_JOB',
     '{name: MANTA_HOME, value: /manta/x}\n              - {name: RAY_JOB', "differs between"),
    ("kuberay/job.yaml", "  backoffLimit: 5 ", "  backofLimit: 5 ", "did you mean backoffLimit?"),
    ("kuberay/job.yaml", "  shutdownAfterJobFinishes: true", "  suspend: false", "bills on"),
    ("kuberay/job.yaml", "num_workers=8", "num_workers=16", "set num_workers=8"),
    ("kuberay/job.yaml", "entrypoint: >-", "entrypoints: >-", "entrypoint"),
    ("slurm/pretrain.sbatch", "--exclusive\n", "--exlusive\n", "did you mean exclusive?"),
    ("slurm/pretrain.sbatch", "--signal=B:USR1@300", "--signal=USR1@300", "--signal=B:USR1@SEC"),
    ("slurm/pretrain.sbatch", "--time=24:00:00", "--time=5", "300 s before a limit of 300 s"),
    ("slurm/pretrain.sbatch", "#SBATCH --requeue\n", "", "--requeue is missing"),
    ("slurm/pretrain.sbatch", "scontrol requeue", "echo", "never runs `scontrol requeue`"),
    ("slurm/pretrain.sbatch", "trap 'save USR1' USR1", "", "no `trap ... USR1`"),
    ("slurm/pretrain.sbatch", "step() {", "step( {", "syntax error"),
    ("skypilot.yaml", "use_spot", "use_spots", "did you mean use_spot?"),
    ("skypilot.yaml", "sh clusters/stop-ray.sh /tmp/manta-ray/ray\n  py", "ray stop\n  py",
     "end SkyPilot's own Ray"),
    ("skypilot.yaml", "--port=6379", "--port=6380", "SkyPilot's own Ray's"),
    ("skypilot.yaml", "  cpus: 32+", "  cpus: 32+\n  ports: 8265", "opens ports to every network"),
    ("image/Dockerfile", "ray:2.60.0-py311-gpu", "ray", "rayproject/ray has no tag"),
    ("image/Dockerfile", "USER 1000", "", "ends as root"),
    ("image/Dockerfile", "WORKDIR /tmp", "WORKDIRS /tmp", "did you mean WORKDIR?"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "old", "new", "said"), MISTAKES, ids=[f"{m[0]} {m[3][:40]}" for m in MISTAKES]
)
def test_a_mistake_is_said(name: str, old: str, new: str, said: str, tmp_path: Path) -> None:
    found = problems(name, old, new, tmp_path)
    assert any(said in line for line in found), found


CLOUDS = [*sorted(CLUSTERS.glob("*a100x8*.yaml")), CLUSTERS / "h100x8.yaml"]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_misspelled_key_in_a_node_config_is_named_with_its_line(data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(CLOUDS))
    lines = file.read_text().splitlines()
    (document,) = load(file.read_text())
    path = data.draw(st.sampled_from(sorted(
        (p for p in document.lines if "node_config" in p[:-1] and isinstance(p[-1], str)),
        key=str,
    )))  # fmt: skip
    key, number = str(path[-1]), document.lines[path]
    cut = data.draw(st.integers(0, len(key) - 1))
    wrong = key[:cut] + key[cut + 1 :] if len(key) > 3 else key + "x"
    config: Any = document.value
    for part in path[:-1]:
        config = config[part]
    if any(wrong in table.split() for table in tables(file).values()) or "key" in config:
        return  # another key that there is, or an item of metadata
    lines[number - 1] = lines[number - 1].replace(key, wrong, 1)
    (document,) = load("\n".join(lines))
    found = [
        problem
        for name in document.value["available_node_types"]
        for problem in keys.problems(
            document, tables(file), "node_config", "available_node_types", name, "node_config"
        )
    ]
    assert [problem.line for problem in found] == [number]
    assert f"no key {wrong}" in found[0].text and key in found[0].text


def tables(file: Path) -> dict[str, str]:
    return keys.NODE_CONFIG[yaml.safe_load(file.read_text())["provider"]["type"]]


@given(
    st.text("abc/:.-_ #\n'\"", max_size=80), st.sampled_from(["FILL_IN", "ami-00000000000000000"])
)
def test_a_value_to_fill_in_is_found_on_its_line_and_not_in_comments(text: str, mark: str) -> None:
    lines = text.splitlines()
    assert list(placeholders(text)) == []
    with_mark = "\n".join([*lines, f"key: {mark}", f"# {mark}"])
    assert [it.line for it in placeholders(with_mark)] == [len(lines) + 1]


def test_all_problems_come_at_once_and_the_exit_code_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "c.yaml"
    text = (CLUSTERS / "local.yaml").read_text()
    file.write_text(text.replace("RAY_AUTH_MODE=token", "").replace("--head ", ""))
    (tmp_path / ".ray" / "auth_token").unlink()
    assert main(["check", str(file)]) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) >= 8 and all(line.startswith("error: ") for line in lines)
    assert "ray get-auth-token --generate" in said.err
    assert "ready" not in said.out


@pytest.mark.parametrize("state", ["missing", "readable", "empty"])
def test_a_token_that_is_not_there_or_not_private_is_said(state: str, home: Path) -> None:
    token = home / ".ray" / "auth_token"
    if state == "missing":
        token.unlink()
    elif state == "readable":
        token.chmod(0o644)
    else:
        token.write_text("")
    (line,) = (x for x in inspect(CLUSTERS / "local.yaml").lines() if "auth_token" in x)
    assert {"missing": "--generate", "readable": "chmod 600", "empty": "empty"}[state] in line


@pytest.mark.parametrize(
    ("name", "job", "said"),
    [
        ("a100x8.yaml", ["num_workers=9", "gpus_per_worker=1"], "set num_workers=8"),
        ("a100x8.yaml", ["jobs/configs/gpt2-124m.yaml"], ""),
        ("a100x8.yaml", ["jobs/configs/gpt2-124m.yaml", "num_workers=[8,64]"], ""),
        ("a100x8.yaml", ["jobs/configs/gpt2-124m.yaml", "num_workers=[16,64]"], "16 GPUs"),
        ("a100x8-multinode.yaml", ["num_workers=32", "gpus_per_worker=1"], ""),
        ("a100x8-spot.yaml", ["checkpoint.every=null"], "set checkpoint.every_minutes=auto"),
        ("a100x8-spot.yaml", ["checkpoint.every=null", "checkpoint.every_minutes=auto"], ""),
    ],
)
def test_a_job_that_does_not_fit_is_said(name: str, job: list[str], said: str) -> None:
    lines = [x for x in inspect(CLUSTERS / name, job).lines() if "is left to fill in" not in x]
    assert len(lines) == bool(said) and said in "".join(lines)


def test_a_file_of_no_kind_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1\n")
    with pytest.raises(ClusterError, match="neither a file for `ray up`"):
        inspect(tmp_path / "x.yaml")
    with pytest.raises(ClusterError, match="cannot be read"):
        inspect(tmp_path / "y.yaml")
    with pytest.raises(ClusterError, match="usage"):
        main(["chekc"])


def test_stop_ray_ends_the_ray_of_its_folder_alone(tmp_path: Path) -> None:
    """Processes whose command lines are those of two Rays, and a shell that names the folder."""
    code = "import time; print('up', flush=True); time.sleep(60)"
    ours, others = (
        subprocess.Popen(
            [sys.executable, "-c", code, f"--session-dir={tmp_path}/{name}/session_1"],
            stdout=subprocess.PIPE,
        )
        for name in ("ours", "others")
    )
    with ours, others:
        assert [it.stdout and it.stdout.readline() for it in (ours, others)] == [b"up\n"] * 2
        script = f"sh {CLUSTERS}/stop-ray.sh {tmp_path}/ours; echo still here"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
        assert done.stdout == "still here\n"
        assert ours.wait(5) == -15
        assert others.poll() is None
        others.kill()
