"""The encoding of Unicode that a file is in: UTF-8, or one that its byte-order mark names."""

import codecs
import io

from manta.errors import DataError

UTF8 = "utf-8"
# A mark of UTF-32 begins like one of UTF-16, so the longer ones come first.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: UTF8,
}
HEAD_BYTES = 4096  # as much of a file as `encoding_of` looks at
# Control characters that no text has often: all but white space, backspace and escape.
CONTROLS = bytes([*range(8), *range(0x0E, 0x1B), *range(0x1C, 0x20)])


def encoding_of(head: bytes, path: str) -> str:
    """The encoding of a file with this beginning. UTF-8 alone leaves the mark in the text.

    Raises:
        DataError: it looks like UTF-16 or UTF-32, but has no byte-order mark.
    """
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    # In UTF-16, the upper halves of most scripts' letters are control characters of UTF-8.
    lanes = head[0:HEAD_BYTES:2], head[1:HEAD_BYTES:2]
    few, many = sorted(len(lane) - len(lane.translate(None, CONTROLS)) for lane in lanes)
    share = many / max(len(lanes[1]), 1)
    if many > 1 and (share > 0.4 or (share > 0.05 and not few)):
        raise DataError(
            f"{path}: not UTF-8 text; it looks like UTF-16 without a byte-order mark, or like no "
            "text at all; convert it (`iconv -f UTF-16LE -t UTF-8`), or leave it out"
        )
    return UTF8


class AsUtf8(io.RawIOBase):
    """The bytes of a file in another encoding, as UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str, errors: str):
        super().__init__()
        self._text = io.TextIOWrapper(file, encoding, errors, newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._text.read(len(buffer) // 4).encode()  # a character has at most four bytes
        buffer[: len(data)] = data
        return len(data)
