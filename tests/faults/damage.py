"""Ways to damage a checkpoint, each with the word by which Manta reports it."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manta import storage


def rewrite_manifest(path: Path) -> None:
    """Makes the manifest vouch for the files as they are now, as an attacker would."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name, entry in manifest["files"].items():
        file = path / name
        entry |= {"size": file.stat().st_size, "sha256": storage.sha256(str(file))}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def flip(file: Path, at: int | None = None) -> None:
    """Flips one bit, in the middle or in byte `at`."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    file.write_bytes(data)


def truncated(path: Path, trap: Path) -> None:
    with (path / "model.safetensors").open("r+b") as f:
        f.truncate((path / "model.safetensors").stat().st_size // 2)


def a_bit(path: Path, trap: Path) -> None:
    flip(path / "optimizer" / "rank-00001.safetensors")


def a_missing_rank(path: Path, trap: Path) -> None:
    (path / "optimizer" / "rank-00000.safetensors").unlink()


def manifest(path: Path, trap: Path) -> None:
    flip(path / "MANIFEST.json", 0)


def pickled(name: str) -> Callable[[Path, Path], None]:
    """Puts a pickle in a file's place, which creates the file `trap` when it is loaded."""

    class Evil:
        def __init__(self, trap: Path):
            self.trap = trap

        def __reduce__(self) -> Any:
            return Path.touch, (self.trap,)

    def act(path: Path, trap: Path) -> None:
        (path / name).write_bytes(pickle.dumps(Evil(trap)))
        rewrite_manifest(path)

    return act


def stale(path: Path, trap: Path) -> None:
    """Replaces the checkpoint by the previous one, under the same name."""
    before = sorted(path.parent.glob("step-*"))[-2]
    shutil.rmtree(path)
    shutil.copytree(before, path)


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "truncated weights": (truncated, "it is truncated"),
    "a flipped bit in a rank's file": (a_bit, "sha256 differs"),
    "without a rank's file": (a_missing_rank, "missing"),
    "a broken manifest": (manifest, "not a whole checkpoint"),
    "a pickle for the optimizer's state, and a manifest that vouches for it": (
        pickled("optimizer/rank-00000.safetensors"), "not safetensors",
    ),
    "a pickle for the weights, and a manifest that vouches for it": (
        pickled("model.safetensors"), "not safetensors",
    ),
    "an older one under its name": (stale, "holds step"),
}  # fmt: skip
