"""`ray up clusters/local.yaml` and clusters/slurm/pretrain.sbatch on two machines with networks,
processes, homes and SSH servers of their own (helpers/hosts.py), from the start to the end.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import hosts
from helpers.common import ROOT

WHY_NOT = hosts.why_impossible()
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-"),
]
SLURM = ("slurmctld", "slurmd", "munged", "sbatch")
RUN = "num_workers=2 cpus_per_worker=1"
ADDRESSES = hosts.ADDRESSES[:2]
SSH, TOKEN = hosts.SSH, hosts.TOKEN


@pytest.fixture
def folder() -> Iterator[Path]:
    with hosts.lab_folder() as made:
        yield made


def filled_in() -> str:
    """clusters/local.yaml for the two machines, on which the environment is there already."""
    text = (ROOT / "clusters" / "local.yaml").read_text()
    for old, new in (
        ("192.0.2.10", ADDRESSES[0]),
        ("192.0.2.11", ADDRESSES[1]),
        ("ssh_user: FILL_IN", "ssh_user: root\n  ssh_private_key: /mnt/lab/key"),
        ("/FILL_IN/manta", "/mnt/lab/manta"),
    ):
        assert old in text
        text = text.replace(old, new)
    return re.sub(r"  - (python3\.11 -m venv|~/manta-venv/bin/pip) .*\n", "", text)


BEGIN = f"""
exec 2>&1
step() {{ echo "=== $1 $SECONDS"; }}
up() {{ ray up -y --no-config-cache /mnt/lab/cluster.yaml; }}
joined() {{
    for try in $(seq 90); do
        {SSH} {ADDRESSES[0]} RAY_AUTH_MODE=token manta-venv/bin/ray status \\
            > /mnt/lab/status || true
        [ "$(grep -c '^ 2 local.cluster.node' /mnt/lab/status)" = 1 ] && break
        sleep 2
    done
    grep -A2 '^Active' /mnt/lab/status
}}
reach() {{
    ray dashboard /mnt/lab/cluster.yaml > /mnt/lab/dashboard.log 2>&1 &
    for try in $(seq 60); do (: < /dev/tcp/127.0.0.1/8265) 2> /dev/null && break; sleep 1; done
}}
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
submit() {{ RAY_AUTH_MODE=token ray job submit --working-dir . -- python jobs/pretrain.py "$@"; }}
{TOKEN}
cd {ROOT}
"""
END = f"""
for address in {" ".join(ADDRESSES)}; do
    {SSH} $address 'sh ~/.manta/stop-ray.sh /tmp/manta-$USER; echo "left: $(pgrep -af session_)"'
done
step stopped
ray down -y /mnt/lab/cluster.yaml && step down
"""
UP = f"""{BEGIN}
for address in {" ".join(ADDRESSES)}; do
    {SSH} $address 'sh -c "sleep 600 # --session-dir=/tmp/ray/session_other" > /dev/null 2>&1 &'
