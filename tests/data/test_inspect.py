"""Inspecting a dataset shows what is in it."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from manta import layout
from manta.config import from_dict, load
from manta.data import manifest as manifests
from manta.data.inspect import SAMPLE_CHARACTERS, InspectConfig, inspect
from manta.data.manifest import Manifest
from manta.errors import DataError

NAME = "animals-bpe300"
SAMPLE = re.compile(
    r"\nsample (\d+): document ([\d,]+) of (train|val), ([\d,]+) tokens\n(.*)", re.S
)


def lines_of(home: Path, dataset: str = NAME, **keys: Any) -> list[str]:
    return list(inspect(from_dict(InspectConfig, {"home": str(home), "dataset": dataset, **keys})))


def samples(lines: list[str]) -> list[tuple[int, str, int, str]]:
    """The samples shown, each as (document, split, tokens, text)."""
    found = [match.groups() for line in lines if (match := SAMPLE.fullmatch(line))]
    assert [int(number) for number, *_ in found] == list(range(1, len(found) + 1))
    return [(int(a.replace(",", "")), b, int(c.replace(",", "")), d) for _, a, b, c, d in found]


def documents(manifest: Manifest, split: str) -> list[tuple[int, str]]:
    """The documents of a split, each as (tokens, text), read with nothing but pyarrow."""
    made = manifest.load_tokenizer()
    files = [pq.read_table(f"{manifest.path}/{s.file}")["tokens"] for s in manifest.split(split)]
    ids = np.concatenate([file.to_numpy() for file in files])
    pieces = np.split(ids, np.flatnonzero(ids == made.eot) + 1)[:-1]
    return [(len(piece) - 1, made.decode(piece[:-1].tolist())) for piece in pieces]


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Manifest:
    """A copy of the dataset, to be damaged."""
    shutil.copytree(prepared / "data" / NAME, tmp_path / "data" / NAME)
    return manifests.load(str(tmp_path / "data" / NAME))


def damage(manifest: Manifest, split: str) -> Path:
    """Flips a bit of a row group; the footer stays whole."""
    (shard,) = manifest.split(split)
    file = Path(manifest.path) / shard.file
    data = bytearray(file.read_bytes())
    data[pq.read_metadata(file).row_group(0).column(0).data_page_offset + 20] ^= 1
    file.write_bytes(data)
    return file


def refusal(call: Callable[[], Any]) -> str:
    """The one line of the DataError that the call raises."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_job_shows_totals_lengths_and_samples(
    load_job: Callable[[str], Any], prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifests.load(str(prepared / "data" / NAME))
    arguments = [f"home={prepared}", f"dataset={NAME}", "verify=true"]
    load_job("inspect").main(load(InspectConfig, arguments))
    out, err = capsys.readouterr()
    assert f"dataset  {manifest.path}\n" in out
    assert f"source   {manifest.recipe['source']['location']}\n" in out
    assert f"tokens   uint16, {manifest.tokenizer}, {manifest.vocab_size} ids, end-of-text" in out
    for split in ("train", "val"):
        assert (
            f"{split:5}    {manifest.documents(split):,} documents, {manifest.tokens(split):,} "
            f"tokens, {manifest.text_bytes(split):,} bytes of text"
        ) in out
    assert "dropped  0 empty, 0 contaminated, 0 duplicate documents\n" in out
    assert "files    2 shards, " in out
    assert out.count("\nsample ") == 3
    assert "whole    every shard's size, footer, row count, dtype and sha256 match the man" in out
    assert f"data.mix={{{NAME}: 1}}" in err


