"""Labelled texts as a dataset: chosen, split for each label alike, and packed whole into rows.

A labelled text is the start token, the ids of its text, and the id of its label, which is beyond
those of the tokenizer: the size of the vocabulary plus the label's number. So the labels, and which
text belongs to which, are in the ids alone. All texts are in memory at once while they are
prepared, as the splits have exact sizes.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from manta import storage
from manta.data import shards
from manta.data.decontaminate import Decontaminator
from manta.data.manifest import Manifest, Shard
from manta.data.recipe import PrepareConfig
from manta.data.shards import ShardWriter
from manta.data.shuffle import Key, length_counts, rows_of_whole, shard_name
from manta.errors import DataError
from manta.terminal import line, named
from manta.text import labels, sources, tables
from manta.text.files import TABLES, kind
from manta.text.rows import BadRow, BadRows
from manta.text.tokenizer import Tokenizer

KIND = labels.KIND
TRAIN, VAL, TEST = SPLITS = ("train", "val", "test")
SHARD_BYTES = 1 << 24  # of text
AROUND = 2  # tokens of a labelled text next to those of its text
RARE = 0.01  # share of the texts below which a label is rare


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` made. The records are like those of `shuffle.Scatter` and `shuffle.Gather`."""

    scattered: dict[str, Any]
    gathered: list[dict[str, Any]]
    labels: tuple[str, ...]
    counts: dict[str, list[int]]
    """Numbers of texts of each label, by split."""
    dtype: np.dtype


@dataclasses.dataclass
class _Group:
    """All copies of a text that are kept."""

    text: str
    label: int
    copies: int
    file: str
    key: tuple[int, int]
    """Two hashes: the place among the texts, and what decides on a split for several copies."""
    split: str = TRAIN

    @functools.cached_property
    def text_bytes(self) -> int:
        return len(self.text.encode())


def prepare(
    c: PrepareConfig,
    path: str,
    parts: list[sources.Part],
    made: Tokenizer,
    evals: Decontaminator | None,
    row_group_tokens: int,
    say: Callable[[str], None],
) -> Prepared:
    """Reads the labelled texts and writes their shards.

    Raises:
        DataError: a row is bad and not skipped, or a label occurs once only, or there is only one.
    """
    for file in {piece.path for part in parts for piece in part.pieces}:
        if kind(file, TABLES) and (noted := tables.note(file, parts[0].source.reading)):
            say(noted)
    bad, dropped = BadRows(c.on_bad_rows), {"empty": 0, "contaminated": 0}
    found, places = _read(c, parts, evals, bad, dropped)
    names = tuple(sorted(places)) if c.labels == "auto" else tuple(c.labels)
    groups = _grouped(c, found, names, dropped)
    _check_labels(c, groups, names, places)
    if c.balance:
        groups = _balanced(groups, dropped)
    _split(groups, c.val_fraction, c.test_fraction)
    counts = {
        split: [sum(g.copies for g in groups if g.split == split and g.label == number)
                for number in range(len(names))]
        for split in SPLITS
    }  # fmt: skip
    for told in _told(names, counts, dropped, c.balance):
        say(told)
    cut: Counter[str] = Counter()
    ids = made.vocab_size + len(names)
    dtype = np.dtype(np.uint16 if ids <= np.iinfo(np.uint16).max else np.uint32)
    gathered = []
    for split in SPLITS:
        for number, chunk in enumerate(_chunks([g for g in groups if g.split == split])):
            file = storage.join(path, f"{shard_name(split, number)}.parquet")
            gathered.append(_write(c, file, made, chunk, dtype, row_group_tokens, cut))
    scattered = {"dropped": dropped, "skipped": bad.counts, "cut": dict(cut)}
    return Prepared(scattered, gathered, names, counts, dtype)


