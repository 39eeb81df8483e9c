"""Clouds' notices that a machine goes reach Ray. A server of the test's stands for each cloud's
metadata service, with its rules."""

import itertools
import json
import queue
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from helpers.alone import alone, run
from helpers.common import ROOT
from manta.cluster import spot

MOMENT = datetime(2031, 9, 18, 8, 22, tzinfo=UTC)
NOTICE = '{"action": "terminate", "time": "2031-09-18T08:22:00Z"}'
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NOTHING = {
    "EC2": {},
    "Google Cloud": {PREEMPTED: "FALSE", MAINTENANCE: "NONE"},
    "Azure": {NAME: "gpu-1", EVENTS: '{"DocumentIncarnation": 1, "Events": []}'},
}


class Service(ThreadingHTTPServer):
    """A cloud's metadata service."""

    def __init__(self, cloud: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.cloud = cloud
        self.items = dict(NOTHING[cloud])
        self.tokens: list[str] = []
        self.asked: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        """EC2's service, version 2, gives a token for a time."""
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        is_right = self.path == "/latest/api/token" and seconds.isdecimal()
        if self.server.cloud != "EC2" or not is_right or not 1 <= int(seconds) <= 21600:
            return self._answer(404)
        self.server.tokens.append(f"token-{len(self.server.tokens)}=")
        return self._answer(200, self.server.tokens[-1])

    def do_GET(self) -> None:
        sent, tokens = self.headers, self.server.tokens
        if self.server.cloud == "EC2" and sent.get("X-aws-ec2-metadata-token") not in tokens[-1:]:
            return self._answer(401)
        if self.server.cloud == "Google Cloud" and sent.get("Metadata-Flavor") != "Google":
            return self._answer(403)
        if self.server.cloud == "Azure" and sent.get("Metadata") != "true":
            return self._answer(400)
        text = self.server.items.get(self.path)
        return self._answer(404) if text is None else self._answer(200, text)

    def _answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.server.asked.put((self.path, code))

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(params=["EC2"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service(request.param) as it:
        thread = threading.Thread(target=it.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield it
        finally:
            it.shutdown()
            thread.join()


def clouds(service: Service) -> list[spot.Cloud]:
    return [cloud(service.address) for cloud in spot.CLOUDS]


def at(service: Service, *items: dict[str, str]) -> list[spot.Notice | None]:
    """What this service's cloud announces with these items, one after the other."""
    found = []
    (cloud,) = (it for it in clouds(service) if it.name == service.cloud)
    for given in items:
        service.items = {**NOTHING[service.cloud], **given}
        found.append(cloud.notice())
    return found


def test_the_notice_is_found_when_it_comes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not for the machine itself
    recommended = {REBALANCE: '{"noticeTime": "2031-09-18T08:00:00Z"}'}
    found = at(service, {}, {}, recommended, {ACTION: NOTICE}, {ACTION: NOTICE, **recommended})
    warned = spot.Notice("EC2 recommends to rebalance since 2031-09-18T08:00:00Z", None)
    notice = spot.Notice("EC2's notice: terminate", MOMENT.timestamp())
    assert found == [None, None, warned, notice, notice]
    assert len(service.tokens) == 1


def test_a_token_that_has_expired_is_replaced(service: Service) -> None:
    cloud = spot.Amazon(service.address + "/")
    assert cloud.notice() is None
    service.tokens.append("another's")
    assert cloud.notice() is None
    assert len(service.tokens) == 3


@pytest.mark.parametrize("service", ["Google Cloud"], indirect=True)
def test_google_preempts_at_once_and_announces_maintenance(service: Service) -> None:
    """A migration is no notice: the machine goes on."""
    event = "TERMINATE_ON_HOST_MAINTENANCE"
    found = at(
        service,
        {},
        {MAINTENANCE: "MIGRATE_ON_HOST_MAINTENANCE"},
        {PREEMPTED: "TRUE\n", MAINTENANCE: event},
        {MAINTENANCE: event},
    )
    assert found[:2] == [None, None]
    seconds = []
    for notice in found[2:]:
        assert notice is not None and notice.moment is not None
        seconds.append(notice.moment - time.time())
    assert 20 < seconds[0] <= 30 and 3590 < seconds[1] <= 3600


def event(kind: str, ahead: float | None, machines: tuple[str, ...] = ("gpu-0", "gpu-1")) -> str:
    moment = datetime.now(UTC) + timedelta(seconds=ahead or 0)
    begun = "" if ahead is None else format_datetime(moment, usegmt=True)
    one = {"EventType": kind, "Resources": machines, "NotBefore": begun}
    return json.dumps({"DocumentIncarnation": 2, "Events": [one]})


@pytest.mark.parametrize("service", ["Azure"], indirect=True)
def test_azure_announces_what_ends_this_machine_soon(service: Service) -> None:
    nothing = at(
        service,
        {EVENTS: event("Freeze", 30)},
        {EVENTS: event("Preempt", 30, ("gpu-2",))},
        {EVENTS: event("Reboot", 86400)},
    )
    assert nothing == [None] * 3
    kinds = {"Preempt": 30, "Terminate": 300, "Reboot": 800, "Redeploy": None}
    found = at(service, *({EVENTS: event(kind, ahead)} for kind, ahead in kinds.items()))
    for notice, (kind, ahead) in zip(found, kinds.items(), strict=True):
        assert notice is not None and notice.moment is not None
        assert notice.what == f"Azure's notice: {kind}"
        assert notice.moment - time.time() == pytest.approx(ahead or 0, abs=10)


@pytest.mark.parametrize("service", list(NOTHING), indirect=True)
def test_the_cloud_is_found_and_alone_asked_on(service: Service) -> None:
    lines: list[str] = []
    items = {"EC2": {ACTION: NOTICE}, "Google Cloud": {PREEMPTED: "TRUE"},
             "Azure": {EVENTS: event("Preempt", 30)}}[service.cloud]  # fmt: skip
    found = spot.notices(clouds(service), lines.append, pause=0.01)
    thread = threading.Timer(0.1, service.items.update, [items])
    thread.start()
    assert next(found).what.startswith(f"{service.cloud}'s notice: ")
    thread.join()
    assert lines == [f"asking {service.cloud} for its notices"]
    asked = [service.asked.get() for _ in range(service.asked.qsize())]
    paths = [path for path, _ in asked]
    others = set(paths) - {"/latest/api/token", *NOTHING[service.cloud], *items, REBALANCE}
    assert all(paths.count(path) == 1 for path in others)


def test_a_recommendation_is_told_once_and_asked_past(service: Service) -> None:
    """Whether a notice follows it or not."""
    found = spot.notices(clouds(service), lambda line: None, pause=0.01)
    service.items = {REBALANCE: '{"noticeTime": "2031-09-18T08:00:00Z"}'}
    assert next(found).moment is None
    thread = threading.Timer(0.1, service.items.update, [{ACTION: NOTICE}])
    thread.start()
    assert next(found).moment == MOMENT.timestamp()
    thread.join()


NO_NOTICES = [
    ("EC2", ACTION, "[]"),
    ("EC2", ACTION, "{"),
    ("EC2", ACTION, '{"action": "stop"}'),
    ("EC2", ACTION, NOTICE.replace("Z", "")),
    ("EC2", ACTION, '{"action": "stop", "time": 7}'),
    ("EC2", REBALANCE, "soon"),
    ("Google Cloud", PREEMPTED, "<html>"),
    ("Azure", EVENTS, '{"Events": 7}'),
    ("Azure", EVENTS, '{"Events": ["Preempt"]}'),
    ("Azure", EVENTS, event("Preempt", 30).replace("GMT", "?").replace(":", "-")),
]


@pytest.mark.parametrize(("service", "path", "text"), NO_NOTICES, indirect=["service"])
def test_what_is_no_notice_is_said_once_and_asked_again(
    service: Service, path: str, text: str
) -> None:
    service.items[path] = text
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    found: list[spot.Notice] = []

    def watch() -> None:
        found.extend(itertools.islice(spot.notices(clouds(service), lines.put, pause=0.01), 1))

    thread = threading.Thread(target=watch)
    thread.start()
    asked = 0
    while asked < 3:
        asked += service.asked.get(timeout=30)[0] == path
    assert f"{service.cloud} is asked in vain: " in lines.get(timeout=30)
    service.items.update(NOTHING[service.cloud])
    service.items.pop(path) if service.cloud == "EC2" else None
    assert lines.get(timeout=30) == f"asking {service.cloud} for its notices"
    service.items.update({ACTION: NOTICE, PREEMPTED: "TRUE", EVENTS: event("Preempt", 30)})
    thread.join(30)
    assert len(found) == 1 and found[0].moment is not None
    assert lines.empty()


def test_a_machine_without_the_service_is_asked_on() -> None:
    class Enough(Exception):
        pass

    def say(line: str) -> None:
        raise Enough(line)

    with pytest.raises(Enough, match=r"EC2 is asked in vain: .*refused.*Azure is asked in vain"):
        next(spot.notices([cloud("http://127.0.0.1:9") for cloud in spot.CLOUDS], say))


@pytest.mark.parametrize("name", ["a100x8-spot", "gcp-a100x8"])
def test_the_cluster_files_copy_it_and_start_it_on_workers_alone(name: str) -> None:
    file = yaml.safe_load((ROOT / "clusters" / f"{name}.yaml").read_text())
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
from cluster.test_spot import ACTION, REBALANCE, Service
with Service("EC2") as it:
    threading.Thread(target=it.serve_forever, daemon=True).start()
    Path("address.new").write_text(it.address)
    Path("address.new").rename("address")
    while not Path("busy").exists() or it.asked.get()[1] != 404:
        time.sleep(0.05)
    it.items[REBALANCE] = '{{"noticeTime": "2031-09-18T08:00:00Z"}}'
    while not Path("warned").exists():
        time.sleep(0.05)
    moment = datetime.now(UTC) + timedelta(seconds=100)
    it.items[ACTION] = moment.strftime('{{"action": "terminate", "time": "%Y-%m-%dT%H:%M:%SZ"}}')
    threading.Event().wait()
"""
SCRIPT = """
ray get-auth-token --generate >/dev/null 2>&1
ray start --head --num-cpus=1 --node-ip-address=10.98.7.6 --port=6379 --include-dashboard=false \\
    >log 2>&1
python serve.py &
until [ -e address ]; do sleep 0.05; done
cp {spot} spot.py
python spot.py 10.98.7.6:6379 $(cat address) >spot.log 2>&1 &
RAY_ADDRESS=10.98.7.6:6379 python busy.py
wait $! || cat spot.log
grep -o 'Ray moves.*' spot.log
"""
BUSY = """
import time
from pathlib import Path
import ray
from manta.cluster import spot
ray.init(log_to_driver=False, logging_level="error")
actor = ray.remote(num_cpus=1)(dict).remote()  # an idle node would leave at once
ray.get(actor.__ray_ready__.remote())
Path("busy").touch()
deadline = time.monotonic() + 90
while not (warning := spot.warning()) and time.monotonic() < deadline:
    time.sleep(0.1)
print("warned", warning)
Path("warned").touch()
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
    warned = "EC2 recommends to rebalance since 2031-09-18T08:00:00Z (10.98.7.6)"
    assert said["warned"] == warned, lines
    assert said["Ray"] == "moves the work elsewhere", lines
    assert said["leaving"] == "True", lines
    assert 0 < float(said["seconds"]) < 100, lines
