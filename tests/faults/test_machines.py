"""Machines that leave while a run trains on them, each with an address of its own: one is called
back with notice, one loses its power. Another one joins in its place.
"""

import re
from collections.abc import Callable

import pytest

from faults.jobs import last_step
from helpers import hosts
from helpers.common import ROOT

WHY_NOT = hosts.why_impossible()
EVERY = 20
STEPS = 160
WEIGHTS = f"checkpoints/step-{STEPS:08d}/model.safetensors"
# The head is on the person's machine and has no CPUs for workers. The machine without power says
# nothing more: its cable is pulled before its processes are killed.
SCRIPT = f"""
exec 2>&1
step() {{ echo "=== $1 $SECONDS"; }}
{hosts.TOKEN}
export RAY_AUTH_MODE=token RAY_ADDRESS=10.99.0.1:6379 MANTA_HOME=/mnt/lab/manta
ray start --head --port=6379 --node-ip-address=10.99.0.1 --num-cpus=0 --disable-usage-stats
join() {{
    {hosts.SSH} 10.99.0.$1 'mkdir -p .ray && cp /mnt/lab/home/.ray/auth_token .ray &&
        RAY_AUTH_MODE=token manta-venv/bin/ray start --address=10.99.0.1:6379 \\
        --node-ip-address=10.99.0.'$1' --num-cpus=1 --disable-usage-stats > /dev/null < /dev/null'
}}
train() {{
    python {ROOT}/jobs/pretrain.py num_workers=2 cpus_per_worker=1 threads_per_worker=1 \\
        total_tokens={STEPS * 1024} tokens_per_batch=1024 init.bigram_steps=0 log_every=1 \\
        checkpoint.every={EVERY} eval.every=100000 eval.tokens=2048 sample.prompts=[] \\
        wait_seconds=120 "$@"
}}
reached() {{
    for try in $(seq 1500); do
        awk -v n=$1 -v step=$2 '/^resuming at step/ {{ k++ }}
            /^step .* loss/ && k >= n && 0 + $2 >= step {{ found = 1 }} END {{ exit !found }}' \\
            /mnt/lab/run.log && return
        sleep 0.2
    done
    cat /mnt/lab/run.log
    return 1
}}
join 11
join 12
node=$(python -c 'import ray; ray.init(log_to_driver=False); print(next(
    n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == "10.99.0.12"))' | tail -n 1)
step joined
train name=machines > /mnt/lab/run.log 2>&1 &
job=$!
reached 0 1
join 13
step spare
ray drain-node --address $RAY_ADDRESS --node-id $node --deadline-remaining-seconds 30 \\
    --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "a spot machine is wanted back"
step drained
reached 1 1
step moved
reached 1 110
ip link set v13 down
kill -KILL $(cat /mnt/lab/m13.pid)
step lost
join 12
step replaced
reached 2 1
step resumed
wait $job
step trained
train name=whole > /mnt/lab/whole.log 2>&1
step whole
cat /mnt/lab/run.log
sha256sum $MANTA_HOME/runs/machines/{WEIGHTS} $MANTA_HOME/runs/whole/{WEIGHTS}
"""


@pytest.mark.faults
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
def test_a_run_goes_on_on_other_machines(note: Callable[..., None]) -> None:
    with hosts.lab_folder() as folder:
        said = hosts.in_lab(folder, SCRIPT, seconds=590)
    at = hosts.seconds_of(said)
    lines = said.splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("resuming at step ")]
    resumed = [int(lines[i].split()[3]) for i in places]
    drained, killed = (last_step(lines[:i]) - step for i, step in zip(places, resumed, strict=True))
    print({"steps lost": (drained, killed)})
    assert drained == 0 and killed <= EVERY
    found, whole = re.findall(r"^([0-9a-f]{64})  ", said, re.MULTILINE)
    assert found == whole
    what = "Ray's notice that a machine is to go, of three with addresses of their own"
    note(what, "saved, and started again on another", 0, at["moved"] - at["drained"], "identical")
    what = "a machine loses its power, and another one joins"
    took = at["resumed"] - at["lost"]
    note(what, "started again on the other", killed, took, "identical")