def _read(
    c: PrepareConfig,
    parts: list[sources.Part],
    evals: Decontaminator | None,
    bad: BadRows,
    dropped: dict[str, int],
) -> tuple[dict[str, Counter[tuple[str, str]]], dict[str, list[str]]]:
    """The labels of each text, with the file of each: counted; and the first two places of each
    label."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    places: dict[str, list[str]] = {}
    known = None if c.labels == "auto" else set(c.labels)
    for part in parts:
        for piece, number, row in sources.located_documents(part, bad):
            label, text = labels.labelled(row)
            assert label is not None, "rows without a label are bad"
            place = f"{sources.name_of_piece(part, piece)}, text {number}"
            if known is not None and label not in known:
                problem = BadRow(
                    "unknown label",
                    f"the label {line(repr(label))} is not one of labels={list(c.labels)}",
                    "fix it, add it to labels",
                )
                bad.add(problem, part.file(piece), functools.partial(str, place))
            elif not text.strip():
                dropped["empty"] += 1
            elif evals is not None and evals.contaminated(text):
                dropped["contaminated"] += 1
            else:
                found.setdefault(text, Counter())[label, part.file(piece)] += 1
                places.setdefault(label, []).append(place)
                del places[label][2:]
    return found, places


def _grouped(
    c: PrepareConfig,
    found: dict[str, Counter[tuple[str, str]]],
    names: tuple[str, ...],
    dropped: dict[str, int],
) -> list[_Group]:
    """The texts with one label each, in a random order that the texts and the seed decide."""
    dropped |= {"conflicting": 0, "duplicate": 0}
    texts, groups = [], []
    for text, counts in found.items():
        if len({label for label, _ in counts}) > 1:
            dropped["conflicting"] += counts.total()
            continue
        (label, file), _ = max(counts.items(), key=lambda item: (item[1], item[0]))
        copies = counts.total() if c.deduplicate == "none" else 1
        dropped["duplicate"] += counts.total() - copies
        texts.append(text)
        groups.append(_Group(text, names.index(label), copies, file, (0, 0)))
    keys = Key.of([Key.digest(text.encode()) for text in texts], c.shuffle_seed)
    for group, order, rest in zip(groups, keys.order.tolist(), keys.rest.tolist(), strict=True):
        group.key = (order, rest)
    return sorted(groups, key=lambda group: group.key)


def _check_labels(
    c: PrepareConfig,
    groups: list[_Group],
    names: tuple[str, ...],
    places: dict[str, list[str]],
) -> None:
    there = Counter(group.label for group in groups)
    where = f"data.source={c.source}"
    missing = [name for number, name in enumerate(names) if not there[number]]
    if missing and names:
        raise DataError(
            f"{where}: no text has the label {named(missing)}; leave it out of labels, or add texts"
        )
    if len(names) < 2:
        only = f"only the label {line(names[0])}" if names else "no text with a label"
        raise DataError(f"{where}: {only}; a classifier needs two labels or more")
    once = [name for number, name in enumerate(names) if there[number] == 1]
    if once:
        shown = [f"{line(name)} ({places[name][0]})" for name in once]
        raise DataError(
            f"{where}: a label that only one text has cannot be learnt and tested: "
            f"{named(shown, most=5)}; add texts, mend it, or leave it out with labels=[...] and "
            "data.on_bad_rows=skip. (If it is the name of a column, set data.label_key and "
            "data.text_key)"
        )


def _balanced(groups: list[_Group], dropped: dict[str, int]) -> list[_Group]:
    """The first texts of each label in the random order, as many as the rarest label has."""
    totals: Counter[int] = Counter()
    for group in groups:
        totals[group.label] += group.copies
    room = dict.fromkeys(totals, min(totals.values()))
    kept = []
    for group in groups:
        if group.copies <= room[group.label]:
            room[group.label] -= group.copies
            kept.append(group)
    dropped["balanced"] = totals.total() - sum(group.copies for group in kept)
    return kept


def _split(groups: list[_Group], val_fraction: float, test_fraction: float) -> None:
    """Gives each text a split. In all, the splits have exactly their shares, and of each label they
    have these within two texts; copies of a text are in one split."""
    total = sum(group.copies for group in groups)
    train = _part(1 - val_fraction - test_fraction, total)
    # The last split has what rounding leaves.
    val = _part(val_fraction, total) if test_fraction else total - train
    spread, before = _spread(train, val, total - train - val), 0
    for label in sorted({group.label for group in groups}):
        ours = [group for group in groups if group.label == label]
        after = before + sum(group.copies for group in ours)
        counts = np.bincount(spread[before:after], minlength=len(SPLITS))
        rooms = dict(zip(SPLITS, counts.tolist(), strict=True))
        before = after
        for group in sorted(ours, key=lambda group: group.copies == 1):
            wanted = next((split for split in SPLITS if rooms[split] > 0), TRAIN)
            if group.copies > 1:  # these come first, and their own hash decides
                share = group.key[1] / 2**64
                shares = (1 - val_fraction - test_fraction, 1 - test_fraction, 1.0)
                wanted = next(s for s, most in zip(SPLITS, shares, strict=True) if share <= most)
                if rooms[wanted] < group.copies:
                    wanted = max(SPLITS, key=lambda split: rooms[split])
            rooms[wanted] -= group.copies
            group.split = wanted


def _spread(train: int, val: int, test: int) -> np.ndarray:
    """The numbers of splits of these sizes, spread evenly: each run of places has its share of
    every split, within two."""
    is_train = _even(train, train + val + test)
    numbers = np.zeros(len(is_train), np.int64)
    numbers[~is_train] = np.where(_even(val, val + test), 1, 2)
    return numbers


def _even(size: int, total: int) -> np.ndarray:
    """`size` true values among `total`, evenly; (total,) booleans."""
    return np.diff(np.arange(total + 1) * size // max(total, 1)) == 1


def _part(share: float, count: int) -> int:
    return int(share * count + 1e-9)


def _told(
    names: tuple[str, ...], counts: dict[str, list[int]], dropped: dict[str, int], balance: bool
) -> Iterator[str]:
    """Yields what a person should know about the labels before training on them."""
    if dropped["conflicting"]:
        yield (
            f"left out {dropped['conflicting']:,} rows whose text is there with two labels or more,"
            " as nobody can say which is right"
        )
    if balance:
        yield f"left out {dropped['balanced']:,} texts of more frequent labels (data.balance)"
    for name, numbers in zip(names, zip(*counts.values(), strict=True), strict=True):
        if not all(numbers) and any(counts[TEST]):
            lacking = [split for split, n in zip(SPLITS, numbers, strict=True) if not n]
            yield f"no text with the label {line(name)} is in the split {' and '.join(lacking)}"
    train = counts[TRAIN]
    total, weights = sum(train), balanced_weights(train)
    for name, count, weight in zip(names, train, weights, strict=True):
        if count and count / total < RARE:
            yield (
                f"the label {line(name)} is rare: {count:,} of {total:,} train texts "
                f"({count / total:.2%}). With class_weights=none, a classifier that never gives it "
                f"is right {1 - count / total:.2%} of the time, so watch macro F1; "
                f"class_weights=balanced counts each of these texts {weight:.3g} times, and each "
                f"of the most frequent label {min(weights):.3g} times"
            )


def balanced_weights(counts: list[int]) -> list[float]:
    """The weight of a text of each label, with which all labels count alike, and the mean weight of
    a text is 1. A label without texts has the weight 1."""
    total, there = sum(counts), sum(count > 0 for count in counts)
    return [total / (there * count) if count else 1.0 for count in counts]


def _chunks(groups: list[_Group]) -> Iterator[list[_Group]]:
    """Yields the texts of a split in lists that make a shard each."""
    chunk: list[_Group] = []
    size = 0
    for group in groups:
        chunk.append(group)
        size += group.copies * group.text_bytes
        if size >= SHARD_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write(
    c: PrepareConfig,
    file: str,
    made: Tokenizer,
    groups: list[_Group],
    dtype: np.dtype,
    row_group_tokens: int,
    cut: Counter[str],
) -> dict[str, Any]:
    """Writes a shard of these texts and returns its record. Counts texts that are cut, by file."""
    texts, order = list[np.ndarray](), list[int]()
    for group in groups:
        text, is_cut = ids_of(made, group.text, c.row_tokens)
        if is_cut:
            cut[group.file] += group.copies
        label = [made.vocab_size + group.label]
        texts += [np.concatenate([text, label]).astype(dtype)] * group.copies
        order += [group.key[0]] * group.copies
    stops = np.cumsum([len(ids) for ids in texts])
    starts = np.concatenate([[0], stops[:-1]])
    places = np.array(order, np.uint64)
    tokens = rows_of_whole(np.concatenate(texts), starts, stops, places, c.row_tokens, made.start)
    writer = ShardWriter(file, dtype, row_group_tokens)
    writer.write(tokens)
    size, digest, footer = writer.close()
    text_bytes = sum(group.text_bytes * group.copies for group in groups)
    shard = Shard(
        file.rpartition("/")[2], groups[0].split, len(texts), len(tokens),  # type: ignore[arg-type]
        text_bytes, int(tokens.max()), size, digest, footer,
    )  # fmt: skip
    return {
        "shard": dataclasses.asdict(shard), "duplicates": 0,
        "lengths": length_counts(stops - starts),
    }  # fmt: skip


# --- reading -------------------------------------------------------------------------------------


def ids_of(tokenizer: Tokenizer, text: str, row_tokens: int) -> tuple[np.ndarray, bool]:
    """The ids of a text from the start token on, cut to fit in a row with the id of its label; and
    whether it was cut."""
    ids, room = tokenizer.encode_array(text), row_tokens - AROUND
    return np.concatenate([[tokenizer.start], ids[:room]]), len(ids) > room


def texts_of(manifest: Manifest, shard: Shard) -> Iterator[np.ndarray]:
    """Yields the ids of each text of a shard, from the start token to the label's id."""
    tokens = shards.tokens_of(manifest, shard).astype(np.int64)
    start = manifest.load_tokenizer().start
    for piece in np.split(tokens, np.flatnonzero(tokens == start))[1:]:
        if len(piece) > 1:
            yield piece


def examples(manifest: Manifest, split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The ids of a split's texts, each from the start token on, and the numbers of their labels,
    (N,), in the order of the shards."""
    found = [ids for shard in manifest.split(split) for ids in texts_of(manifest, shard)]
    numbers = np.array([int(ids[-1]) - manifest.vocab_size for ids in found], np.int64)
    return [ids[:-1] for ids in found], numbers
