"""Uploads to an object store in pieces: pyarrow's own client, and a slow store."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.common import ROOT
from manta import storage

MEGABYTES = 480
STARTED = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
ENDED = b'<CompleteMultipartUploadResult><ETag>"1"</ETag></CompleteMultipartUploadResult>'

UPLOAD = """
import sys
from pathlib import Path
from manta import storage

def resident(line):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(text.split()[1]) for text in lines if text.startswith(line + ":"))

storage.filesystem("s3://bucket/a")
before = resident("VmRSS")
storage.upload(sys.argv[1], "s3://bucket/a")
print(resident("VmHWM") - before)
"""


class Store(BaseHTTPRequestHandler):
    """The part of S3 that an upload in parts uses."""

    protocol_version = "HTTP/1.1"
    received = 0

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._take()
        self._answer(STARTED if "uploads" in self.path else ENDED)

    def do_PUT(self) -> None:
        self._take()
        time.sleep(0.5)
        with self.server.lock:  # type: ignore[attr-defined]
            Store.received += int(self.headers["x-amz-decoded-content-length"])
        self._answer()

    def _take(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + len("\r\n"))
            self.rfile.readline()
        else:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, body: bytes = b"") -> None:
        self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True
    lock = threading.Lock()


@pytest.fixture
def store() -> Iterator[str]:
    """The address of a running store."""
    with Server(("127.0.0.1", 0), Store) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_an_upload_holds_some_parts_of_a_file_and_not_all_of_it(store: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as f:
        f.truncate(MEGABYTES << 20)
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("AWS_")},
        "AWS_ENDPOINT_URL": store,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": str(ROOT / "platform"),
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-c", UPLOAD, str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Store.received == MEGABYTES << 20
    assert int(done.stdout) < storage.UPLOAD_BYTES + (80 << 20)


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_an_uploaded_file_is_the_same_in_its_place_and_nothing_else(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CHUNK_BYTES", 7)
    monkeypatch.setattr(storage, "UPLOAD_BYTES", 20)
    for size in (0, 6, 7, 8, 100):
        source = tmp_path / "source"
        source.write_bytes(os.urandom(size))
        storage.upload(source, f"{scheme}{tmp_path}/not/there/yet/{size}")
        folder = tmp_path / "not/there/yet"
        assert (folder / str(size)).read_bytes() == source.read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == ["0", "100", "6", "7", "8"]