def test_the_histogram_counts_the_documents(prepared: Path) -> None:
    manifest = manifests.load(str(prepared / "data" / NAME))
    counts: dict[int, int] = {}
    for split in ("train", "val"):
        for tokens, _ in documents(manifest, split):
            power = (tokens + 1).bit_length() - 1  # with its end-of-text
            counts[power] = counts.get(power, 0) + 1
    total = sum(counts.values())
    expected = {
        (1 << power, (2 << power) - 1): f"{counts.get(power, 0) / total:.1%}"
        for power in range(min(counts), max(counts) + 1)
    }
    found = {}
    for line in lines_of(prepared):
        if match := re.fullmatch(r" +([\d,]+) to ([\d,]+) tokens +([\d.]+%)( +#*)?", line):
            low, high = (int(text.replace(",", "")) for text in match.groups()[:2])
            found[low, high] = match[3]
    assert found == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_samples_are_documents_of_the_split(split: str, prepared: Path) -> None:
    manifest = manifests.load(str(prepared / "data" / NAME))
    whole = documents(manifest, split)
    shown = samples(lines_of(prepared, samples=4, split=split, seed=3))
    assert len(shown) == len({number for number, *_ in shown}) == min(4, len(whole))
    for number, of, tokens, text in shown:
        count, expected = whole[number]
        assert (of, tokens) == (split, count)
        cut = expected[:SAMPLE_CHARACTERS] + " ..." * (len(expected) > SAMPLE_CHARACTERS)
        assert text == cut
        assert text.startswith("The ")
    assert any(text.endswith(" ...") for *_, text in shown)  # 500 bytes at least, and most are cut
    # The seed decides, and no more are shown than there are.
    assert samples(lines_of(prepared, samples=4, split=split, seed=3)) == shown
    assert samples(lines_of(prepared, samples=0, split=split)) == []
    everything = samples(lines_of(prepared, samples=10**6, split=split))
    assert [number for number, *_ in everything] == list(range(len(whole)))


def test_other_seeds_show_other_documents(prepared: Path) -> None:
    shown = {tuple(samples(lines_of(prepared, samples=3, seed=seed))) for seed in range(5)}
    assert len(shown) > 1


def test_a_dataset_of_several_shards_is_numbered_through(copy: Manifest) -> None:
    """The val shard stands in as a second train shard."""
    shards = (copy.shards[0], dataclasses.replace(copy.shards[1], split="train"))
    assert copy.shards[1].split == "val"
    both = dataclasses.replace(copy, shards=shards)
    both.save()
    whole = documents(both, "train")
    home = Path(copy.path).parents[1]
    seen = set()
    for seed in range(12):
        for number, _, tokens, text in samples(lines_of(home, samples=2, seed=seed)):
            seen.add(number >= shards[0].documents)
            assert tokens == whole[number][0]
            assert text.removesuffix(" ...") == whole[number][1][:SAMPLE_CHARACTERS]
    assert seen == {True, False}
    assert samples(lines_of(home, split="val")) == []


def test_verify_finds_a_flipped_bit(copy: Manifest) -> None:
    file, home = damage(copy, "train"), Path(copy.path).parents[1]
    said = refusal(lambda: lines_of(home, verify=True, samples=0))
    assert said.startswith(f"{file}: its sha256 differs")
    # Without it, the totals are shown, but the damaged part is not decoded.
    assert "sha256" not in lines_of(home, samples=0)[-1]
    assert lines_of(home, split="val")
    said = refusal(lambda: lines_of(home))
    assert said.startswith(f"{file}: row group 0 is damaged")


def test_a_missing_or_cut_shard_is_found_without_verify(copy: Manifest) -> None:
    home = Path(copy.path).parents[1]
    (shard,) = copy.split("val")
    file = Path(copy.path) / shard.file
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: {shard.size - 1} bytes, but its" in refusal(lambda: lines_of(home, samples=0))
    file.unlink()
    assert f"{file}: the file is missing" in refusal(lambda: lines_of(home, samples=0))


def test_a_damaged_manifest_or_tokenizer_is_named(copy: Manifest) -> None:
    home, folder = Path(copy.path).parents[1], Path(copy.path)
    (folder / "encoding.json").unlink()
    assert f"{folder}/encoding.json: no such file" in refusal(lambda: lines_of(home))
    (folder / layout.MANIFEST).write_text("{}")
    assert f"{folder}/{layout.MANIFEST}: its format is" in refusal(lambda: lines_of(home))


def test_a_dataset_is_found_by_name_or_folder(prepared: Path, tmp_path: Path) -> None:
    folder = str(prepared / "data" / NAME)
    by_name = lines_of(prepared)
    assert lines_of(prepared, folder) == lines_of(tmp_path, folder) == by_name
    assert lines_of(tmp_path, f"{folder}/") == by_name


def test_an_unknown_dataset_names_those_that_are_there(prepared: Path, tmp_path: Path) -> None:
    said = refusal(lambda: lines_of(prepared, "none"))
    assert said.startswith("dataset=none: no dataset there; ")
    there = said.partition("(there are: ")[2].rstrip(")").split(", ")
    assert there == sorted(there) and {NAME, "verses"} <= {*there}  # (other tests add theirs)
    said = refusal(lambda: lines_of(tmp_path / "nowhere"))
    assert f"(there are: none under {tmp_path}/nowhere/data)" in said
