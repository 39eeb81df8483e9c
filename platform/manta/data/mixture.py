"""Opens and checks the dataset or mix that a run trains on, and makes the order of its tokens."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from manta import layout, storage
from manta.data import manifest as manifests
from manta.data import origin, prepare, shards
from manta.data.manifest import Manifest
from manta.data.order import Line, Order, Phase, Stage
from manta.data.recipe import DataConfig
from manta.errors import DataError
from manta.terminal import named


def open_datasets(
    c: DataConfig, home: str, say: Callable[[str], None], wait_seconds: float = 0.0
) -> tuple[Manifest, ...]:
    """The manifests of the datasets to train on, checked.

    A single dataset that is missing is prepared; the datasets of a mix must be there already.
    `wait_seconds` is how long a preparation waits for nodes.

    Raises:
        ClusterError: a preparation finds no CPU, or not all nodes see the corpus and `home`.
        DataError: a dataset is missing or damaged, its sources have changed, or the datasets of a
            mix have different tokenizers.
    """
    if c.mix:
        found = tuple(_of_mix(name, home) for name in c.datasets)
        for other in found[1:]:
            if other.tokenizer_sha256 != found[0].tokenizer_sha256:
                raise DataError(
                    f"data.mix: {other.name} has another tokenizer ({other.tokenizer}) than "
                    f"{found[0].name} ({found[0].tokenizer}); prepare it with data.tokenizer="
                    f"{storage.join(found[0].path, layout.ENCODING)}"
                )
    else:
        manifest = prepare.find(c, home)
        if manifest is None:
            say(f"preparing the dataset {c.dataset_name} from {c.source}")
            manifest = prepare.prepare(c, home, say, wait_seconds=wait_seconds)
        elif c.on_changed == "prepare" and origin.changes(manifest):
            manifest = prepare.prepare(c, home, say, True, wait_seconds)
        else:
            prepare.clean_up(c, home)
        found = (manifest,)
    for manifest in found:
        _compare(manifest, c, say)
        manifests.check(manifest)
        shards.verify(manifest, full=c.verify)
        say(
            f"dataset {manifest.path}: {manifest.tokens('train'):,} train and "
            f"{manifest.tokens('val'):,} val tokens ({manifest.tokenizer})"
        )
    return found


def files(datasets: tuple[Manifest, ...]) -> list[str]:
    """A few files of the datasets, by which a node shows that it sees them."""
    return [
        storage.join(manifest.path, name)
        for manifest in datasets
        for name in (layout.MANIFEST, manifest.shards[0].file)
    ]


def _compare(manifest: Manifest, c: DataConfig, say: Callable[[str], None]) -> None:
    """Raises DataError if the dataset's sources have changed, unless it may be used as it is."""
    changed = origin.changes(manifest, say)
    if not changed:
        return
    told = f"{manifest.path} was prepared before its sources changed ({changed})"
    if c.on_changed == "use":
        say(f"{told}; it is used as it is")
        return
    again = "data.on_changed=prepare to set it aside and prepare it again"
    if c.mix:
        again = (
            f"prepare it again: python jobs/prepare.py data.name={manifest.name} ... with {again}"
        )
    raise DataError(f"{told}; give data.on_changed=use to use it as it is, or {again}")


def _of_mix(name: str, home: str) -> Manifest:
    path = layout.dataset_folder(home, name)
    if not manifests.exists(path):
        there = named(manifests.names(layout.datasets_folder(home))) or "none"
        raise DataError(
            f"data.mix names {name}, but {path} is no dataset (there are: {there}); prepare it: "
            f"python jobs/prepare.py data.name={name} data.source=..."
        )
    return manifests.load(path)


def make_order(
    datasets: tuple[Manifest, ...],
    phases: tuple[Phase, ...],
    stages: tuple[Stage, ...],
    seed: int,
    seq_len: int,
) -> Order:
    """The order of the datasets' train splits.

    Raises:
        DataError: they have fewer tokens than one global batch, or one of them has fewer than a
            sequence and its last target.
    """
    lines = tuple(
        Line(
            np.array([shard.tokens for shard in manifest.split("train")], dtype=np.int64),
            manifest.row_group_tokens,
            seed,
            int(identity(manifest)[:12], 16),
        )
        for manifest in datasets
    )
    order = Order(lines, seed, seq_len, stages, phases)
    needed = seq_len * max(stage.sequences_per_batch for stage in stages)
    if order.total_tokens <= needed:
        raise DataError(
            f"the train split has {order.total_tokens:,} tokens, fewer than one batch of "
            f"{needed:,} (tokens_per_batch); give more text, or a smaller tokens_per_batch"
        )
    for manifest, line in zip(datasets, lines, strict=True):
        if line.total_tokens <= seq_len:
            raise DataError(
                f"{manifest.path}: its train split has {line.total_tokens} tokens, not one "
                f"sequence of seq_len={seq_len} and its last target; leave it out of data.mix"
            )
    return order


def identity(manifest: Manifest, split: Literal["train", "val"] = "train") -> str:
    """A digest of the tokens of a dataset's split, the same wherever it is stored."""
    digests = "".join(shard.sha256 for shard in manifest.split(split))
    return storage.sha256_of(digests.encode())


def shares(datasets: tuple[Manifest, ...], phases: tuple[Phase, ...]) -> dict[str, dict[str, int]]:
    """The mixes by their first sequence, each as {identity of the dataset: thousandths}."""
    names = [identity(manifest) for manifest in datasets]
    return {
        str(phase.start): {name: n for name, n in zip(names, phase.counts, strict=True) if n}
        for phase in phases
    }


def so_far(mixes: dict[str, Any], sequences: int) -> dict[str, Any]:
    """The mixes that the planned sequences have reached; later mixes may still be changed."""
    return {start: mix for start, mix in mixes.items() if int(start) < max(sequences, 1)}
