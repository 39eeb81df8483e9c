"""Turns a corpus into a dataset: documents, tokenized and shuffled, in Parquet shards.

The work itself is in `shuffle`. This file finds out what to do (from the config) and what is done
already, runs the two passes of `shuffle` over Ray Data, resumes where an earlier run stopped, and
commits the dataset.
"""

import contextlib
import dataclasses
import fnmatch
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from manta import layout, ownership, plot, storage
from manta.data import decontaminate, labelled, near, origin, passes, report, runs, vocabulary
from manta.data import manifest as manifests
from manta.data.manifest import Manifest, NearPair, Shard
from manta.data.passes import WORK
from manta.data.recipe import PrepareConfig, first_difference
from manta.data.runs import Run
from manta.data.shuffle import SPLITS, Gather, Scatter
from manta.errors import DataError
from manta.lock import lock
from manta.text import rows, sources, templates
from manta.text.tokenizer import Tokenizer

ROW_GROUP_TOKENS = 1 << 14
# A shard is a task of the second pass: a large dataset has many shards, and none fills memory.
LEAST_SHARD_TOKENS, MOST_SHARD_TOKENS = 1 << 22, 1 << 26
SHARDS_WANTED = 64
PLAN = "plan"
# Manta's own files in a dataset's folder: preparation deletes these, and no others.
_ENDING = rf"({storage.UNFINISHED_ENDING})?"
_PASSES = r"part|match|star-\d+|merge-(train|val|bands|match|star-\d+)-\d+"
WORKING_FILES = re.compile(
    rf"({PLAN}\.json|(train|val)-\d+\.json|({_PASSES})-\d+\.json"
    rf"|({_PASSES})-\d+(-\d+)?(-(train|val|bands))?\.arrow){_ENDING}"
)
OWN_FILES = re.compile(
    rf"({layout.MANIFEST}|{layout.SOURCES}|{layout.ENCODING}|{layout.LENGTHS}"
    rf"|(train|val|test)-\d+\.parquet){_ENDING}"
    rf"|{WORK}/({WORKING_FILES.pattern})"
)


def find(c: PrepareConfig, home: str) -> Manifest | None:
    """The dataset that the config describes, if it has been prepared.

    Raises:
        DataError: a dataset of that name was made from something else.
    """
    path = c.folder(home)
    if not manifests.exists(path):
        return None
    manifest = manifests.load(path)
    wanted = c.recipe()
    if manifest.recipe not in (wanted, c.strict_recipe()):
        was, now = first_difference(manifest.recipe, wanted)
        raise DataError(
            f"{path} was prepared with {was}, but the config says {now}; give another data.name, "
            "or delete the folder to prepare it again"
        )
    return manifest


def prepare(
    c: PrepareConfig,
    home: str,
    say: Callable[[str], None],
    if_changed: bool = False,
    wait_seconds: float = 0.0,
) -> Manifest:
    """Prepares the dataset, or resumes its preparation, and commits it. With `if_changed`, a
    dataset whose sources have changed since is set aside first. Waits up to `wait_seconds` for an
    autoscaling cluster's first node.

    Raises:
        ClusterError: no node has a CPU, or not all nodes see the corpus and `home`.
        DataError: the corpus is missing, empty, unreadable, or too small to have a val split; the
            disk is full; another process is preparing a dataset of that name.
    """
    path = c.folder(home)
    before = origin.states(c.recipe())  # first: what comes later is noticed at the end
    parts = []
    for source in filter(None, (c.corpus, c.val_corpus)):
        listed = sources.list_files(source)
        if listed is not None:
            say(listed.line())
        parts += sources.parts(source, listed)
    if if_changed or find(c, home) is None:
        pieces = [piece.path for part in parts for piece in part.pieces]
        ends = pieces[:1] + pieces[-1:]
        passes.require_nodes(layout.datasets_folder(home), ends, wait_seconds, say)
    try:
        with _lock(c, home, say):
            manifest = find(c, home)  # another process may just have prepared it
            if manifest is not None and if_changed and origin.changes(manifest):
                _set_aside(path, say)
                manifest = None
            if manifest is None:
                manifest = _prepare(c, path, parts, before, say)
            _clear_work(path)
    except OSError as e:
        reason = e.strerror or e
        raise DataError(f"{path}: cannot be written ({reason}); {passes.RESUME}") from None
    return manifest


