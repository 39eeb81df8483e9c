"""Sources and tokenizers, on files made here; r50k_base itself where a person has its file."""

import base64
import gzip
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manta.errors import ConfigError, DataError
from manta.text import sources, tokenizer
from manta.text.sources import Source, documents, parts
from manta.text.tokenizer import Tokenizer

few = settings(deadline=None, max_examples=25)

TEXTS = ["first text", "second\n\né 😀\u2028\0 text\n", " third "]
HOSTILE = (
    "<|endoftext|> ﷺ 👩‍👩‍👧 e\u0301 \0\x7f\t\r\n \u00a0\u2003\u3000 \ufffd\U0010ffff it's 1234"
)


def read(location: Path | str, **options: object) -> list[str]:
    """A source's documents, in order."""
    source = Source(str(location), **options)  # type: ignore[arg-type]
    return [text for part in parts(source) for text in documents(part)]


def refusal(location: Path | str, **options: object) -> str:
    """What reading a source is refused with."""
    with pytest.raises(DataError) as caught:
        read(location, **options)
    return str(caught.value)


def jsonl(texts: Iterable[str], key: str = "text") -> bytes:
    """Spelt both ways: with \\u escapes, and as it is; an empty line between."""
    lines = [json.dumps({"n": i, key: t}, ensure_ascii=bool(i % 2)) for i, t in enumerate(texts)]
    return "\n\n".join(lines).encode()


def write_plain(file: Path) -> None:
    file.write_bytes(jsonl(TEXTS))


def write_gzip(file: Path) -> None:
    file.write_bytes(gzip.compress(jsonl(TEXTS)))


def write_zstd(file: Path) -> None:
    file.write_bytes(pa.Codec("zstd").compress(jsonl(TEXTS), asbytes=True))


