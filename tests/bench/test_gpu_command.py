"""The command `what=gpu`, on the CPU, so that it is known to work before there is a GPU."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from manta.bench import gpu as command
from manta.bench.gpu_parts import PARTS
from manta.bench.settings import BenchConfig
from manta.config import load
from manta.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ["what=gpu", "device=cpu", "size=tiny"]
# Parts that a CPU cannot show, or that size=tiny leaves out.
SKIPPED = {"step-350m", "step-1.5b", "deterministic"}
# Parts that start a Ray take a minute, and other tests run what they do.
ON_RAY = {"platform", "pretraining"}
WITHOUT_RAY = [name for name in PARTS if name not in ON_RAY]


def config(*arguments: str) -> BenchConfig:
    return load(BenchConfig, [*TINY, *arguments])


@pytest.mark.long
@pytest.mark.parametrize("names", [WITHOUT_RAY, list(PARTS)], ids=["without Ray", "all"])
def test_the_parts_pass_on_a_cpu(names: list[str], tmp_path: Path) -> None:
    answer = tmp_path / "gpu.json"
    job = [sys.executable, str(ROOT / "jobs" / "bench.py"), *TINY, f"json={answer}", "patience=4"]
    job += [] if names == list(PARTS) else [f"parts={','.join(names)}"]
    done = subprocess.run(
        [*job, f"home={tmp_path}", "seconds=900"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(answer.read_text())
    assert found["failed"] == [] and found["config"]["device"] == "cpu"
    parts = found["parts"]
    assert list(parts) == names
    for name, part in parts.items():
        assert part["status"] == ("skipped" if name in SKIPPED else "pass"), (name, part)
        assert part["why"] if name in SKIPPED else part["shown"]
    assert parts["tests"]["failed"] == {} and len(parts["tests"]["passed"]) >= 6
    assert parts["step-124m"]["mfu"] > 0
    if set(names) >= ON_RAY:
        assert parts["pretraining"]["steps"] == 4 and parts["platform"]["ratio"] > 0
    passed = len(names) - len(SKIPPED)
    assert f"{passed} pass, 0 missed, 0 fail, {len(SKIPPED)} skipped" in done.stdout
    assert not list(tmp_path.glob("runs")) and not list(tmp_path.glob("data"))  # all of it is gone


def test_a_part_that_hangs_is_ended_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fine = dataclasses.replace(PARTS["machine"], seconds=0.05), PARTS["machine"]
    monkeypatch.setattr(command, "PARTS", {"slow": slow, "machine": fine})
    answer = tmp_path / "gpu.json"
    found = command.gpu(config(f"json={answer}", "patience=1"))
    assert found["parts"]["slow"]["status"] == "fail"
    assert "took more than 0 s, and was ended" in found["parts"]["slow"]["why"]
    assert found["parts"]["machine"]["status"] == "pass"
    assert found["failed"] == ["slow"]
    assert json.loads(answer.read_text())["parts"] == found["parts"]
    text = command.table(found)
    assert "fail     slow" in text and "1 pass, 0 missed, 1 fail, 0 skipped" in text


def test_what_cannot_run_is_skipped_and_says_why() -> None:
    part = dataclasses.replace(PARTS["platform"], packages=("deepspeed", "no_such_package"))
    assert part.skips(config()) == "no_such_package is not installed"
    assert PARTS["deterministic"].skips(config()) == "it needs a GPU"
    found = command.gpu(config("seconds=1"))
    assert {part["status"] for part in found["parts"].values()} == {"skipped"}
    assert "no time was left of seconds=1" in found["parts"]["machine"]["why"]


def test_the_parts_that_are_asked_for_run_in_their_order() -> None:
    found = command.gpu(config("seconds=1", "parts=head, machine"))
    assert list(found["parts"]) == ["head", "machine"]
    with pytest.raises(ConfigError, match="'no' is none of machine, tests, step-124m"):
        command.gpu(config("parts=machine,no"))


def test_keys_of_the_command_are_for_nothing_else() -> None:
    with pytest.raises(ConfigError, match="size=tiny is for what=gpu, not model"):
        load(BenchConfig, ["what=model", "size=tiny"])
    with pytest.raises(ConfigError, match="deterministic=true does nothing on CPUs"):
        load(BenchConfig, ["what=model", "deterministic=true"])
