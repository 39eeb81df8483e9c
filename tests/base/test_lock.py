"""The lock on a path: one process has it, the other is told who; a dead process holds nothing."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.common import ROOT
from manta import lock, storage
from manta.errors import DataError

# fsspec's local:// stands for an object store: as with s3://, Manta writes nothing in place.
KINDS = ["", "local://"]
REFUSED = r"^preparing x: process {pid} on {host} is using it; wait until it has ended, or give "

HOLDER = """
import sys, time
from manta import lock
lock.SETTLE_SECONDS = 0.0
true, ahead = time.time, float(sys.argv[2])
time.time = lambda: true() + ahead
if ahead:
    lock.LEASE_SECONDS = 0.3  # renewed every 0.05 s
with lock.lock(sys.argv[1], "preparing x"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.01)


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}{tmp_path}/not/there/yet/.x.lock"


def refused(path: str, pid: int | None = None) -> None:
    words = REFUSED.format(pid=pid or os.getpid(), host=socket.gethostname())
    with pytest.raises(DataError, match=words), lock.lock(path, "preparing x"):
        raise AssertionError("two have it")


def free(path: str) -> None:
    with lock.lock(path, "preparing x"):
        pass


@contextlib.contextmanager
def another_process(path: str, ahead: float = 0) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the path and does not let go by itself. Its clock is `ahead` of ours, in
    seconds."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-c", HOLDER, path, str(ahead)]
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_second_is_told_who_has_it_until_the_first_ends(path: str) -> None:
    with lock.lock(path, "preparing x"):
        refused(path)
        refused(path)
        free(f"{path}.other")
    free(path)
    with pytest.raises(ZeroDivisionError), lock.lock(path, "preparing x"):
        refused(path)
        _ = 1 / 0
    free(path)


def test_threads_are_others_too(path: str) -> None:
    found: list[str] = []

    def want() -> None:
        try:
            free(path)
        except DataError as e:
            found.append(str(e))

    with lock.lock(path, "preparing x"):
        thread = threading.Thread(target=want)
        thread.start()
        thread.join()
    assert len(found) == 1


