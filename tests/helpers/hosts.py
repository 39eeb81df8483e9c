"""Machines of a lab on this one: each has its own network, processes, /tmp, home and sshd.

Everything is in namespaces, and ends and disappears with the command that made it. It needs root.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from helpers.common import ROOT

ADDRESSES = ["10.99.0.11", "10.99.0.12", "10.99.0.13"]
SSH = "ssh -i /mnt/lab/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
TOKEN = "ray get-auth-token --generate > /dev/null; chmod 600 ~/.ray/auth_token"
VENV = Path(sys.executable).parents[1]
ALONE = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]

# The machine on which a person types is 10.99.0.1, in the network that all of them share. The
# folder of the lab is /mnt/lab on each machine, and stands for a shared file system.
NETWORK = f"""
hostname desk
mount -t tmpfs tmpfs /mnt && mkdir /mnt/lab /mnt/home && mount --bind "$PWD" /mnt/lab && cd /mnt/lab
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /tmp
printf "127.0.0.1 localhost\\n10.99.0.1 desk\\n" > /run/hosts
printf "10.99.0.%d m%d\\n" 11 11 12 12 13 13 >> /run/hosts
mount --bind /run/hosts /etc/hosts
ip link set lo up
ip link add br0 type bridge && ip addr add 10.99.0.1/24 dev br0 && ip link set br0 up
ip route add default dev br0
for address in {" ".join(ADDRESSES)}; do
    n=${{address##*.}}
    ip netns add m$n
    ip link add v$n type veth peer name e$n netns m$n && ip link set v$n master br0 up
    ip -n m$n link set lo up && ip -n m$n link set e$n up
    ip -n m$n addr add $address/24 dev e$n && ip -n m$n route add default dev e$n
    ip netns exec m$n unshare --uts --pid --mount --fork --kill-child --mount-proc \\
        bash machine.sh m$n > m$n.log 2>&1 &
    echo $! > m$n.pid
done
"""

MACHINE = """
set -e
hostname $1
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /mnt/home
sed "s,^root:.*,root:x:0:0:root:/mnt/home:/bin/bash," /etc/passwd > /run/passwd
mount --bind /run/passwd /etc/passwd
mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm
ln -s {venv} /mnt/home/manta-venv
exec /usr/sbin/sshd -D -e -f sshd_config
"""

WAIT = f"""
for address in {" ".join(ADDRESSES)}; do
    for try in $(seq 100); do (: < /dev/tcp/$address/22) 2> /dev/null && break; sleep 0.2; done
done
"""

SSHD = """
Port 22
HostKey /mnt/lab/host_key
AuthorizedKeysFile /mnt/lab/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""


def why_impossible() -> str:
    """What this machine lacks to have such machines; empty if nothing."""
    if missing := [name for name in ("unshare", "ip", "ssh-keygen", "rsync") if not found(name)]:
        return f"needs {', '.join(missing)}"
    if not Path("/usr/sbin/sshd").exists():
        return "needs sshd (apt-get install openssh-server)"
    if os.getuid() != 0:
        return "needs root, to mount folders for each machine"
    try_it = [*ALONE, "sh", "-c", "ip link add br0 type bridge"]
    done = subprocess.run(try_it, capture_output=True, text=True, check=False)
    return f"needs namespaces: {done.stderr.strip()}" if done.returncode else ""


def found(program: str) -> bool:
    return shutil.which(program) is not None


@contextlib.contextmanager
def lab_folder() -> Iterator[Path]:
    """A folder for a lab, outside /tmp's long paths of pytest: sockets have short ones."""
    made = Path(tempfile.mkdtemp(prefix="lab", dir="/var/tmp"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def seconds_of(said: str) -> dict[str, int]:
    """The seconds after the start at which a script had done each of its steps; it prints a line
    `=== NAME $SECONDS` after each."""
    found = {name: int(at) for name, at in re.findall(r"^=== (\w+) (\d+)$", said, re.MULTILINE)}
    print(found)
    return found


def in_lab(folder: Path, script: str, seconds: int) -> str:
    """What a shell script prints that runs on the person's machine, while the others run.

    `folder` has a short path and becomes /mnt/lab on the machines; `key` in it lets the script in.
    """
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    (folder / "machine.sh").write_text(MACHINE.format(venv=VENV))
    (folder / "sshd_config").write_text(SSHD)
    (folder / "home").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))}
    env = {
        **kept,
        "HOME": "/mnt/lab/home",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT / "platform"),
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
    }
    command = [*ALONE, "bash", "-ec", f"{NETWORK}\n{WAIT}\n{script}"]
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout
