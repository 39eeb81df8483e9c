"""Random damage of every kind to shards: each is either found or harmless.

300 variants; 10,000 with -m long, which prints what became of them. Each is drawn from (SEED, kind,
number), and an error has a note that says which one it was.
"""

import base64
import contextlib
import dataclasses
import functools
import io
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.datasets import chunks, footer_start, random_ids, write_dataset, write_shard
from manta import layout
from manta.data import manifest as manifests
from manta.data import shards
from manta.data.manifest import Manifest
from manta.data.mixture import make_order
from manta.data.order import PERIOD, Phase, make_stages
from manta.data.shards import DIGEST_BYTES, ShardReader, digest_of
from manta.data.stream import IGNORED, Reader
from manta.errors import DataError

SHORT, LONG = 300, 10_000  # variants of all kinds together
SEED = 20_260
GROUP = 64
SEQ_LEN = 16

variants = pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])

# --- kinds of damage -----------------------------------------------------------------------------

Files = dict[str, bytes]  # by name
Draw = random.Random
Kind = Callable[[Files, Draw], None]


def one(files: Files, draw: Draw) -> str:
    return draw.choice(sorted(file for file in files if files[file]))


def two(files: Files, draw: Draw) -> list[str]:
    return draw.sample(sorted(files), 2)


def some_range(content: bytes, draw: Draw) -> tuple[int, int]:
    """A range [start, stop) of at least one byte, mostly short."""
    start = draw.randrange(len(content))
    longest = len(content) - start
    return start, start + draw.randint(1, draw.choice([1, min(64, longest), longest]))


def truncated(files: Files, draw: Draw) -> None:
    file = one(files, draw)
    files[file] = files[file][: draw.randrange(len(files[file]))]


def emptied(files: Files, draw: Draw) -> None:
    files[one(files, draw)] = b""


def missing(files: Files, draw: Draw) -> None:
    del files[one(files, draw)]


def extended(files: Files, draw: Draw) -> None:
    """Extends a file by noise, by zeros, by its own end, or by all of itself."""
    file = one(files, draw)
    content, count = files[file], draw.randint(1, 200)
    more = [draw.randbytes(count), bytes(count), content[-count:], content]
    files[file] = content + draw.choice(more)


