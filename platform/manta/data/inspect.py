"""Shows what is in a dataset (totals, lengths, decoded samples) and checks that it is whole."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from manta import terminal
from manta.config import Count, Natural, Seed, config
from manta.data import labelled, preferences, report, shards
from manta.data import manifest as manifests
from manta.data.conversations import conversations_of, is_of_conversations, rule_of, trained
from manta.data.manifest import Manifest
from manta.data.packing import count_cuts, pack
from manta.errors import DataError
from manta.storage import HomeConfig

BAR = 40
PACKING_TOKENS = 1 << 22  # the packing is tried on this many
LANE_ROWS = 64  # sequences that are packed together: about one lane of the order
SAMPLE_CHARACTERS = 400


@config
class InspectConfig(HomeConfig):
    dataset: str = "python-bpe4096"
    """The dataset's name (a folder under HOME/data), or the path of its folder."""
    samples: Natural = 3
    """How many documents to decode and show."""
    split: Literal["train", "val", "test"] = "train"
    """The split to take the samples from; of labelled texts also test."""
    seed: Seed = 0
    """Seed of the choice of documents to show."""
    seq_len: Count | None = None
    """Tokens in a training sequence, to show how many documents it would cut; null: not shown."""
    verify: bool = False
    """Check the sha256 of every shard."""


def inspect(c: InspectConfig) -> Iterator[str]:
    """Yields the lines to show.

    Raises:
        DataError: the dataset or a shard is missing or damaged.
    """
    manifest = manifests.load(manifests.resolve(c.dataset, c.home_folder))
    manifests.check(manifest)
    has_rows = "row_tokens" in manifest.recipe
    if has_rows and c.seq_len is not None:
        raise DataError(
            f"seq_len={c.seq_len}: the rows of {manifest.path} have "
            f"{manifest.recipe['row_tokens']} tokens, and hold whole documents; omit it"
        )
    shards.verify(manifest, full=c.verify)
    size = sum(shard.size for shard in manifest.shards)
    yield f"dataset  {manifest.path}"
    yield f"source   {manifest.recipe['source']['location']}"
    yield (
        f"tokens   {manifest.dtype}, {manifest.tokenizer}, {manifest.vocab_size:,} ids, "
        f"end-of-text {manifest.eot}"
    )
    yield (
        f"files    {len(manifest.shards)} shards, {size:,} bytes, "
        f"{size / sum(s.tokens for s in manifest.shards):.2f} bytes per token"
    )
    yield report.summary(manifest)
    yield from histogram(manifest)
    if manifest.labels:
        yield from _labelled(manifest, c)
    elif has_rows:
        yield from _conversations(manifest, c)
    else:
        yield from _documents(manifest, c)
    checked = "size, footer, row count" + (", dtype and sha256" if c.verify else " and dtype")
    yield f"\nwhole    every shard's {checked} match the manifest"


def is_of_text(c: InspectConfig) -> bool:
    """Whether the dataset is one to pretrain on. Raises DataError as `inspect` does."""
    manifest = manifests.load(manifests.resolve(c.dataset, c.home_folder))
    return "row_tokens" not in manifest.recipe


def is_of_pairs(manifest: Manifest) -> bool:
    return manifest.recipe.get("kind") == preferences.KIND


def _documents(manifest: Manifest, c: InspectConfig) -> Iterator[str]:
    if c.seq_len is not None:
        yield packing(manifest, c.seq_len)
    tokenizer = manifest.load_tokenizer()
    for number, (index, tokens) in enumerate(sample(manifest, c), 1):
        text = tokenizer.text_of(tokens[: 4 * SAMPLE_CHARACTERS].tolist())
        shown = text[:SAMPLE_CHARACTERS] + (" ..." if len(text) > SAMPLE_CHARACTERS else "")
        yield f"\nsample {number}: document {index:,} of {c.split}, {len(tokens):,} tokens\n{shown}"


