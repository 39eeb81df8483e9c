"""Files that cannot be read, or are not there any more: one line names each."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.documents import WRITERS, parts_of, read, refusal, texts
from manta.errors import ConfigError, DataError
from manta.text import sources
from manta.text.sources import Source, documents, parts


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Has the rights of nobody, if it had those of root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody can open."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("ending", [".txt", *WRITERS])
def test_a_file_that_may_not_be_read_is_named(ending: str, public: Path) -> None:
    file = public / f"a{ending}"
    file.write_bytes(b"")
    file.chmod(0)
    with nobody():
        assert refusal(public).startswith(f"{file}: cannot be read (")
        assert refusal(file).startswith(f"{file}: cannot be read (")


def test_a_folder_that_may_not_be_listed_is_named(public: Path) -> None:
    closed = public / "closed"
    closed.mkdir()
    (closed / "a.txt").write_text("a")
    closed.chmod(0)
    with nobody():
        assert refusal(public).startswith(f"{closed}: cannot be listed (Permission denied)")
        message = refusal(closed / "a.txt")
    closed.chmod(0o755)
    assert message == f"data.source={closed}/a.txt: cannot be opened (Permission denied)"


@pytest.mark.parametrize("ending", [".txt", *WRITERS])
def test_what_is_gone_or_another_thing_when_it_is_read_is_named(
    ending: str, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    file = folder / f"a{ending}"
    WRITERS.get(ending, WRITERS[".jsonl"])(file)
    (part,) = parts(Source(str(folder)))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match=r": a pipe, where a file was; restore it or leave it out"):
        list(documents(part))
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match=r": a folder, where a file was; restore it or leave it"):
        list(documents(part))
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r": no such file on this node; every node must see"):
        list(documents(part))


@pytest.mark.parametrize("ending", WRITERS)
def test_a_file_that_shrinks_while_it_is_read_is_named(ending: str, tmp_path: Path) -> None:
    """The first texts have been read by then, or none."""
    file = tmp_path / f"a{ending}"
    WRITERS[ending](file)
    (part,) = parts(Source(str(tmp_path)))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError) as caught:
        list(documents(part))
    assert str(caught.value).startswith(f"{file}")
    assert "\n" not in str(caught.value)


def test_a_folder_that_goes_while_it_is_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    scan = os.scandir

    def going(folder: str) -> object:
        if folder.endswith("/b"):
            (tmp_path / "a").rmdir()
        return scan(folder)

    monkeypatch.setattr(os, "scandir", going)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/a: cannot be listed (No such file or directory)")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_parquet_file_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "a.parquet"
    table = pa.table({"n": [1, 2, 3, 4], "text": ["a", "b" * 300, "a", "é"]})
    pq.write_table(
        table, file, row_group_size=2, use_dictionary=data.draw(st.booleans()),
        compression=data.draw(st.sampled_from(["none", "zstd"])),
        write_page_checksum=data.draw(st.booleans()),
    )  # fmt: skip
    whole = bytearray(file.read_bytes())
    at = data.draw(st.integers(4, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[at] ^= data.draw(st.integers(1, 255))
    else:
        del whole[at:]
    file.write_bytes(whole)
    try:
        texts(parts_of(file, 16, 1))
    except DataError as e:
        assert str(e).startswith(str(file))
        assert "\n" not in str(e)


def test_a_page_whose_checksum_differs_is_named(tmp_path: Path) -> None:
    table = pa.table({"text": ["a text that is there"]})
    file = tmp_path / "a.parquet"
    pq.write_table(
        table, file, compression="none", use_dictionary=False, write_page_checksum=True,
        write_statistics=False,
    )  # fmt: skip
    file.write_bytes(file.read_bytes().replace(b"that is there", b"that was here"))
    assert refusal(tmp_path).startswith(f"{file}: cannot be read (")


# --- names ----------------------------------------------------------------------------------------


def test_a_name_may_have_255_bytes(tmp_path: Path) -> None:
    file = tmp_path / f"{'é' * 125}a.txt"
    file.write_text("a")
    assert read(file) == read(tmp_path) == read(f"{tmp_path}/é*a.txt") == ["a"]
    for longer in (f"{file}.txt", f"{file}*.txt"):
        with pytest.raises(ConfigError, match=r"this path has a name of 2.. bytes"):
            read(longer)


def test_names_that_are_not_utf8_are_visible(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff\n")
    Path(odd).mkdir()
    (Path(odd) / "a.png").write_text("")
    Path(f"{odd}/b.\udcfe").write_text("")
    (tmp_path / "a.txt").write_text("a")
    listed = sources.list_files(Source(str(tmp_path)))
    assert listed is not None
    assert listed.line() == (
        rf"reading 1 file of {tmp_path} (1 .txt); passing over 2 (1 .\xfe, 1 .png)"
    )
    (Path(odd) / "c.jsonl").write_text("")
    assert refusal(tmp_path).replace("\n", r"\n") == (
        rf"{tmp_path}/odd\xff\n/c.jsonl: its name is not UTF-8; rename it, or leave it out"
    )


@pytest.mark.parametrize("name", ["\udcff.txt", "\udcff*", "a\0.txt", "\ud800"])
def test_a_source_whose_name_cannot_be_opened_is_refused(name: str, tmp_path: Path) -> None:
    for location in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}", f"s3://a/{name}"):
        with pytest.raises(ConfigError, match="this path is not UTF-8, or has a NUL") as caught:
            read(location)
        str(caught.value).encode()
