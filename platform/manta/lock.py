"""A lock on a path: one process gets it, and any other is told which process has it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from manta import storage
from manta.errors import DataError
from manta.terminal import line

# The errors of a filesystem that has no locks.
WITHOUT_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
LEASE_SECONDS = 60.0
SETTLE_SECONDS = 2.0
WATCH_SECONDS = 25.0  # two renewals, one of which may fail, and the time that writing takes

Say = Callable[[str], None]


def _print(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def lock(path: str, what: str, say: Say = _print) -> Iterator[None]:
    """Holds `path` while the block runs.

    On a local disk this is the kernel's lock, which ends with the process, however that ends. In an
    object store, or on a filesystem without such locks, it is a lease that is renewed while the
    block runs, and that lasts for LEASE_SECONDS after its owner has died. The owner's clock may be
    wrong, so a lease that looks old is also watched for WATCH_SECONDS before it is taken; `say`
    gets a line about that when it begins, and one if another process takes the lease of this one,
    which could not renew it for a while (a laptop that slept, a network that was away).

    Raises:
        DataError: another process holds it (`what` says what is locked), it cannot be locked, or
            another process took the lease while the block ran.
    """
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    with (_local if storage.is_local(path) else _lease)(path, what, owner, say):
        yield


@contextlib.contextmanager
def _local(path: str, what: str, owner: dict[str, object], say: Say) -> Iterator[None]:
    file = Path(storage.filesystem(path)[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, is_new = _opened(file)
    with os.fdopen(descriptor, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise _held(what, f.read()) from None
        except OSError as e:
            if e.errno not in WITHOUT_LOCKS:  # e.g. the lock service of NFS is down
                raise DataError(
                    f"{what}: {file} cannot be locked ({e.strerror}); fix the filesystem's locks, "
                    "or set home= to a folder on another one"
                ) from None
            if is_new:  # else it would look like a lease that is just being written
                file.unlink(missing_ok=True)
            with _lease(path, what, owner, say):
                yield
            return
        f.truncate(0)
        f.write(json.dumps(owner))
        f.flush()
        yield


def _opened(file: Path) -> tuple[int, bool]:
    """Opens a lock, which is truncated once it is held: never another file, through a link. Returns
    its descriptor, and whether it was made here."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        with contextlib.suppress(FileExistsError):
            return os.open(file, flags | os.O_EXCL, 0o666), True
        return os.open(file, flags, 0o666), False
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise DataError(f"{file} is a symbolic link, which cannot be a lock: remove it") from None


@contextlib.contextmanager
def _lease(path: str, what: str, owner: dict[str, object], say: Say) -> Iterator[None]:
    if (text := _holder(path, what, say)) is not None:
        raise _held(what, text)
    _renew(path, owner)
    # If several processes found it free, the last one to write has it.
    time.sleep(SETTLE_SECONDS)
    if not _names(text := _read(path) or "", owner):
        raise _held(what, text)
    stop, lost = threading.Event(), list[str]()

    def renew() -> None:
        while not stop.wait(LEASE_SECONDS / 6):
            with contextlib.suppress(OSError):  # a network failure; the next renewal is in time
                if other := _other(path, owner):
                    lost.append(f"{_who(other)} has taken the lock, as this one was not renewed")
                    say(f"{what}: {lost[0]}; both may be writing the same files")
                    return
                _renew(path, owner)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if not lost and not _other(path, owner):
            storage.delete_file(path)
    if lost:
        raise DataError(f"{what}: {lost[0]}: check what both have written, or write it again")


def _holder(path: str, what: str, say: Say) -> str | None:
    """The content of a lease that a living process holds; None if there is none."""
    first = _read(path)
    if first is None or abs(time.time() - _renewed(first)) < LEASE_SECONDS:
        return first
    # The owner is dead, or its clock differs from ours: then it renews the lease meanwhile. A lease
    # that is empty or torn may be one that is just being written: unlike a store, some file systems
    # show that.
    say(
        f"{what}: {_who(first)} had the lock and seems to be gone; waiting {WATCH_SECONDS:g} s for "
        "a sign that it lives"
    )
    for _ in range(50):
        time.sleep(WATCH_SECONDS / 50)
        if (text := _read(path)) is None:
            return None
        if text != first and _renewed(text):
            return text
    return None


def _read(path: str) -> str | None:
    """The content of a lease; None if there is none, as it is deleted when its owner ends."""
    if not storage.exists(path):
        return None
    with contextlib.suppress(DataError):  # deleted since
        return storage.read_bytes(path).decode(errors="replace")
    return None


def _names(text: str, owner: dict[str, object]) -> bool:
    """Whether the content of a lease is this owner's."""
    return f'"{owner["id"]}"' in text


def _other(path: str, owner: dict[str, object]) -> str | None:
    """The content of the lease if it is whole and another owner's, else None."""
    text = _read(path)
    return text if text and _renewed(text) and not _names(text, owner) else None


def _renew(path: str, owner: dict[str, object]) -> None:
    storage.write_json(path, {**owner, "time": time.time()})


def _renewed(text: str) -> float:
    try:
        return float(json.loads(text)["time"])
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return 0.0


def _who(text: str) -> str:
    """The owner that the content of a lock names, in words."""
    try:
        owner = json.loads(text)
        return line(f"process {owner['pid']} on {owner['host']}")
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _held(what: str, text: str) -> DataError:
    return DataError(
        f"{what}: {_who(text)} is using it; wait until it has ended, or give another name"
    )
