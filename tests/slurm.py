"""A real Slurm of this machine's own: two nodes of 4 cores and 2 make-believe GPUs each, from Debian's packages.

    python tests/slurm.py bash        starts it, runs a command in its midst, and ends it
    python tests/slurm.py --install   installs the packages

Its files are in a folder of its own, its daemons have ports and a munge socket of their own, and each is ended by its
process id. Nodes are called 127.0.0.1 and 127.0.0.2, so that their names lead to this machine.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = ("slurm-wlm", "munge")
NODES = ("127.0.0.1", "127.0.0.2")
_PLACES = ("/usr/sbin", "/usr/bin")

_CONF = """\
ClusterName=llmkit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
FirstJobId={first_job}
KillWait=60
KillOnBadExit=1
{nodes}PartitionName=gpu Nodes=127.0.0.[1-2] Default=YES MaxTime=1:00:00 State=UP
PartitionName=cpu Nodes=127.0.0.2 MaxTime=1:00:00 State=UP
"""
_NODE = "NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} CPUs=4 RealMemory=4000 Gres=gpu:2\n"


class NoSlurm(Exception):
    """Slurm cannot be installed or started here, and why."""


def missing() -> list[str]:
    """The programs that are not there."""
    return [name for name in PROGRAMS if _find(name) is None]


def install() -> None:
    """Installs Debian's packages, where that is possible without a word: as root, in a container. Raises NoSlurm."""
    from filelock import FileLock

    with FileLock(Path(tempfile.gettempdir()) / "llmkit-slurm.lock"):  # two workers of pytest come here
        lacking = missing()
        if not lacking:
            return
        if os.geteuid() != 0 or shutil.which("apt-get") is None or Path("/run/systemd/system").exists():
            hint = f"install {' and '.join(PACKAGES)} (python tests/slurm.py --install)"
            raise NoSlurm(f"no {', '.join(lacking)}; {hint}")
        _apt_get()


def _apt_get() -> None:
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # of which no package starts its daemons
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-q", *words], env=env, capture_output=True, text=True, timeout=600)
        if done.returncode and words[0] == "install":
            raise NoSlurm(f"apt-get: {(done.stderr or done.stdout).strip()[-300:]}")


@contextmanager
def slurm(seconds: float = 300) -> Iterator[dict[str, str]]:
    """A cluster while entered; gives the environment that Slurm's commands need to find it. Raises NoSlurm."""
    lacking = missing()
    if lacking:
        raise NoSlurm(f"no {', '.join(lacking)}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path is short
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        _configure(folder)
        munge = [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
        munge += [f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"]
        _start(stack, folder, env, ["munged", "--force", "--foreground", *munge])
        _wait(lambda: (folder / "munge.socket").exists(), seconds, folder, "munged")
        _start(stack, folder, env, ["slurmctld", "-D"])
        for node in NODES:
            _start(stack, folder, env, ["slurmd", "-D", "-N", node])
        stack.callback(_end_jobs, env)
        _wait(lambda: _idle(env) == len(NODES), seconds, folder, "slurmctld and slurmd")
        yield env


def _configure(folder: Path) -> None:
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    ports = _free_ports(1 + len(NODES))
    host = socket.gethostname().partition(".")[0]
    nodes = "".join(_NODE.format(node=node, host=host, port=port) for node, port in zip(NODES, ports[1:], strict=True))
    first = random.randrange(1, 60_000)  # a training's port comes from its job's number: two clusters do not share it
    about = {"user": getpass.getuser(), "host": host, "controller_port": ports[0], "nodes": nodes, "first_job": first}
    conf = _CONF.format(folder=folder, **about)
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    for number in range(2):
        (folder / f"gpu{number}").touch()
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # of which nothing is used


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))


def _start(stack: ExitStack, folder: Path, env: dict[str, str], command: Sequence[str]) -> None:
    """Starts a daemon that ends, at the latest, with the stack."""
    program = _find(command[0])
    assert program is not None
    with (folder / f"{command[0]}.out").open("ab") as out:
        process = subprocess.Popen(
            [program, *command[1:]],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=_end_with_parent,
        )
    stack.callback(_end, process)


def _end_with_parent() -> None:
    """The kernel ends the daemon when this process is killed and cannot."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_jobs(env: dict[str, str]) -> None:
    """Cancels all jobs and waits for them: their processes are not children of ours."""
    subprocess.run(["scancel", "--user", str(os.geteuid())], env=env, capture_output=True, timeout=120)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and _said(env, "squeue", "--noheader"):
        time.sleep(0.2)


def _idle(env: dict[str, str]) -> int:
    return _said(env, "sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%t").split().count("idle")


def _said(env: dict[str, str], *command: str) -> str:
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def _wait(done, seconds: float, folder: Path, what: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            said = [line for path in sorted(folder.glob("*.out")) for line in path.read_text().splitlines()[-3:]]
            raise NoSlurm(f"{what} did not come up: " + "; ".join(said)[-500:])
        time.sleep(0.1)


def main() -> int:
    """Runs a command in the midst of a Slurm; gives its exit code."""
    if sys.argv[1:] == ["--install"]:
        _apt_get()
        return 0
    with slurm() as env:
        return subprocess.run(sys.argv[1:] or ["bash"], env=env).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NoSlurm as why:
        sys.exit(f"no Slurm: {why}")