def _labelled(manifest: Manifest, c: InspectConfig) -> Iterator[str]:
    """Yields some labelled texts, each label marked (`terminal.show`)."""
    decode = manifest.load_tokenizer().decode
    for number, (index, ids) in enumerate(sample(manifest, c), 1):
        text = terminal.visible(decode(ids[1:-1].tolist()))
        label = terminal.marked(manifest.labels[int(ids[-1]) - manifest.vocab_size])
        yield f"\nsample {number}: text {index:,} of {c.split}, {len(ids):,} tokens\n{label} {text}"


def _conversations(manifest: Manifest, c: InspectConfig) -> Iterator[str]:
    """Yields some conversations, in which what is trained is marked (`terminal.show`), or pairs of
    them, in which the two answers are."""
    unit, marked = "conversation", "trained, which are marked"
    if is_of_pairs(manifest):
        unit, marked = "pair", "in the chosen and then the rejected answer, which are marked"
    rule, decode = rule_of(manifest), manifest.load_tokenizer().decode
    for number, (index, tokens) in enumerate(sample(manifest, c), 1):
        followed = np.append(tokens.astype(np.int64), rule.start)
        flags = np.append(False, trained(rule, followed[None])[0][:-1])
        borders = np.flatnonzero(np.diff(flags)) + 1
        shown = "".join(
            terminal.marked(decode(ids.tolist()))
            if are[0]
            else terminal.visible(decode(ids.tolist()))
            for ids, are in zip(np.split(tokens, borders), np.split(flags, borders), strict=True)
        )
        yield (
            f"\nsample {number}: {unit} {index:,} of {c.split}, {len(tokens):,} tokens, "
            f"{flags.sum():,} of them {marked}\n{shown}"
        )


def histogram(manifest: Manifest) -> Iterator[str]:
    """Yields a histogram of the lengths of documents, one line for each power of two."""
    counts = manifest.lengths["documents"]
    filled = [i for i, count in enumerate(counts) if count]
    total, most = sum(counts), max(counts)
    for i in range(filled[0], filled[-1] + 1):
        span = f"{1 << i:,} to {(2 << i) - 1:,}"
        bar = "#" * round(BAR * counts[i] / most)
        yield f"  {span:>22} tokens  {counts[i] / total:>6.1%}  {bar}".rstrip()


def packing(manifest: Manifest, seq_len: int) -> str:
    """The line that says how many documents each packing cuts, of those that fit in a sequence."""
    line = shards.split_tokens(manifest, "train", PACKING_TOKENS)
    starts = np.flatnonzero(line == manifest.eot)
    fitting = int((np.diff(starts) <= seq_len).sum())
    step = LANE_ROWS * seq_len
    lanes = [line[i : i + step + 1] for i in range(0, len(line) - seq_len, step)]
    lanes = [lane[: (len(lane) - 1) // seq_len * seq_len + 1] for lane in lanes]
    plain, best = (
        sum(count_cuts(lane, seq_len, manifest.eot) for lane in found)
        for found in (lanes, [pack(lane, seq_len, manifest.eot) for lane in lanes])
    )
    return (
        f"packing  sequences of {seq_len:,}: of the documents that fit in one, concat cuts "
        f"{plain / max(fitting, 1):.1%}, best_fit {best / max(fitting, 1):.1%}; both pad 0% and "
        "crop 0%"
    )


def sample(manifest: Manifest, c: InspectConfig) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number in the split, tokens) of documents from one shard, drawn by its size."""
    there = manifest.split(c.split)
    if not c.samples or not there:
        return
    draw = np.random.default_rng(c.seed)
    weights = np.array([shard.documents for shard in there], dtype=np.float64)
    index = int(draw.choice(len(there), p=weights / weights.sum()))
    before = sum(shard.documents for shard in there[:index])
    count = min(c.samples, there[index].documents)
    wanted = set(draw.choice(there[index].documents, count, replace=False).tolist())
    read = labelled.texts_of if manifest.labels else shards.documents
    if is_of_conversations(manifest):
        read = preferences.pairs_of if is_of_pairs(manifest) else conversations_of
    each = read(manifest, there[index])
    for number, tokens in enumerate(each):
        if number in wanted:
            yield before + number, tokens
