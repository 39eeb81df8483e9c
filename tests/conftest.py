"""Fixtures that several test files share. Ray is started once for all of them."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from helpers.common import ROOT, SECRET, TEXT, tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", metavar="FILE", help="where the table of faults goes")


# No test asserts how long something takes, and so no example does. `make test` tries the same
# examples each time, and MANTA_TEST_NEW=1, which `make test-long` sets, draws new ones.
settings.register_profile("manta", deadline=None, derandomize="MANTA_TEST_NEW" not in os.environ)
settings.load_profile("manta")

# A shell that runs `make test &` has its children ignore Ctrl-C, and they theirs. A handler is not
# inherited: the programs that tests start have the default again, and this process goes on as told.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: None)

SLOWEST = (
    "test_training.py", "test_jobs.py", "test_watch.py", "test_engine.py", "test_workers.py",
    "test_finetune.py", "test_classifier.py", "test_preference_tuning.py", "test_parity.py",
    "test_before.py", "test_val_agrees.py", "test_ladder_trained.py", "test_head.py",
    "test_evaluate_inputs.py", "test_starting.py", "test_platforms.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest test files first, so that no process is left with one of them at the end.
    Also marks the GPU tests, whose file must work without pytest."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(SLOWEST)))
    for item in items:
        if item.path.name == "test_gpu.py":
            item.add_marker("gpu")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Uses one thread: models as small as the tests' are slower on several. (Workers set their
    own.)"""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for the whole session (for each process that runs tests). It has more CPUs than
    the machine may have: they are only counted, and runs of two workers must fit on any machine."""
    import ray

    from manta.cluster import connection

    os.environ["HF_TOKEN"] = SECRET  # the workers inherit it
    connection.connect(own=True, num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own for what a test makes."""
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path: those of Ray's sockets may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain-text file of about 20 kB."""
    file = tmp_path_factory.mktemp("corpus") / "animals.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def prepared(ray_session: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the prepared corpus, to train from, and a second dataset, `verses`, with the same
    tokenizer, for mixes."""
    from manta.config import from_dict
    from manta.data import mixture, prepare
    from manta.data.recipe import PrepareConfig

    folder = tmp_path_factory.mktemp("prepared")
    (animals,) = mixture.open_datasets(tiny(folder, corpus).data, str(folder), lambda line: None)
    verses = folder / "verses.txt"
    verses.write_text("\n\n".join(f"Verse {i}: {i * 7} rays of light.\n" * 9 for i in range(90)))
    keys = {
        "source": str(verses),
        "name": "verses",
        "tokenizer": f"{animals.path}/encoding.json",
        "document_bytes": 100,
        "val_fraction": 0.1,
    }
    prepare.prepare(from_dict(PrepareConfig, keys), str(folder), lambda line: None)
    return folder


@pytest.fixture(scope="session")
def load_job() -> Callable[[str], Any]:
    """Imports jobs/NAME.py as a module, as `python jobs/NAME.py` would."""
    import importlib.util
    import sys

    def load(name: str) -> Any:
        path = list(sys.path)
        spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = path
        return module

    return load
