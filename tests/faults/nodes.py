"""A driver on a cluster of several nodes on this machine, one of which leaves while it trains, or
is warned that it may; or on one node, with another that joins.

    python tests/faults/nodes.py name=... [key=value ...] event=kill|term|drain|stop|warn|come

test_nodes.py runs it in a process of its own, because it has a Ray of its own.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve()
RAY = str(Path(sys.executable).with_name("ray"))
sys.path[:0] = [str(HERE.parents[2] / "platform")]


def main(arguments: list[str]) -> int:
    # A process with a Ray of its own, as pytest's, has children that start no nodes for others.
    os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    import ray
    from ray.cluster_utils import Cluster
    from ray.experimental import internal_kv

    from manta import config
    from manta.cluster import capacity, connection, spot
    from manta.train.pretrain import pretrain
    from manta.train.settings import PretrainConfig

    event = next(a.partition("=")[2] for a in arguments if a.startswith("event="))
    recipe = str(HERE.parents[2] / "jobs" / "configs" / "quickstart.yaml")  # like jobs/pretrain.py
    given = [a for a in arguments if not a.startswith("event=")]
    c = config.load(PretrainConfig, [recipe, *given])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    names = ["one"] if event == "come" else ["one", "two"]
    # Kubernetes starts a node with this command, and ends it by its SIGTERM.
    block = [RAY, "start", "--address", made.address, "--num-cpus=1", "--block", "--node-name"]
    blocking: dict[str, subprocess.Popen[bytes]] = {}
    nodes = [made.add_node(num_cpus=1, node_name=n) for n in names if event != "stop"]
    os.environ["RAY_ADDRESS"] = made.address
    connection.connect()
    for n in names if event == "stop" else []:
        blocking[n] = subprocess.Popen([*block, n], stdout=subprocess.DEVNULL)
        capacity.require(len(blocking), 1, 0, 90, print)

    begun = threading.Event()

    def say(line: str) -> None:
        print(line, flush=True)
        if line.startswith("step 60/") and not begun.is_set():
            begun.set()
            threading.Thread(target=come if event == "come" else go, daemon=True).start()

    def come() -> None:
        # (A node's constructor sets a signal handler, which only the main thread may.)
        ray._private.utils.set_sigterm_handler = lambda handler: None
        made.add_node(num_cpus=1)
        print("come: another node", flush=True)
        threading.Event().wait()  # (a node ends with the thread that started it)

    def go() -> None:
        """Makes the worker's node leave, in the way that `event` names, or warns it."""
        busy = {
            node["NodeID"]: node["NodeName"]
            for node in ray.nodes()
            if node["Alive"]
            and node["Resources"].get("CPU")
            and not ray._private.state.available_resources_per_node()[node["NodeID"]].get("CPU")
        }
        node_id, name = next(iter(busy.items()))
        print(f"{event}: the node of the worker", flush=True)
        if event == "stop":
            blocking[name].terminate()
            return
        if event == "warn":
            at = {"namespace": spot.WARNINGS}
            internal_kv._internal_kv_put(node_id, "a recommendation to rebalance", **at)
            return
        if event == "drain":
            command = [
                RAY, "drain-node", "--address", made.address,
                "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message", "a spot machine is wanted back",
                "--deadline-remaining-seconds", "30",
            ]  # fmt: skip
            subprocess.run(command, check=True)
            return
        node = next(n for n in nodes if n.node_id == node_id)
        raylet = node.all_processes["raylet"][0].process
        os.kill(raylet.pid, signal.SIGKILL if event == "kill" else signal.SIGTERM)

    try:
        done = pretrain(c, say)
        print(f"ended at step {done.state.step}", flush=True)
    finally:
        ray.shutdown()
        made.shutdown()
        for process in blocking.values():
            process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
