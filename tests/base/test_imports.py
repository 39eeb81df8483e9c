"""The design as a test: imports point one way, each heavy library has one room, and no module
shadows another."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "manta"


def listed(package: Path) -> list[str]:
    """What the docstring of a package lists, in its order: its files and sub-rooms."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    return re.findall(r"^    (\w+)  +\S", text, re.MULTILINE)


# A room may import itself and the rooms before it. (A config class that contains another's counts.)
ORDER = listed(PACKAGE)

# Which files, by prefix, may import a library.
ROOMS = {
    "omegaconf": ["arguments"],
    "pydantic": ["config", "foreign"],
    "yaml": ["arguments", "cluster/check", "monitor/prometheus"],
    "boto3": ["cluster/check/account"],
    "botocore": ["cluster/check/account"],
    "tqdm": ["progress"],
    "psutil": [
        "bench", "cluster", "monitor/prometheus", "serve/conversations", "serve/engine/budget",
        "train/build",
    ],
    "datasets": ["text/sources", "evaluate/suites"],
    "tiktoken": ["text/tokenizer"],
    "tokenizers": ["text/tokenizer"],
    "regex": ["text/lost_bytes"],
    "jinja2": ["text/templates"],
    "lm_eval": ["evaluate"],
    "openai": ["judge/endpoint"],
    "scipy": ["statistics", "plan/calibration", "scaling/fit", "scaling/powers"],
    "deepspeed": ["train/step/deepspeed_config"],
    "rensa": ["data/near"],
    "sklearn": ["evaluate/baseline"],
    "safetensors": ["train/checkpoints", "export/huggingface"],
    "transformers": ["export/huggingface", "export/adapter"],
    "peft": ["export/adapter"],
    "gguf": ["export/ggml"],
    "matplotlib": ["plot", "charts"],
    "fastapi": ["serve/protocol"],
    "uvicorn": ["serve/protocol"],
    "sqlite3": ["serve/conversations"],
    "prometheus_client": ["serve/protocol/measures"],
    "optuna": ["sweep/optuna_search"],
    "wandb": ["monitor/trackers/wandb_run"],
    "mlflow": ["monitor/trackers/mlflow_run"],
    "trackio": ["monitor/trackers/trackio_run"],
    "tensorboardX": ["train/records/logbook"],
    "ray.data": ["data", "cluster/capacity"],
    "ray.serve": ["serve/replicas"],
    "ray.train": [
        "train/elastic", "train/patience", "train/ranks", "train/supervise", "train/worker",
    ],
    "ray": [
        "cluster", "failures", "messages", "data", "train/elastic", "train/faults/stopping",
        "train/patience", "train/ranks", "train/supervise", "train/worker", "evaluate/farm",
        "monitor/metrics", "monitor/watch", "serve/replicas",
    ],
}  # fmt: skip


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    for name in imports(path):
        if name.startswith("manta.") and room(path) != "__init__":
            target = name.split(".")[1]
            assert ORDER.index(target) <= ORDER.index(room(path)), f"{path} imports {name}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_heavy_library_has_one_room(path: Path) -> None:
    here = str(path.relative_to(PACKAGE).with_suffix(""))
    for name in imports(path):
        library = next((lib for lib in ROOMS if name == lib or name.startswith(lib + ".")), None)
        if library is not None:
            assert any(here.startswith(place) for place in ROOMS[library]), f"{here}: {name}"


def packages() -> list[Path]:
    return sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


@pytest.mark.parametrize("package", packages(), ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_the_docstring_of_a_room_lists_its_files(package: Path) -> None:
    files = [path.stem for path in package.glob("*.py") if not path.stem.startswith("__")]
    rooms = [path.parent.name for path in package.glob("*/__init__.py")]
    assert sorted(listed(package)) == sorted(files + rooms)


def test_a_sub_room_of_training_does_not_import_what_is_built_from_it() -> None:
    train = PACKAGE / "train"
    rooms = {path.parent.name for path in train.glob("*/__init__.py")}
    for path in (path for name in rooms for path in (train / name).rglob("*.py")):
        for name in imports(path):
            if name == "manta.train" or name.startswith("manta.train."):
                assert {*name.split(".")[2:3]} & rooms, f"{path} imports {name}"


def test_the_source_root_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.name)
def test_a_job_is_thin(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert "run_job(main," in text
    assert "argparse" not in text
    assert not any(name.startswith("jobs") for name in imports(path))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