def _set_aside(path: str, say: Callable[[str], None]) -> None:
    """Gives a dataset another name: runs may depend on it, and its corpus is no longer there."""
    names = (f"{path}-before-{number}" for number in itertools.count(1))
    aside = next(name for name in names if not storage.exists(name))
    storage.move_folder(path, aside)
    say(f"set aside: {path} is {aside} now")


def clean_up(c: PrepareConfig, home: str) -> None:
    """Deletes the working files of a run that stopped just after its commit."""
    work = storage.join(c.folder(home), WORK)
    if storage.exists(work):
        # Their owner may be about to delete them, and whoever only reads the dataset may not be
        # allowed to.
        with contextlib.suppress(DataError, OSError), _lock(c, home, print):
            _clear_work(c.folder(home))


def _clear_work(path: str) -> None:
    work = storage.join(path, WORK)
    if not ownership.is_link(work):
        ownership.clear(work, WORKING_FILES)


def _lock(
    c: PrepareConfig, home: str, say: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    return lock(layout.dataset_lock(home, c.dataset_name), f"preparing {c.folder(home)}", say)


def _prepare(
    c: PrepareConfig,
    path: str,
    parts: list[sources.Part],
    before: origin.States,
    say: Callable[[str], None],
) -> Manifest:
    _resume_or_clear(c, path, parts, before, say)
    made = vocabulary.of(c, path, parts)
    prepared = None
    if c.kind == labelled.KIND:
        size = _row_group_tokens(c)
        prepared = labelled.prepare(c, path, parts, made, _evaluations(c), size, say)
    scattered = scatter(c, path, parts, made) if prepared is None else [prepared.scattered]
    skipped = rows.total(
        record[kind] for record in scattered for kind in ("skipped", "unlabelled") if kind in record
    )
    if skipped:
        say(f"left out {rows.line(skipped)}")
    pairs: tuple[NearPair, ...] = ()
    if prepared is None:
        documents = merge(path, scattered)
        found = find_near(c, path, scattered)
        gathered = gather(c, path, documents, made, found.dropped)
        pairs = tuple(report.near_pair(path, pair, documents, parts, made) for pair in found.pairs)
    else:
        gathered = prepared.gathered
    manifest = _manifest(c, path, made, scattered, gathered, skipped, pairs)
    if prepared is not None:
        dropped = manifest.dropped | prepared.scattered["dropped"]
        manifest = dataclasses.replace(
            manifest, dropped=dropped, labels=prepared.labels, label_counts=prepared.counts,
            dtype=str(prepared.dtype),  # type: ignore[arg-type]
        )  # fmt: skip
    _refuse_empty(manifest, c)
    lengths, title = manifest.lengths, f"{manifest.name}: length of documents"
    picture = plot.histogram(lengths["documents"], title, lengths["tokens"])
    storage.write_bytes(storage.join(path, layout.LENGTHS), picture)
    origin.save(path, manifest.recipe, before)
    manifest.save()
    if pairs:
        say(report.examples(manifest))
    if manifest.cut:
        say(report.cut(manifest))
    return manifest


def scatter(
    c: PrepareConfig, path: str, parts: list[sources.Part], made: Tokenizer
) -> list[dict[str, Any]]:
    """Runs the first pass and returns a record for each part."""
    evals = _evaluations(c)
    val = c.val_fraction if c.val_corpus is None else c.val_corpus
    similarity = c.deduplicate_similarity if c.deduplicate == "near" else None
    task = Scatter(path, parts, made.serialized, c.shuffle_seed, val, evals, similarity, c.chat)
    return passes.run(task, len(parts), "tokenizing", "parts")


def _evaluations(c: PrepareConfig) -> decontaminate.Decontaminator | None:
    if not c.decontaminate:
        return None
    files = [storage.absolute(file) for file in c.decontaminate]
    return decontaminate.build(files, c.decontaminate_ngram, c.max_document_bytes)


def merge(path: str, scattered: list[dict[str, Any]]) -> list[Run]:
    """The runs of all documents: few of each split, whatever the size of the corpus."""
    found = [run for record in scattered for run in record["runs"]]
    by_split = [[run for run in found if run["split"] == split] for split in SPLITS]
    train, val = (runs.merge(path, *each) for each in zip(by_split, SPLITS, strict=True))
    return [*train, *val]


def find_near(c: PrepareConfig, path: str, scattered: list[dict[str, Any]]) -> near.Found:
    """The near duplicates, if the config asks for them."""
    if c.deduplicate != "near":
        return near.Found([], [])
    bands = [run for record in scattered for run in record["bands"]]
    return near.find(path, bands, c.deduplicate_similarity)


def gather(
    c: PrepareConfig,
    path: str,
    documents: list[Run],
    made: Tokenizer,
    near_duplicates: Sequence[Run] = (),
) -> list[dict[str, Any]]:
    """Runs the second pass and returns a record for each shard."""
    train, val = (sum(r["tokens"] for r in documents if r["split"] == s) for s in SPLITS)
    counts = _shards_for(train), _shards_for(val)
    task = Gather(
        path, documents, counts, str(made.dtype), _row_group_tokens(c),
        c.deduplicate, list(near_duplicates), c.chat, made.start,
    )  # fmt: skip
    return passes.run(task, sum(counts), "shuffling", "shards")


def _row_group_tokens(c: PrepareConfig) -> int:
    """The size of the pieces in which a shard is read; whole rows where a row is a unit."""
    rows = max(1, ROW_GROUP_TOKENS // c.row_tokens) * c.row_tokens
    return ROW_GROUP_TOKENS if c.kind == "text" else rows


def _resume_or_clear(
    c: PrepareConfig,
    path: str,
    parts: list[sources.Part],
    before: origin.States,
    say: Callable[[str], None],
) -> None:
    """Keeps the files of an interrupted run of the same preparation, and deletes those of another
    one. Raises DataError if the folder is something else's, or is part of the corpus."""
    _refuse_overlap(c, path, parts)
    ownership.refuse_links(path, [WORK])
    sizes = [ROW_GROUP_TOKENS, SHARDS_WANTED, LEAST_SHARD_TOKENS, MOST_SHARD_TOKENS, runs.FAN_IN]
    plan = {
        "format": manifests.FORMAT,
        "sizes": sizes,
        "recipe": c.recipe(),
        "corpus": _digest(parts, before),
    }
    if c.deduplicate == "near":
        plan["near"] = near.version()
    file = passes.record_path(path, PLAN)
    if storage.exists(file):
        found = storage.read_json(file)
        if found in (plan, {**plan, "recipe": c.strict_recipe()}):
            if found != plan:
                storage.write_json(file, plan)
            storage.remove_unfinished(path)
            say(f"resuming the preparation of {path}")
            return
        say(f"preparing {path} from the start: the corpus or the config has changed")
        # First a plan that is nobody's: nobody may resume from half-deleted files.
        storage.write_json(file, {"format": manifests.FORMAT})
        ownership.clear(path, re.compile(rf"(?!{WORK}/{PLAN}\.json$)({OWN_FILES.pattern})"))
    else:
        beginning = re.compile(rf"{WORK}/{PLAN}\.json{storage.UNFINISHED_ENDING}")
        others = [name for name in ownership.paths_in(path) if not beginning.fullmatch(name)]
        if others:
            raise DataError(
                f"{path}: not a dataset of Manta's, and not empty ({min(others)}): nothing there "
                "is touched; give another data.name, or move the folder away"
            )
        ownership.clear(path, beginning)
    storage.make_folder(path)
    storage.write_json(file, plan)


def _refuse_overlap(c: PrepareConfig, path: str, parts: list[sources.Part]) -> None:
    """Raises DataError if the dataset's folder holds something that the preparation reads, or is
    itself in a folder that it reads."""
    read = {piece.path: "data.source" for part in parts for piece in part.pieces}
    read |= {storage.absolute(file): "data.decontaminate" for file in c.decontaminate}
    if c.tokenizer.endswith(".json"):
        read[storage.absolute(c.tokenizer)] = "data.tokenizer"
    if c.tokenizer_file is not None:
        read[storage.absolute(c.tokenizer_file)] = "data.tokenizer_file"
    if c.kind == "chat" and c.template not in templates.NAMED:
        read[storage.absolute(c.template)] = "data.template"
    remedy = "give another data.name, or another home="
    for file, key in read.items():
        if ownership.is_inside(file, path):
            raise DataError(f"{key}: {file} is in {path}, where the dataset would be; {remedy}")
    for source in filter(None, (c.corpus, c.val_corpus)):
        pattern = source.location
        if pattern == sources.PYTHON or pattern.startswith(sources.HUGGING_FACE):
            continue
        is_inside = ownership.is_inside(path, pattern)
        if is_inside or fnmatch.fnmatch(storage.join(path, "train-00000.parquet"), pattern):
            raise DataError(
                f"data.source={pattern}: {path}, where the dataset would be, is inside it; {remedy}"
            )


def _digest(parts: list[sources.Part], states: origin.States) -> str:
    """A digest of the parts of the corpus, and of the files that decide the tokens."""
    cut = [[part.source.location, part.pieces, part.shard, part.num_shards] for part in parts]
    return storage.sha256_of(json.dumps([cut, states]).encode())


def _shards_for(tokens: int) -> int:
    wanted = min(max(tokens // SHARDS_WANTED, LEAST_SHARD_TOKENS), MOST_SHARD_TOKENS)
    return -(-tokens // wanted)


def _manifest(
    c: PrepareConfig,
    path: str,
    made: Tokenizer,
    scattered: list[dict[str, Any]],
    gathered: list[dict[str, Any]],
    skipped: dict[str, dict[str, int]],
    pairs: tuple[NearPair, ...],
) -> Manifest:
    dropped = {
        kind: sum(record["dropped"][kind] for record in scattered)
        for kind in ("empty", "contaminated")
    }
    dropped["duplicate"] = sum(record["duplicates"] for record in gathered)
    if c.deduplicate == "near":
        dropped["near_duplicate"] = sum(record["near_duplicates"] for record in gathered)
    if c.chat is not None:
        found = [record["unlabelled"].values() for record in scattered]
        dropped["unlabelled"] = sum(sum(kinds.values()) for files in found for kinds in files)
    whole = [record for record in gathered if record["shard"] is not None]
    lengths = {
        kind: [sum(column) for column in zip(*(r["lengths"][i] for r in whole), strict=True)]
        for i, kind in enumerate(("documents", "tokens"))
    }
    return Manifest(
        path=path,
        recipe=c.recipe(),
        tokenizer=made.name,
        tokenizer_sha256=made.sha256,
        vocab_size=made.vocab_size,
        eot=made.eot,
        dtype=str(made.dtype),  # type: ignore[arg-type]
        row_group_tokens=_row_group_tokens(c),
        dropped=dropped,
        lengths=lengths,
        shards=tuple(Shard(**record["shard"]) for record in whole),
        skipped=skipped,
        near_pairs=pairs,
        cut=rows.most(record.get("cut", {}) for record in scattered),
    )


def _refuse_empty(manifest: Manifest, c: PrepareConfig) -> None:
    for split in SPLITS:
        if not manifest.split(split):
            count = sum(shard.documents for shard in manifest.shards)
            dropped = report.counts({k: n for k, n in manifest.dropped.items() if n})
            what = f"none of its {count} documents fell into the {split} split"
            if not count:
                what = "the corpus holds no text"
            raise DataError(
                f"data.source={c.source}: {what}"
                + (f" (dropped: {dropped})" if dropped else "")
                + f"; give more text, another data.val_fraction (now {c.val_fraction}) or, for "
                "plain text, a smaller data.document_bytes"
            )
