"""Byte-order marks: the encoding that they name is read, and they are no part of the text."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.documents import parts_of, read, refusal, texts

ENCODINGS = ["utf-8-sig", "utf-16", "utf-32"]
TEXTS = {
    "English": "The ray is a fish.\nIt lives in the sea.\n",
    "Russian": "СКАТ — это рыба.\nОн живёт в море.\n",
    "Greek": "Το σαλάχι είναι ψάρι.\nΖει στη θάλασσα.\n",
    "Hebrew": "הטריגון הוא דג.\nהוא חי בים.\n",
    "French": "La raie est un poisson.\nElle vit à l'océan, été comme hiver.\n",
}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=20),
    st.sampled_from(ENCODINGS),
    st.integers(1, 64),
)
def test_rows_are_the_same_with_any_mark(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], encoding: str, range_bytes: int
) -> None:
    file = tmp_path_factory.mktemp("marks") / "a.jsonl"
    lines = [json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows]
    file.write_bytes("".join(lines).encode(encoding))
    assert texts(parts_of(file, range_bytes, 1)) == rows


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_plain_text_is_the_same_with_any_mark(encoding: str, tmp_path: Path) -> None:
    text = "".join(f"line {i} é\u2028😀\r\n\n" for i in range(200))
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt").write_bytes("".encode(encoding))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress('{"text": "x"}'.encode(encoding)))
    assert read(tmp_path) == [text, "x"]
    found = texts(parts_of(tmp_path / "a.txt", 64, 1, cut_bytes=20))
    assert len(found) > 100 and "".join(found) == text


def test_a_mark_alone_on_the_first_line_is_a_blank_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff\nx\n\ny".encode())
    found = parts_of(tmp_path / "a.txt", 4, 1, cut_bytes=1)
    assert "".join(texts(found)).split() == ["x", "y"]
    (tmp_path / "b.jsonl").write_bytes('\ufeff\n{"text": "x"}'.encode())
    assert read(tmp_path / "b.jsonl") == ["x"]


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_without_a_mark_the_file_is_refused(
    errors: str, encoding: str, language: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXTS[language])
    assert read(file) == [TEXTS[language]]
    file.write_bytes(TEXTS[language].encode(encoding))
    message = refusal(file, errors=errors)
    assert message.startswith(f"{file}: not UTF-8 text; it looks like UTF-16")
    assert "iconv" in message


def test_damaged_utf16_is_named_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16") + b"\x00\xd8")
    assert refusal(tmp_path).startswith(f"{tmp_path}/a.txt: not UTF-16")
    assert read(tmp_path, errors="replace") == ["text\ufffd"]


@pytest.mark.parametrize("text", ["a\0b", "\x1b[31mred\x1b[0m", "one\x0ctwo", "a" * 99 + "\0\0"])
def test_a_text_may_hold_a_few_control_characters(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path) == [text]