def test_a_process_that_was_killed_holds_it_no_longer(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_process(path) as process:
        refused(path, process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not storage.is_local(path):  # nobody has told the store; the lease has to run out
            refused(path, process.pid)
            monkeypatch.setattr(lock, "LEASE_SECONDS", 0.0)
        free(path)


def test_what_is_left_on_a_disk_is_no_lock(tmp_path: Path) -> None:
    """The kernel's lock leaves its file behind. If the file were deleted, two processes could lock
    two files of one name."""
    path = tmp_path / "x.lock"
    for text in ("", "half of {", json.dumps({"host": "h", "pid": 1, "id": "0"}) * 3):
        path.write_text(text)
        with lock.lock(str(path), "preparing x"):
            owner = json.loads(path.read_text())
            assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
            refused(str(path))
        assert path.exists()


def test_the_owner_may_not_have_said_who_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with lock.lock(str(path), "preparing x"):
        path.write_text("")
        with pytest.raises(DataError, match=r"^preparing x: another process is using it; "):
            free(str(path))


# --- leases --------------------------------------------------------------------------------------


@pytest.fixture
def lease(tmp_path: Path) -> Path:
    """The file behind the local://... path."""
    return tmp_path / "x.lock"


def uri(lease: Path) -> str:
    return f"local://{lease}"


def left(lease: Path, age: float) -> None:
    owner = {"host": socket.gethostname(), "pid": 12345, "id": "0123"}
    lease.write_text(json.dumps({**owner, "time": time.time() - age}))


def test_a_lease_is_good_for_its_time_and_no_longer(lease: Path) -> None:
    left(lease, lock.LEASE_SECONDS - 30)
    refused(uri(lease), 12345)
    left(lease, lock.LEASE_SECONDS + 1)
    with lock.lock(uri(lease), "preparing x"):
        assert json.loads(lease.read_text())["pid"] == os.getpid()
        refused(uri(lease))
    assert not lease.exists()


@pytest.mark.parametrize("ahead", [-90, 3600])
def test_a_lease_is_kept_and_taken_whatever_the_clock_of_its_owner(
    ahead: float, lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_process(uri(lease), ahead) as process:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "WATCH_SECONDS", 10.0)  # it ends with the first renewal
            refused(uri(lease), process.pid)
        process.kill()
        process.wait()
    free(uri(lease))
    assert not lease.exists()


def test_a_lease_that_ends_while_it_is_watched_is_free(
    lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(lease, lock.LEASE_SECONDS + 1)
    wait = time.sleep

    def meanwhile(seconds: float) -> None:
        lease.unlink(missing_ok=True)
        wait(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", meanwhile)
        assert lock._holder(uri(lease), "x", lambda line: None) is None


def test_a_line_says_that_an_old_lease_is_watched_before_it_is(
    lease: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[tuple[str, bool]] = []
    for age in (0, lock.LEASE_SECONDS + 1):
        left(lease, age)
        with (
            contextlib.suppress(DataError),
            lock.lock(
                uri(lease), "run x", lambda line: lines.append((line, read(lease)["pid"] == 12345))
            ),
        ):
            pass
    who = f"process 12345 on {socket.gethostname()}"
    assert lines == [
        (
            f"run x: {who} had the lock and seems to be gone; waiting {lock.WATCH_SECONDS:g} s for "
            "a sign that it lives",
            True,
        )
    ]
    left(lease, lock.LEASE_SECONDS + 1)
    free(uri(lease))
    assert capsys.readouterr().out.startswith(f"preparing x: {who} had the lock")


@pytest.mark.parametrize("text", ["", '{"host": "h", "pi', "0123"])
def test_a_lease_that_is_just_being_written_is_not_free(
    text: str, lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease.write_text(text)
    contents = iter(["", text[:1], None])
    wait = time.sleep

    def meanwhile(seconds: float) -> None:
        torn = next(contents, None)
        left(lease, -3600) if torn is None else lease.write_text(torn)
        wait(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", meanwhile)
        refused(uri(lease), 12345)
    assert read(lease)["pid"] == 12345


def test_a_lease_that_another_process_took_meanwhile_is_its_own(
    lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that slept for longer than its lease learns of it, and leaves the lease as it is:
    a third process would find it free otherwise."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.3)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    words = f"preparing x: process 12345 on {socket.gethostname()} has taken the lock"
    with pytest.raises(DataError, match=words), lock.lock(uri(lease), "preparing x", said.put):
        left(lease, 0)
        assert said.get(timeout=30).startswith(words)
    assert read(lease)["pid"] == 12345
    lease.unlink()
    with pytest.raises(ZeroDivisionError), lock.lock(uri(lease), "preparing x", said.put):
        left(lease, 0)
        said.get(timeout=30)
        _ = 1 / 0
    assert read(lease)["pid"] == 12345


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"time": "soon"}', "\udcff"])
def test_a_damaged_lease_holds_nothing(text: str, lease: Path) -> None:
    lease.write_bytes(text.encode(errors="surrogateescape"))
    free(uri(lease))
    assert not lease.exists()


def test_a_lease_is_renewed_while_its_block_runs(
    lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.3)
    with lock.lock(uri(lease), "preparing x"):
        monkeypatch.setattr(lock, "LEASE_SECONDS", 60.0)
        deadline = time.monotonic() + 30
        while not (first := read(lease)):
            pass
        while (now := read(lease)).get("time", first["time"]) == first["time"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert {**now, "time": 0} == {**first, "time": 0}
    assert not lease.exists()


def read(lease: Path) -> dict[str, Any]:
    """The record in the lease file, or {} where it is not whole: unlike a store, local:// shows a
    file that is still being written."""
    try:
        return json.loads(lease.read_text())
    except ValueError:
        return {}


def test_a_lease_outlives_a_hiccup_of_the_network(
    lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()

    def fail(path: str, owner: dict[str, object]) -> None:
        tried.set()
        raise OSError("no route to host")

    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.3)
    with lock.lock(uri(lease), "preparing x"):
        monkeypatch.setattr(lock, "_renew", fail)
        assert tried.wait(30)
    assert not lease.exists()


def test_of_two_that_find_it_free_the_last_to_write_has_it(
    lease: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(seconds: float) -> None:
        left(lease, 0)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", meanwhile)
        refused(uri(lease), 12345)
    assert read(lease)["pid"] == 12345  # the winner's, untouched
