"""EC2's notice to a spot machine reaches Ray. A server of the test's stands for EC2's metadata
service, with its rules: a token first, 404 while there is no notice, then JSON."""

import queue
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from helpers.alone import alone, run
from helpers.common import ROOT
from manta.cluster import spot

MOMENT = datetime(2031, 9, 18, 8, 22, tzinfo=UTC)
NOTICE = '{"action": "terminate", "time": "2031-09-18T08:22:00Z"}'


class Service(ThreadingHTTPServer):
    """EC2's metadata service, version 2."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.tokens: list[str] = []
        self.notice: str | None = None
        self.asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        is_right = self.path == "/latest/api/token" and seconds.isdecimal()
        if not is_right or not 1 <= int(seconds) <= 21600:
            return self._answer(400)
        self.server.tokens.append(f"token-{len(self.server.tokens)}=")
        return self._answer(200, self.server.tokens[-1])

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens[-1:]:
            return self._answer(401)
        is_there = self.path == "/latest/meta-data/spot/instance-action" and self.server.notice
        return self._answer(200, self.server.notice or "") if is_there else self._answer(404)

    def _answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.server.asked.put(code)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as it:
        thread = threading.Thread(target=it.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield it
        finally:
            it.shutdown()
            thread.join()


def test_the_notice_is_found_when_it_comes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not for the machine itself
    metadata = spot.Metadata(service.address + "/")
    assert metadata.notice() is metadata.notice() is None
    assert len(service.tokens) == 1
    service.notice = NOTICE
    assert metadata.notice() == ("terminate", MOMENT.timestamp())


def test_a_token_that_has_expired_is_replaced(service: Service) -> None:
    metadata = spot.Metadata(service.address)
    assert metadata.notice() is None
    service.tokens.append("another's")
    assert metadata.notice() is None
    assert len(service.tokens) == 3


@pytest.mark.parametrize("text", ["[]", "{", '{"action": "stop"}', NOTICE.replace("Z", "")])
def test_what_is_no_notice_is_said_once_and_asked_again(service: Service, text: str) -> None:
    service.notice = text
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    found: list[tuple[str, float]] = []

    def watch() -> None:
        found.append(spot.wait(spot.Metadata(service.address), lines.put, pause=0.01))

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(6):
        service.asked.get(timeout=30)
    assert lines.get(timeout=30).startswith("EC2 is asked in vain: no notice: ")
    service.notice = None
    assert lines.get(timeout=30) == "asking EC2 for its notice"
    service.notice = NOTICE
    thread.join(30)
    assert found == [("terminate", MOMENT.timestamp())]
    assert lines.empty()


def test_a_machine_without_the_service_is_asked_on() -> None:
    class Enough(Exception):
        pass

    def say(line: str) -> None:
        raise Enough(line)

    with pytest.raises(Enough, match=r"asked in vain: .*refused"):
        spot.wait(spot.Metadata("http://127.0.0.1:9"), say)


def test_the_cluster_file_copies_it_and_starts_it_on_spot_machines_alone() -> None:
    file = yaml.safe_load((ROOT / "clusters" / "a100x8-spot.yaml").read_text())
    ours = file["file_mounts"]["~/.manta/spot.py"]
    assert (ROOT / ours).samefile(spot.__file__)
    starts = {place: " ".join(file[f"{place}_start_ray_commands"]) for place in ("head", "worker")}
    assert "spot.py" not in starts["head"]
    assert "python ~/.manta/spot.py $RAY_HEAD_IP:6379" in starts["worker"]


SERVE = """
import sys, threading, time
from datetime import UTC, datetime, timedelta
from pathlib import Path
sys.path.insert(0, {tests!r})
from cluster.test_spot import Service
with Service() as it:
    threading.Thread(target=it.serve_forever, daemon=True).start()
    Path("address.new").write_text(it.address)
    Path("address.new").rename("address")
    while not Path("busy").exists() or it.asked.get() != 404:
        time.sleep(0.05)
    moment = datetime.now(UTC) + timedelta(seconds=100)
    it.notice = '{{"action": "terminate", "time": "%s"}}' % moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    threading.Event().wait()
"""
SCRIPT = """
ray get-auth-token --generate >/dev/null 2>&1
ray start --head --num-cpus=1 --node-ip-address=10.98.7.6 --port=6379 --include-dashboard=false \\
    >log 2>&1
python serve.py &
until [ -e address ]; do sleep 0.05; done
cp {spot} spot.py
AWS_EC2_METADATA_SERVICE_ENDPOINT=$(cat address) python spot.py 10.98.7.6:6379 >spot.log 2>&1 &
RAY_ADDRESS=10.98.7.6:6379 python busy.py
wait $! || cat spot.log
grep -o 'Ray moves.*' spot.log
"""
BUSY = """
import time
from pathlib import Path
import ray
ray.init(log_to_driver=False, logging_level="error")
actor = ray.remote(num_cpus=1)(dict).remote()  # an idle node would leave at once
ray.get(actor.__ray_ready__.remote())
Path("busy").touch()
state = ray._private.state.state
deadline = time.monotonic() + 90
while not (leaving := state.get_draining_nodes()) and time.monotonic() < deadline:
    time.sleep(0.1)
print("leaving", set(leaving) == {ray.get_runtime_context().get_node_id()})
print("seconds", *(moment / 1000 - time.time() for moment in leaving.values()))
"""


@alone
@pytest.mark.long
def test_a_real_ray_learns_of_it(short: Path) -> None:
    serve = SERVE.format(tests=str(ROOT / "tests"))
    lines = run(short, SCRIPT.format(spot=spot.__file__), serve=serve, busy=BUSY)
    said = dict(line.split(" ", 1) for line in lines if line)
    assert said["Ray"] == "moves the work elsewhere", lines
    assert said["leaving"] == "True", lines
    assert 0 < float(said["seconds"]) < 100, lines
