"""Files wherever they are: a local path or an object store's URI, through pyarrow's filesystems.

Every path is a string, absolute: "/home/me/manta/runs/a" or "s3://bucket/manta/runs/a".
A folder of results is *committed* by its manifest, which is written last and in one piece.
"""

import functools
import hashlib
import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from manta.errors import ConfigError, DataError

CHUNK_BYTES = 1 << 20
OBJECT_STORES = ("s3", "gs", "gcs", "abfs")


def home(configured: str | None) -> str:
    """The folder for everything that Manta makes: the config's, $MANTA_HOME, or ~/manta."""
    return absolute(configured or os.environ.get("MANTA_HOME") or "~/manta")


def absolute(path: str) -> str:
    if "://" in path:
        return path.rstrip("/")
    return str(Path(path).expanduser().absolute())


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def join(path: str, *parts: str) -> str:
    return "/".join([path.rstrip("/"), *parts])


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path, and the path inside it.

    Raises:
        ConfigError: the URI's scheme is unknown to pyarrow and fsspec alike.
    """
    if "://" not in path:
        return _local(), absolute(path)
    scheme, _, rest = path.partition("://")
    try:
        return _remote(scheme, rest.partition("/")[0]), _inside(path)
    except (pa.ArrowInvalid, ValueError, ImportError, OSError) as e:
        raise ConfigError(f"{path}: this storage cannot be opened: {e}") from None


def _inside(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    return rest if scheme != "file" else "/" + rest.lstrip("/")


@functools.cache
def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


@functools.cache
def _remote(scheme: str, bucket: str) -> pafs.FileSystem:
    """One connection per bucket: opening one asks the network for its region and credentials."""
    if scheme in (*OBJECT_STORES, "file", "hdfs"):
        return pafs.FileSystem.from_uri(f"{scheme}://{bucket}/")[0]
    import fsspec

    return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))


def info(path: str) -> pafs.FileInfo:
    fs, inside = filesystem(path)
    return fs.get_file_info(inside)


def exists(path: str) -> bool:
    return info(path).type != pafs.FileType.NotFound


def list_files(path: str, recursive: bool = True) -> list[pafs.FileInfo]:
    """The files and folders under a folder, by name; nothing when it does not exist."""
    fs, inside = filesystem(path)
    selector = pafs.FileSelector(inside, allow_not_found=True, recursive=recursive)
    return sorted(fs.get_file_info(selector), key=lambda item: item.path)


def read_bytes(path: str) -> bytes:
    """Raises DataError when the file is missing."""
    fs, inside = filesystem(path)
    try:
        with fs.open_input_stream(inside, compression=None) as f:
            return f.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file in one piece: a reader sees all of it or nothing of it."""
    fs, inside = filesystem(path)
    if is_local(path):
        Path(inside).parent.mkdir(parents=True, exist_ok=True)
        beside = f"{inside}.{uuid.uuid4().hex[:8]}.tmp"
        with Path(beside).open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        Path(beside).replace(inside)
    else:  # an object store shows an object only when it is whole
        _make_parent(path)
        with fs.open_output_stream(inside, compression=None) as f:
            f.write(data)


def read_json(path: str) -> Any:
    """Raises DataError when the file is missing or is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as e:
        raise DataError(f"{path}: not valid JSON ({e}); restore the file or make it anew") from None


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def make_folder(path: str) -> None:
    fs, inside = filesystem(path)
    fs.create_dir(inside, recursive=True)


def _make_parent(path: str) -> None:
    """Object stores have no folders to make; other remote filesystems want them."""
    if path.partition("://")[0] not in OBJECT_STORES:
        make_folder(path.rpartition("/")[0])


def delete_folder(path: str) -> None:
    fs, inside = filesystem(path)
    if exists(path):
        fs.delete_dir(inside)


def upload(local: str | Path, path: str) -> None:
    """Copies a local file to its place, in one piece there."""
    fs, inside = filesystem(path)
    if is_local(path):
        write_bytes(path, Path(local).read_bytes())
        return
    _make_parent(path)
    with Path(local).open("rb") as source, fs.open_output_stream(inside, compression=None) as sink:
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)


def download(path: str, local: str | Path) -> None:
    fs, inside = filesystem(path)
    Path(local).parent.mkdir(parents=True, exist_ok=True)
    with fs.open_input_stream(inside, compression=None) as source, Path(local).open("wb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)


def sha256(path: str) -> str:
    fs, inside = filesystem(path)
    digest = hashlib.sha256()
    with fs.open_input_stream(inside, compression=None) as f:
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_file(path: str, size: int, digest: str | None, error: type[Exception]) -> None:
    """Raises `error`, naming the file, unless it is there with this size (and sha256, if given)."""
    found = info(path)
    if found.type != pafs.FileType.File:
        raise error(f"{path}: the file is missing")
    if found.size != size:
        raise error(f"{path}: {found.size} bytes, but its manifest says {size}: it is truncated")
    if digest is not None and sha256(path) != digest:
        raise error(f"{path}: its sha256 differs from its manifest's: the file is damaged")


class HashingWriter(io.RawIOBase):
    """A file being written whose size and sha256 are known when it is closed."""

    def __init__(self, path: str):
        super().__init__()
        _make_parent(path)
        fs, inside = filesystem(path)
        self._stream = fs.open_output_stream(inside, compression=None)
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self._stream.write(view)
        self.size += view.nbytes
        return view.nbytes

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
