"""Files that somebody else may have written: their size, JSON and types are checked at one door.

What is wrong with a file becomes one line with the file, the field and its value. `read_json` is
for a file, `parse` for bytes, `check` for a value that has been read already.
"""

import functools
import json
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar, cast

from pyarrow import fs as pafs
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from manta import storage
from manta.errors import MantaError
from manta.terminal import line

__all__ = [
    "Finite", "Flag", "Integer", "Number", "Whole", "check", "exact", "is_plain_name", "line",
    "parse", "read_bytes", "read_json",
]  # fmt: skip

T = TypeVar("T")

# JSON takes up to 28 times its size in memory, so 24 MB stay below 1 GB.
MOST_BYTES = 24 << 20
DEEPEST = 32  # lists and objects in each other
MOST_ERRORS = 1000

# Numbers of steps, tokens and documents, and figures: any program can compute with them. A whole
# number is strict, as records are used as they are: "7" and true would pass as numbers else.
Whole = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# The same for what a client sends: no text and no truth value passes for a number.
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Integer = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


def exact(cls: type[T]) -> type[T]:
    """Marks a dataclass whose file has no other keys."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return cls


def read_json(
    path: str,
    kind: type[T],
    error: type[MantaError],
    remedy: str = "restore or recreate the file",
) -> T:
    """The content of the JSON file at `path`, as a `kind`.

    Raises:
        MantaError: an `error` with one line, the `remedy` at its end: the file is missing, too
            large or damaged, or is not a `kind`.
    """
    data = read_bytes(path, error)
    try:
        return parse(data, kind)
    except ValueError as e:
        raise error(f"{path}: {e}; {remedy}") from None


def read_bytes(path: str, error: type[MantaError], most: int = MOST_BYTES) -> bytes:
    """The content of a file of at most `most` bytes. Raises `error` if there is no such file."""
    try:
        found = storage.info(path)
        if found.type == pafs.FileType.NotFound:
            raise error(f"{path}: no such file")
        if found.type != pafs.FileType.File:
            raise error(f"{path}: not a file; restore or recreate the file")
        if found.size is not None and found.size > most:
            raise error(
                f"{path}: {found.size:,} bytes are too many: Manta reads at most {most:,} of such "
                "a file; restore or recreate the file"
            )
        return storage.read_bytes(path)
    except OSError as e:
        if not storage.is_local(path):  # it may be the network, and not the file
            raise
        raise error(f"{path}: cannot be read ({line(str(e))}); restore the file") from None


def parse(data: bytes, kind: type[T]) -> T:
    """The `kind` that JSON describes. Raises ValueError, which says in one line what is wrong."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"{len(data):,} bytes are too many: Manta reads at most {MOST_BYTES:,}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not valid JSON ({line(str(e))})") from None
    return check(content, kind)


def check(content: Any, kind: type[T]) -> T:
    """The `kind` that plain values describe. Raises ValueError, which says in one line what is
    wrong with them."""
    level = [content]
    for _ in range(DEEPEST):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            break
    if level:
        raise ValueError(f"not valid JSON for Manta (more than {DEEPEST} levels deep)")
    try:
        return _adapter(cast(Hashable, kind)).validate_python(content)
    except ValidationError as e:
        if e.error_count() > MOST_ERRORS:  # to describe them takes more memory than the file did
            raise ValueError(f"{e.error_count():,} of its values have a wrong type") from None
        first, *more = e.errors(include_url=False)
        others = f" (and {len(more)} more)" if more else ""
        raise ValueError(f"{_describe(dict(first))}{others}") from None


def is_plain_name(name: str) -> bool:
    """Whether a name, with parts as in a/b, stays in the folder to which it belongs."""
    parts = name.replace("\\", "/").split("/")
    is_short = name.isprintable() and all(len(part.encode()) <= 255 for part in parts)
    return is_short and not {"", ".", ".."} & set(parts)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe(error: dict[str, Any]) -> str:
    key = line(".".join(map(str, error["loc"])))
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} is missing"
    if error["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key, perhaps of another version of Manta"
    message = line(error["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    message = message.partition(" or an instance of")[0]
    given = error["input"]
    value = "an object" if isinstance(given, dict) else line(repr(given))
    if isinstance(given, list):
        value = "a list"
    return f"{key}={value}: {message}" if key else f"{value}: {message}"