def write_parquet(file: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), file, row_group_size=2)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".jsonl": write_plain,
    ".ndjson": write_plain,
    ".jsonl.gz": write_gzip,
    ".json.gz": write_gzip,
    ".jsonl.zst": write_zstd,
    ".parquet": write_parquet,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind, in two folders, and a file that is no text."""
    below = tmp_path / "corpus" / "below"
    below.mkdir(parents=True)
    for number, (ending, writer) in enumerate(WRITERS.items()):
        writer(below / f"{number}{ending}")
    (tmp_path / "corpus" / "a.txt").write_text("a text")
    (tmp_path / "corpus" / "b.md").write_text("# b\n")
    (tmp_path / "corpus" / "c.jpg").write_bytes(b"\xff\xd8")
    return tmp_path / "corpus"


# --- where documents come from -------------------------------------------------------------------


@pytest.mark.parametrize("ending", WRITERS)
def test_each_row_of_a_file_is_a_document(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file)
    assert read(file) == TEXTS


@pytest.mark.parametrize("ending", sources.TEXT)
def test_a_plain_text_file_is_a_document_to_the_byte(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"plain{ending}"
    file.write_bytes("\ufeff \r\n\n\rx\u2028é\n\n".encode())
    assert read(file) == ["\ufeff \r\n\n\rx\u2028é\n\n"]


def test_a_folder_is_read_whole_in_order_of_path(folder: Path) -> None:
    everything = ["a text", "# b\n", *TEXTS * len(WRITERS)]
    assert read(folder) == everything
    assert read(f"{folder}/") == everything


def test_a_glob_is_the_files_that_match(folder: Path) -> None:
    assert read(f"{folder}/*.txt") == ["a text"]
    assert read(f"{folder}/below/[01].*") == TEXTS * 2
    assert read(f"{folder}/be*/*.parquet") == TEXTS


def test_a_file_uri_is_the_path_in_it(folder: Path) -> None:
    assert read(f"file://{folder}") == read(folder)
    assert read(f"file://{folder}/a.txt") == ["a text"]


def test_a_file_uri_can_be_a_glob(folder: Path) -> None:
    assert read(f"file://{folder}/*.txt") == ["a text"]


@pytest.mark.parametrize("name", ["with space.txt", "a#b.txt", "100%25.txt", "é.txt", "a[1].txt"])
def test_a_file_may_have_an_odd_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("odd")
    assert read(tmp_path / name) == ["odd"]


def test_the_standard_library_of_this_python_is_a_corpus() -> None:
    found = parts(Source(sources.PYTHON))
    names = [Path(name) for part in found for name in part.files]
    assert Path(json.__file__) in names
    assert not [name for name in names if sources.NOT_CORPUS & set(name.parts)]
    assert all(isinstance(text, str) and text.strip() for text in documents(found[0]))
    assert sources.identity(Source(sources.PYTHON))["python"] == sys.version.split()[0]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_local_folder_can_be_a_hugging_face_dataset(ending: str, tmp_path: Path) -> None:
    for i in range(3):
        WRITERS[ending](tmp_path / f"train-{i}{ending}")
    assert read(f"hf:{tmp_path}") == TEXTS * 3
    assert len(parts(Source(f"hf:{tmp_path}"))) == 3
    message = refusal(f"hf:{tmp_path}", text_key="body")
    assert f"hf:{tmp_path}" in message
    assert "data.text_key" in message
    assert "data.split" in refusal(f"hf:{tmp_path}", split="nope")


def test_damage_in_a_hugging_face_dataset_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"te')
    assert f"hf:{tmp_path}" in refusal(f"hf:{tmp_path}")


# --- parts ---------------------------------------------------------------------------------------


def test_parts_depend_on_the_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i:02}.txt" for i in range(12)]
    for name in random.Random(0).sample(names, len(names)):  # not in order of name
        (tmp_path / name).write_text(name * (sources.PART_BYTES // 25))
    found = parts(Source(str(tmp_path)))
    assert [Path(file).name for part in found for file in part.files] == names
    sizes = [sum(Path(file).stat().st_size for file in part.files) for part in found]
    assert len(sizes) > 1
    assert max(sizes) <= sources.PART_BYTES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_NUM_CPUS", "7")
    assert parts(Source(str(tmp_path))) == found
    assert pickle.loads(pickle.dumps(found)) == found
    copy = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")
    assert [len(part.files) for part in parts(Source(str(copy)))] == [len(p.files) for p in found]


def test_a_part_reads_the_same_twice(folder: Path) -> None:
    (part,) = parts(Source(str(folder)))
    assert list(documents(part)) == list(documents(part))


# --- cutting -------------------------------------------------------------------------------------

LINES = st.lists(
    st.sampled_from(["\n", " \t\n", "\r\n", "a\n", "é😀\n", "a longer line of text\n", "no end"]),
    max_size=30,
).map("".join)


@few
@given(LINES | st.text(), st.integers(0, 40))
@example("a\n\n\n\nb\n\n\n", 1)
def test_cutting_loses_no_character(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: int
) -> None:
    file = tmp_path_factory.mktemp("cut") / "a.txt"
    file.write_bytes(text.encode())
    found = read(file, cut_bytes=cut)
    assert "".join(found) == (text if text.strip() else "")


@few
@given(LINES, st.integers(1, 40))
def test_documents_are_cut_at_blank_lines_and_not_too_short(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: int
) -> None:
    file = tmp_path_factory.mktemp("cut") / "a.txt"
    file.write_bytes(f"start\n{text}".encode())
    found = read(file, cut_bytes=cut)
    for document in found[:-1]:
        assert len(document.encode()) >= cut
        assert not document.splitlines()[-1].strip()


def test_without_cutting_a_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\n" * 1000)
    assert read(tmp_path) == ["a\n\n" * 1000]
    assert len(read(tmp_path, cut_bytes=100)) > 20


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_bytes_that_are_not_utf8_are_named_with_file_and_offset(name: str, tmp_path: Path) -> None:
    data = '{"text": "good é"}\n'.encode() + b'{"text": "b\xffd"}\n'
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    message = refusal(tmp_path)
    assert f"{file}: not UTF-8 at byte {data.index(255)} (0xff)" in message
    assert "data.errors=replace" in message
    assert "b\ufffdd" in "".join(read(tmp_path, errors="replace"))


def test_a_character_cut_off_by_the_end_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("line\n\naé".encode()[:-1])
    assert "a.txt: not UTF-8 at byte 7 (0xc3)" in refusal(tmp_path, cut_bytes=2)
    assert read(tmp_path, errors="replace") == ["line\n\na\ufffd"]


def test_half_of_a_surrogate_pair_is_refused_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "ab\\ud83d"}\n')
    message = refusal(tmp_path)
    assert "a.jsonl, line 2: not valid Unicode at character 2" in message
    assert "data.errors=replace" in message
    fine, mended = read(tmp_path, errors="replace")
    assert fine == "fine"
    assert mended.rstrip("\ufffd") == "ab" != mended


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"body": 1, "n": 2}', "no text under 'text' (it has: body, n); set data.text_key"),
        ('{"text": 3}', "no text under 'text'"),
        ('{"text": null}', "no text under 'text'"),
        ('{"text": "a', "not valid JSON"),
        ("[1]", "a JSON object is needed"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    message = refusal(tmp_path)
    assert message.startswith(f"{file}, line 3: ")
    assert words in message


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["fine"] * 299 + [None]}), tmp_path / "a.parquet")
    assert "a.parquet, row 300: no text under 'text'" in refusal(tmp_path)


def test_a_parquet_file_without_the_column_is_named_with_those_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    message = refusal(tmp_path, text_key="body")
    assert "a.parquet: no column 'body'; it has n, text" in message
    assert read(tmp_path, text_key="text") == TEXTS


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_truncated_file_is_named(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{ending}"
    WRITERS[ending](file)
    file.write_bytes(file.read_bytes()[:-12])
    assert refusal(tmp_path).startswith(f"{file}: cannot be read")


def test_a_file_that_has_gone_since_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    (part,) = parts(Source(str(tmp_path)))
    file.unlink()
    with pytest.raises(DataError, match=r"a\.txt: no such file on this node"):
        list(documents(part))


def test_a_missing_place_is_named(tmp_path: Path) -> None:
    for location in (f"{tmp_path}/no.txt", f"{tmp_path}/no/*.txt", f"file://{tmp_path}/no"):
        assert refusal(location) == f"data.source={location}: no such file or folder"
    with pytest.raises(ConfigError, match="nope://a/b: this storage cannot be opened"):
        read("nope://a/b")


def test_an_unknown_kind_is_refused_with_the_kinds_there_are(folder: Path) -> None:
    message = refusal(folder / "c.jpg")
    assert message.startswith(f"data.source={folder}/c.jpg: unknown kind of file")
    assert all(kind in message for kind in sources.READABLE)


def test_a_folder_or_glob_with_nothing_readable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("x")
    for location in (tmp_path, f"{tmp_path}/*.txt"):
        assert "no readable file is there" in refusal(location)


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["", "a", " \n\t", "b", "\u3000"]))
    (tmp_path / "b.txt").write_text(" \n\n")
    assert read(tmp_path) == ["a", "b"]


def test_an_empty_file_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert read(tmp_path) == []
    (tmp_path / "b.txt").write_text("b")
    assert read(tmp_path) == ["b"]


# --- tokenizers ----------------------------------------------------------------------------------

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 20,
    "def read(path):\n    return open(path).read()\n\n" * 20,
    "Größe, naïve café, 東京 and 🦊🦊🦊; it's 1234 and 12.5\n" * 20,
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(CORPUS, 340)


@few
@given(st.text())
@example("")
@example(HOSTILE)
@example("<|endoftext|>")
@example("<|endoftext|>" * 3)
@example(" " * 100_000 + "x")
@example("\n" * 100_000)
@example("\0" * 1000)
@example("a" * 100_000)
@example("🦊" * 1000)
def test_any_text_comes_back_from_its_tokens(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eot not in ids
    assert int(trained.token_bytes()[ids].sum()) == len(text.encode())
    assert "".join(trained.stream(ids)) == text


def test_a_million_spaces_before_a_word_come_back(trained: Tokenizer) -> None:
    text = " " * 1_000_001 + "word"
    assert trained.decode(trained.encode(text)) == text


@few
@given(st.lists(st.integers(0, 339)))
def test_streamed_text_joins_to_the_decoded_whatever_the_ids(
    trained: Tokenizer, ids: list[int]
) -> None:
    pieces = list(trained.stream(ids))
    assert "".join(pieces) == trained.decode(ids)
    assert len(pieces) == len(ids) + 1


def test_streamed_text_has_whole_characters_only(trained: Tokenizer) -> None:
    ids = trained.encode("x🐟")  # the corpus has no fish: it is in pieces
    assert len(ids) > 3
    assert [piece for piece in trained.stream(ids) if piece] == ["x", "🐟"]


def test_end_of_text_is_the_last_id_and_stands_for_no_bytes(trained: Tokenizer) -> None:
    assert trained.eot == trained.vocab_size - 1 == 339
    assert trained.token_bytes()[trained.eot] == 0
    assert trained.token_bytes()[: trained.eot].min() == 1
    assert trained.decode([trained.eot]) == tokenizer.END_OF_TEXT


def test_training_twice_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert tokenizer.train((text for text in CORPUS), 340).sha256 == trained.sha256
    assert tokenizer.train(CORPUS, 339).sha256 != trained.sha256
    # in another process, with one thread and another order of sets
    code = (
        "import json, sys; from manta.text import tokenizer; "
        "print(tokenizer.train(json.load(sys.stdin), 340).sha256)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
        | {"PYTHONPATH": str(Path(tokenizer.__file__).parents[2])},
        input=json.dumps(CORPUS),
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert done.stdout.strip() == trained.sha256


@few
@given(st.sampled_from(["ab", "ab ", "a \n", "aé😀", "a1'"]), st.integers(0, 2**32), st.data())
def test_tokens_are_those_of_the_trainers_own_encoding(
    alphabet: str, seed: int, data: st.DataObject
) -> None:
    from tiktoken_ext.openai_public import r50k_pat_str
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Peer
    from tokenizers.decoders import ByteLevel

    text = "".join(random.Random(seed).choices(alphabet, k=data.draw(st.integers(1, 400))))
    vocab_size = data.draw(st.integers(257, 420))
    peer = Peer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r50k_pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    peer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator([text], trainer)

    made = tokenizer.train([text], vocab_size)
    assert made.vocab_size == peer.get_vocab_size() + 1 <= vocab_size
    assert made.encode(text) == peer.encode(text).ids
    for token in range(peer.get_vocab_size()):
        assert made.decode([token]) == peer.decode([token])


def test_a_vocabulary_is_no_larger_than_the_text_allows() -> None:
    assert tokenizer.train(["ab"], 4096).vocab_size == 258
    assert tokenizer.train([], 4096).vocab_size == 257


def test_a_tokenizer_comes_back_from_its_file(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / tokenizer.FILE_NAME
    file.write_bytes(trained.serialized)
    for back in (tokenizer.from_bytes(trained.serialized), tokenizer.load(str(file))):
        assert back.serialized == trained.serialized
        assert back.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (back.name, back.eot, back.vocab_size) == ("bpe-340", 339, 340)
        assert back.encode(HOSTILE) == trained.encode(HOSTILE)
        assert (back.token_bytes() == trained.token_bytes()).all()


def test_a_missing_or_damaged_tokenizer_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "encoding.json"
    with pytest.raises(DataError, match=r"encoding\.json: no such file"):
        tokenizer.load(str(file))
    for content in (b"", b"{}", b"[]", b"3", b"\xff", trained.serialized[:-5]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"encoding\.json: not a tokenizer of Manta's"):
            tokenizer.load(str(file))


def test_a_tokenizer_of_another_format_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "encoding.json"
    file.write_bytes(trained.serialized.replace(b"manta-bpe-1", b"manta-bpe-2"))
    with pytest.raises(DataError, match=r"encoding\.json: not a tokenizer of Manta's"):
        tokenizer.load(str(file))


# --- r50k_base -----------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiktoken's cache, empty, and a proxy at which nothing answers."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def test_without_network_or_file_r50k_base_says_how_to_provide_it(offline: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer_file=PATH/r50k_base\.tiktoken"):
        tokenizer.named(tokenizer.R50K)


def test_a_wrong_or_missing_file_is_not_r50k_base(offline: Path, tmp_path: Path) -> None:
    file = tmp_path / "r50k_base.tiktoken"
    with pytest.raises(DataError, match="no such file"):
        tokenizer.named(tokenizer.R50K, str(file))
    file.write_bytes(base64.b64encode(b"a") + b" 0\n")
    with pytest.raises(DataError, match=r"not r50k_base\.tiktoken"):
        tokenizer.named(tokenizer.R50K, str(file))


def test_the_file_that_is_asked_for_is_the_one_that_tiktoken_checks() -> None:
    from tiktoken_ext.openai_public import r50k_base

    assert tokenizer.R50K_SHA256 in r50k_base.__code__.co_consts
    assert tokenizer._r50k_address().startswith("https://")


@few
@given(st.text())
@example(HOSTILE)
@example(" " * 1000 + "x\n\n\n  y")
@example("\n".join(CORPUS))
def test_r50k_base_is_tiktokens_own(r50k: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    ours, theirs = r50k
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_r50k_base_has_gpt2s_ids(r50k: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, theirs = r50k
    assert (ours.vocab_size, ours.eot) == (theirs.n_vocab, theirs.eot_token) == (50257, 50256)
    assert ours.encode("Hello world") == [15496, 995]
    assert tokenizer.from_bytes(ours.serialized).encode(HOSTILE) == theirs.encode_ordinary(HOSTILE)


@pytest.fixture(scope="module")
def r50k(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    """Ours from the file, and tiktoken's, which finds the file in its cache."""
    file = os.environ.get("MANTA_TEST_R50K")
    if not file:
        pytest.skip("MANTA_TEST_R50K does not name the file r50k_base.tiktoken")
    cache = tmp_path_factory.mktemp("cache")
    shutil.copy(file, cache / hashlib.sha1(tokenizer._r50k_address().encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        theirs = tiktoken.get_encoding("r50k_base")
        assert (
            tokenizer.named(tokenizer.R50K).sha256 == tokenizer.named(tokenizer.R50K, file).sha256
        )
    return tokenizer.named(tokenizer.R50K, file), theirs