def bits_flipped(files: Files, draw: Draw) -> None:
    file = one(files, draw)
    content = bytearray(files[file])
    for _ in range(draw.choice([1, 1, 2, draw.randint(1, 64)])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    files[file] = bytes(content)


def first_bytes_changed(files: Files, draw: Draw) -> None:
    """Changes the magic, which nobody needs, and sometimes the byte after it."""
    file = one(files, draw)
    files[file] = draw.randbytes(count := draw.randint(1, 5)) + files[file][count:]


def zeroed(files: Files, draw: Draw) -> None:
    file = one(files, draw)
    start, stop = some_range(files[file], draw)
    files[file] = files[file][:start] + bytes(stop - start) + files[file][stop:]


def end_zeroed(files: Files, draw: Draw) -> None:
    """Zeroes a file's end, as a machine that lost power can leave it: the size is right."""
    file = one(files, draw)
    size = len(files[file])
    start = draw.randrange(size)
    files[file] = files[file][:start] + bytes(size - start)


def range_copied_over(files: Files, draw: Draw) -> None:
    file = one(files, draw)
    content = files[file]
    start, stop = some_range(content, draw)
    to = draw.randrange(len(content) - (stop - start) + 1)
    files[file] = content[:to] + content[start:stop] + content[to + stop - start :]


def range_twice(files: Files, draw: Draw) -> None:
    """Repeats a range. What follows moves back, and the surplus at the end is cut or stays."""
    file = one(files, draw)
    content = files[file]
    start, stop = some_range(content, draw)
    longer = content[:stop] + content[start:]
    files[file] = draw.choice([longer, longer[: len(content)]])


def range_removed(files: Files, draw: Draw) -> None:
    """Removes a range. What follows moves up, and the file is shorter or ends in zeros."""
    file = one(files, draw)
    start, stop = some_range(files[file], draw)
    shorter = files[file][:start] + files[file][stop:]
    files[file] = draw.choice([shorter, shorter + bytes(stop - start)])


def ranges_swapped(files: Files, draw: Draw) -> None:
    file = one(files, draw)
    content = files[file]
    a, b, c, d = sorted(draw.randint(0, len(content)) for _ in range(4))
    files[file] = content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def range_from_another(files: Files, draw: Draw) -> None:
    """Copies a block of another shard to the same place."""
    file, other = two(files, draw)
    start, stop = some_range(files[file], draw)
    piece = files[other][start:stop]
    files[file] = files[file][:start] + piece + files[file][start + len(piece) :]


def row_groups_swapped(files: Files, draw: Draw) -> None:
    file = one(files, draw)
    content = files[file]
    (a, b), (c, d) = sorted(draw.sample(chunks(io.BytesIO(content)), 2))
    files[file] = content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def row_groups_swapped_between_files(files: Files, draw: Draw) -> None:
    first, second = two(files, draw)
    a, b = draw.choice(chunks(io.BytesIO(files[first])))
    c, d = draw.choice(chunks(io.BytesIO(files[second])))
    piece, other = files[first][a:b], files[second][c:d]
    files[first] = files[first][:a] + other + files[first][b:]
    files[second] = files[second][:c] + piece + files[second][d:]


def files_swapped(files: Files, draw: Draw) -> None:
    first, second = two(files, draw)
    files[first], files[second] = files[second], files[first]


def footers_swapped(files: Files, draw: Draw) -> None:
    first, second = two(files, draw)
    a, b = footer_start(files[first]), footer_start(files[second])
    files[first], files[second] = (
        files[first][:a] + files[second][b:],
        files[second][:b] + files[first][a:],
    )


@functools.cache
def other_shards() -> list[bytes]:
    """Well-formed shards of other tokens, most with as many tokens as one of the dataset's."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(40):
            count = [*SIZES.values(), 100][seed % 5]
            write_shard(Path(folder), f"{seed}.parquet", random_ids(1000 + seed, count), GROUP)
        return [file.read_bytes() for file in sorted(Path(folder).iterdir())]


def another_shard(files: Files, draw: Draw) -> None:
    """Replaces a shard by another well-formed one, if possible with the same number of bytes."""
    file = one(files, draw)
    fitting = [other for other in other_shards() if len(other) == len(files[file])]
    files[file] = draw.choice(fitting or other_shards())


def another_body(files: Files, draw: Draw) -> None:
    """Puts other tokens under the footer that the manifest vouches for."""
    file = one(files, draw)
    body = draw.choice(other_shards())
    body = body[: footer_start(body)]
    size = footer_start(files[file])
    body = draw.choice([body, (body + bytes(size))[:size]])
    files[file] = body + files[file][size:]


def row_group_with_its_digest(files: Files, draw: Draw) -> None:
    """Changes a row group's bytes and its digest in the footer: only the manifest can tell."""
    file = one(files, draw)
    content, bounds = files[file], chunks(io.BytesIO(files[file]))
    digests = b"".join(digest_of(content[a:b]) for a, b in bounds)
    changed = bytearray(content)
    index = draw.randrange(len(bounds))
    start, stop = bounds[index]
    changed[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)
    at = index * DIGEST_BYTES
    new = digests[:at] + digest_of(changed[start:stop]) + digests[at + DIGEST_BYTES :]
    assert content.count(base64.b64encode(digests)) == 1
    files[file] = bytes(changed).replace(base64.b64encode(digests), base64.b64encode(new))


def several(files: Files, draw: Draw) -> None:
    for _ in range(draw.randint(2, 4)):
        if any(files.values()):
            draw.choice(OF_BYTES)(files, draw)


# Damage that can happen to any file, whatever is in it.
OF_BYTES: list[Kind] = [
    truncated, extended, bits_flipped, first_bytes_changed, zeroed, end_zeroed, range_copied_over,
    range_twice, range_removed, ranges_swapped,
]  # fmt: skip
KINDS = [
    *OF_BYTES, emptied, missing, range_from_another, row_groups_swapped,
    row_groups_swapped_between_files, files_swapped, footers_swapped, another_shard, another_body,
    row_group_with_its_digest, several,
]  # fmt: skip


def name_of(kind: Kind) -> str:
    return kind.__name__.replace("_", " ")


def damaged(original: Files, kind: Kind, number: int) -> Files:
    """Variant `number` of a kind; at least one file always differs from the original."""
    draw = random.Random(f"{SEED} {kind.__name__} {number}")
    while True:
        files = dict(original)
        kind(files, draw)
        if files != original:
            return files


# --- a dataset -----------------------------------------------------------------------------------

# The first two have equally many bytes; the third repeats one token, and so its row groups.
SIZES = {
    "train-00000.parquet": 3 * GROUP,
    "train-00001.parquet": 3 * GROUP,
    "train-00002.parquet": 3 * GROUP + 9,
    "val-00000.parquet": GROUP + 1,
}


@dataclasses.dataclass(frozen=True)
class Data:
    manifest: Manifest
    files: Files
    tokens: dict[str, np.ndarray]
    stream: np.ndarray

    def put(self, files: Files) -> None:
        """Writes these files into the folder, and removes the dataset's other ones."""
        folder = Path(self.manifest.path)
        for file in self.files:
            if file not in files:
                (folder / file).unlink(missing_ok=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)


def reader_of(manifest: Manifest, skip_corrupt: bool = False) -> Reader:
    stages = make_stages({}, SEQ_LEN, 6 * SEQ_LEN)
    order = make_order((manifest,), (Phase(0, (PERIOD,)),), stages, 0, SEQ_LEN)
    return Reader((manifest,), order, skip_corrupt=skip_corrupt)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("dataset")
    pieces = [random_ids(i, count) for i, count in enumerate(SIZES.values())]
    pieces[2][:] = 7
    manifest = write_dataset(folder, pieces[:3], pieces[3:], GROUP)
    assert manifest.shards[0].size == manifest.shards[1].size
    files = {file: (folder / file).read_bytes() for file in SIZES}
    stream, _ = reader_of(manifest).read(0)
    return Data(manifest, files, dict(zip(SIZES, pieces, strict=True)), stream)


# --- the outcome ---------------------------------------------------------------------------------


def is_found(read: Callable[[], np.ndarray], right: np.ndarray, changed: list[str]) -> bool:
    """Whether a read reports damage, in one line with the name of a changed file; otherwise it must
    have given the right tokens."""
    try:
        found = read()
    except DataError as e:
        assert "\n" not in str(e)
        assert any(file in str(e) for file in changed), e
        return True
    assert found.dtype == right.dtype
    assert np.array_equal(found, right)
    return False


def outcome(data: Data, files: Files, draw: Draw) -> str:
    """`found` or `harmless`: the outcome of reading the folder in every possible way."""
    manifest, tokens = data.manifest, data.tokens
    changed = [file for file in data.files if files.get(file) != data.files[file]]
    shards.open_shard.cache_clear()
    attempts = []
    for split in ("train", "val"):
        right = np.concatenate([tokens[shard.file] for shard in manifest.split(split)])
        attempts.append(is_found(lambda s=split: shards.split_tokens(manifest, s), right, changed))
    shard = draw.choice(manifest.shards)
    start = draw.randrange(shard.tokens)
    stop = draw.randint(start + 1, shard.tokens)
    part = is_found(
        lambda: ShardReader(manifest.path, shard, "uint16", GROUP).read(start, stop),
        tokens[shard.file][start:stop],
        [shard.file],
    )
    assert not part or shard.file in changed
    streamed = is_found(lambda: reader_of(manifest).read(0)[0], data.stream, changed)
    attempts += [part, streamed]
    found, notes = reader_of(manifest, skip_corrupt=True).read(0)
    is_read = found != IGNORED
    assert np.array_equal(found[is_read], data.stream[is_read])
    assert streamed == bool(notes) == (not is_read.all())
    for note in notes:
        assert any(file in note for file in changed)
    # A check of all bytes finds all damage.
    with pytest.raises(DataError) as caught:
        shards.verify(manifest, full=True)
    named = sum(file in str(caught.value) for file in changed)
    assert named == min(len(changed), 3)
    assert ("and 1 more" in str(caught.value)) == (len(changed) == 4)
    return "found" if any(attempts) else "harmless"


@variants
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_damaged_shard_is_found_or_harmless(
    kind: Kind, count: int, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[str] = Counter()
    try:
        for number in range(KINDS.index(kind), count, len(KINDS)):
            with noting(kind, number):
                files = damaged(data.files, kind, number)
                data.put(files)
                found = outcome(data, files, random.Random(number))
                # Only the first four bytes of a file are never read.
                is_read = any(
                    file not in files or files[file][4:] != content[4:]
                    for file, content in data.files.items()
                )
                assert found == ("found" if is_read else "harmless")
                counts[found] += 1
    finally:
        data.put(data.files)
    if count > SHORT:
        report(capsys, f"shards, {name_of(kind)}", counts)


@variants
@pytest.mark.parametrize("kind", [*OF_BYTES, emptied, several], ids=name_of)
@pytest.mark.parametrize("file", [layout.MANIFEST, layout.ENCODING])
def test_a_damaged_manifest_or_tokenizer_is_found_or_harmless(
    file: str, kind: Kind, count: int, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(data.manifest.path) / file
    original = {file: path.read_bytes()}
    counts: Counter[str] = Counter()
    try:
        for number in range(KINDS.index(kind), count // 2, len(KINDS)):
            with noting(kind, number):
                path.write_bytes(damaged(original, kind, number)[file])
                try:
                    manifest = manifests.load(data.manifest.path)
                    made = manifest.load_tokenizer()
                except DataError as e:
                    assert "\n" not in str(e)
                    assert str(path) in str(e)
                    counts["found"] += 1
                else:  # for example, more or less white space
                    assert manifest == data.manifest
                    assert made.sha256 == manifest.tokenizer_sha256
                    counts["harmless"] += 1
    finally:
        path.write_bytes(original[file])
    if count > SHORT:
        report(capsys, f"{file}, {name_of(kind)}", counts)


@contextlib.contextmanager
def noting(kind: Kind, number: int) -> Iterator[None]:
    """Adds to any error the variant that caused it."""
    try:
        yield
    except BaseException as e:
        e.add_note(f"variant {number} of {name_of(kind)}")
        raise


def report(capsys: pytest.CaptureFixture[str], what: str, counts: Counter[str]) -> None:
    with capsys.disabled():
        print(f"\n{what}: {counts['found']} found, {counts['harmless']} harmless", end="")
