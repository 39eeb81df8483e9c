"""A job that waits for nodes: real autoscaling, by Ray's provider of nodes on one machine."""

import signal
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import format_info_string
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.utils import ClusterStatusFormatter

from helpers.alone import alone, run
from manta.cluster import capacity

COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
    "rsync_exclude", "rsync_filter",
)  # fmt: skip
CLUSTER = {
    "cluster_name": "fake",
    "max_workers": 2,
    "provider": {"type": "fake_multinode"},
    "auth": {"ssh_user": "nobody"},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.05,
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "docker": {},
    **{name: [] for name in COMMANDS},
}
START = """
ray get-auth-token --generate >/dev/null 2>&1
export AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_FAKE_CLUSTER=1 RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD
ray start --head --num-cpus=0 --node-ip-address=10.98.7.6 --port=6379 \\
    --autoscaling-config=fake.yaml --include-dashboard=false >log 2>&1
unset RAY_OVERRIDE_NODE_ID_FOR_TESTING
export RAY_ADDRESS=10.98.7.6:6379
python wait.py
python killed.py || true
for number in TERM USR1 INT; do
    SECONDS=0 code=0; NUMBER=$number python stopped.py || code=$?
    echo "$number $code $((SECONDS < 60)) $(python asked.py | tail -n 1)"
done
python after.py
"""
BEGIN = """
import os, signal, threading, time
import ray
from manta.cluster import capacity, connection
from manta.errors import ClusterError
from ray.experimental import internal_kv

capacity.FIRST_LINE, capacity.REPEATED, capacity.EXPIRES = 1.0, 1.0, 5.0

def asked():
    return (internal_kv._internal_kv_get("autoscaler_resource_request") or b"[]").decode()

connection.connect()
"""
WAIT = f"""{BEGIN}
capacity.require(2, 2.0, 0, 90, lambda line: print("line", line))
print("fits", capacity.workers_that_fit(2.0, 0))
try:
    capacity.require(3, 2.0, 0, 4)
except ClusterError as e:
    print("error", e)
time.sleep(1)
print("asked", asked())
"""
KILLED = f"""{BEGIN}
threading.Timer(8, os.kill, (os.getpid(), signal.SIGKILL)).start()
threading.Timer(6, lambda: print("killed", asked(), flush=True)).start()
capacity.require(3, 2.0, 0, 90, lambda line: None)
"""
STOPPED = f"""{BEGIN}
from manta.job import run_job
from manta.storage import HomeConfig

def main(config):
    number = getattr(signal, "SIG" + os.environ["NUMBER"])
    threading.Timer(4, os.kill, (os.getpid(), number)).start()
    capacity.require(3, 2.0, 0, 200, lambda line: None)

run_job(main, HomeConfig)
"""
ASKED = f"""{BEGIN}
time.sleep(1)
print(asked(), end="")
"""
AFTER = f"""{BEGIN}
for _ in range(60):
    if asked() == "[]" and sum(node["Alive"] for node in ray.nodes()) == 1:
        break
    time.sleep(1)
print("after", asked(), sum(node["Alive"] for node in ray.nodes()))
"""


@alone
@pytest.mark.long
def test_a_request_for_nodes_ends_with_its_job_however_that_ends(short: Path) -> None:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    (short / "fake.yaml").write_text(yaml.safe_dump(CLUSTER))
    script = START.replace("HEAD", FAKE_HEAD_NODE_ID)
    said = run(short, script, wait=WAIT, killed=KILLED, stopped=STOPPED, asked=ASKED, after=AFTER)
    found = dict(line.split(" ", 1) for line in said)
    assert "2 x 2 CPU wanted; the cluster has 0 CPUs" in found["line"]
    assert "its autoscaler says pending: " in found["line"]
    assert found["fits"] == "2"
    assert "num_workers=3 workers of 2 CPU each do not fit" in found["error"]
    assert "4 s have passed; its autoscaler says pending:" in found["error"]
    assert found["asked"] == "[]"
    assert found["killed"] == str([{"CPU": 2.0}] * 3).replace("'", '"')
    for number in ("TERM", "USR1", "INT"):  # the wait would have lasted 200 s
        assert found[number] == f"{128 + getattr(signal, 'SIG' + number)} 1 []"
    assert found["after"] == "[] 1"


def test_the_autoscalers_state_is_a_line_in_both_of_rays_forms() -> None:
    from ray.autoscaler._private.autoscaler import AutoscalerSummary
    from ray.autoscaler._private.load_metrics import LoadMetricsSummary

    status = ClusterStatusFormatter.format(ClusterStatus())
    assert capacity.in_short(status) == (
        "its autoscaler says pending: (no pending nodes); recent failures: (no failures)"
    )
    load = LoadMetricsSummary(
        usage={}, resource_demand=[], pg_demand=[], request_demand=[], node_types=[]
    )
    summary = AutoscalerSummary(
        active_nodes={"head": 1},
        idle_nodes={},
        pending_nodes=[("10.0.0.9", "a100x8", "waiting-for-ssh")],
        pending_launches={"a100x8": 2},
        failed_nodes=[("10.0.0.8", "a100x8")],
    )
    said = capacity.in_short(format_info_string(load, summary))
    assert "pending: a100x8, 2 launching, 10.0.0.9: a100x8, waiting-for-ssh" in said
    assert "recent failures: a100x8: NodeTerminated (ip: 10.0.0.8)" in said
    assert "only a person" in capacity.in_short("No cluster status.")