done
python -m manta.cluster check /mnt/lab/cluster.yaml num_workers=2 && step checked
up && step up
joined && step joined
reach
submit {RUN} total_tokens=40960
step trained
{END}"""


def test_a_lab_is_brought_up_trains_on_all_machines_and_nothing_is_left(folder: Path) -> None:
    (folder / "cluster.yaml").write_text(filled_in())
    said = hosts.in_lab(folder, UP, seconds=560)
    assert "ready: /mnt/lab/cluster.yaml" in said
    assert list(hosts.seconds_of(said)) == ["checked", "up", "joined", "trained", "stopped", "down"]
    assert "2 worker(s)" in said and "starting on 2 workers" in said
    # Another Ray of the same login goes on, and of this cluster's nothing is left.
    left = re.findall(r"^left: (.*)$", said, re.MULTILINE)
    assert len(left) == 2 and all("session_other" in line for line in left)
    assert not re.search(r"/tmp/manta-root/session_", "".join(left))


EVERY = 20
LONGER = f"{RUN} total_tokens=204800 checkpoint.every={EVERY} log_every=1 eval.every=100000"
WEIGHTS = "checkpoints/step-00000100/model.safetensors"
# All of Ray on the head dies in the middle between two checkpoints, and with it the job's driver.
LOSE = f"""{BEGIN}
up && joined && step joined
reach
submit {LONGER} name=lost > /mnt/lab/first.log 2>&1 &
run=/mnt/lab/manta/runs/lost
for try in $(seq 900); do
    [ "$(cat $run/metrics.jsonl 2> /dev/null | wc -l)" -ge {EVERY * 3 // 2} ] && break
    sleep 0.2
done
{SSH} {ADDRESSES[0]} \\
    'pkill -KILL -f "[/]tmp/manta-root/|jobs/[p]retrain|[g]cs_server"' || true
step lost
tail -n 1 $run/metrics.jsonl
up && step up
joined && step again
(: < /dev/tcp/127.0.0.1/8265) 2> /dev/null || reach
submit {LONGER} name=lost > /mnt/lab/second.log 2>&1 &
for try in $(seq 900); do grep -q '^step ' /mnt/lab/second.log && break; sleep 0.2; done
step next
wait $!
step trained
submit {LONGER} name=whole > /mnt/lab/third.log 2>&1
step whole
cat /mnt/lab/second.log
sha256sum $run/{WEIGHTS} /mnt/lab/manta/runs/whole/{WEIGHTS}
{END}"""


def test_after_the_loss_of_the_head_the_same_commands_go_on(folder: Path) -> None:
    (folder / "cluster.yaml").write_text(filled_in())
    said = hosts.in_lab(folder, LOSE, seconds=590)
    steps = "joined lost up again next trained whole stopped down"
    assert list(hosts.seconds_of(said)) == steps.split()
    (last,) = (int(n) for n in re.findall(r'^\{"step": (\d+),', said, re.MULTILINE))
    (resumed,) = (int(n) for n in re.findall(r"resuming at step (\d+) .* on 2 workers", said))
    print({"steps lost": last - resumed})
    assert 0 < resumed <= last < 100 and last - resumed <= EVERY
    lost, whole = re.findall(r"^([0-9a-f]{64})  ", said, re.MULTILINE)
    assert lost == whole


SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=desk(10.99.0.1)
AuthType=auth/munge
AuthInfo=socket=/run/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=/mnt/lab/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/mnt/lab/slurmctld.log
SlurmdLogFile=/mnt/lab/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=m11 NodeAddr=10.99.0.11 CPUs=1
NodeName=m12 NodeAddr=10.99.0.12 CPUs=1
PartitionName=all Nodes=ALL Default=YES
"""
MUNGE = (
    "mkdir -p /run/munge && chmod 755 /run /run/munge && munged --force --socket=/run/munge/socket "
    "--key-file=/mnt/lab/munge.key --pid-file=/run/munge/pid --log-file=/run/munge/log "
    "--seed-file=/run/munge/seed"
)
# The signal comes when the run has trained for a while: 120 s before a limit of four minutes, so
# after two. The job is then released from the delay that Slurm gives a job that it requeues, with a
# limit that brings no second signal.
QUEUE = f"""
exec 2>&1
{TOKEN}
export SLURM_CONF=/mnt/lab/slurm.conf
{MUNGE}
slurmctld
for n in 11 12; do
    {SSH} 10.99.0.$n '{MUNGE}; SLURM_CONF=/mnt/lab/slurm.conf slurmd -N m'$n
done
cd {ROOT}
export MANTA_HOME=/mnt/lab/manta MANTA_VENV={{venv}}
sbatch --gpus-per-node=0 --time=4 --signal=B:USR1@120 --output=/mnt/lab/job.log \\
    clusters/slurm/pretrain.sbatch {RUN} total_tokens=4096000 checkpoint.every=100000
requeued() {{{{ scontrol show job 1 | grep -q 'Restarts=[1-9]'; }}}}
for try in $(seq 150); do requeued && break; sleep 2; done
scontrol update job=1 StartTime=now TimeLimit=30
trains() {{{{ sed '1,/back into the queue/d' /mnt/lab/job.log | grep -q '^step'; }}}}
for try in $(seq 100); do trains && break; sleep 2; done
scontrol show job 1 | grep -E 'JobState|Restarts' || true
scancel --batch --signal=TERM 1 || true
for try in $(seq 90); do [ -z "$(squeue -h)" ] && break; sleep 2; done
cat /mnt/lab/job.log
"""


@pytest.mark.skipif(not all(map(shutil.which, SLURM)), reason="needs Slurm and munge")
def test_slurm_signals_ahead_of_the_limit_and_the_run_saves_requeues_and_continues(
    folder: Path,
) -> None:
    (folder / "slurm.conf").write_text(SLURM_CONF)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()
    said = hosts.in_lab(folder, QUEUE.format(venv=hosts.VENV), seconds=800)
    saved = [int(n) for n in re.findall(r"stopped at step (\d+); the same command", said)]
    assert "Restarts=1" in said and "USR1: the run saves and ends" in said
    assert "saved; back into the queue" in said
    assert len(saved) == 2 and saved[1] > saved[0] > 0
    assert f"resuming at step {saved[0]} " in said.split("back into the queue")[1]
    assert said.count("back into the queue") == 1  # TERM ends it for good
