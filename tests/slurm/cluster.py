"""A real SLURM on this machine: one munged, one slurmctld and a few slurmd, all on loopback, all state in one folder.

    python -m tests.slurm.cluster up --nodes 3      # prints the line that makes sbatch, squeue ... talk to it
    python -m tests.slurm.cluster down              # ends what `up` started, and only that

Debian's packages are installed if they are missing, which is one reason why it wants root; that slurmd starts the
tasks of any user is the other. Ports are chosen free. Nothing outside the folder is written: several nodes of one host
need no names in /etc/hosts, because `NodeAddr` says where each one listens.

Times are short, so that a test sees in seconds what a cluster does in minutes: a node whose daemon is gone is down
after about 30 s, a requeued job starts again after 10 s.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
KILL_WAIT_SECONDS = 30  # between SIGTERM and SIGKILL
GRACE_SECONDS = 60  # that a preempted job of the partition `spot` has
_START_SECONDS = 60
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_SLURM_CONF = """\
ClusterName=unmask
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
# A requeued job may start again once its old credential has expired: 10 s instead of 120.
AuthInfo=socket={folder}/munge/socket,cred_expire=10
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
# No cgroups and no accounting: containers and virtual machines often have neither.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000,bf_interval=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=15
KillWait={kill_wait}
MinJobAge=900
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 MaxTime=60 State=UP
PartitionName=spot Nodes=ALL PriorityTier=1 GraceTime={grace} MaxTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


class Cluster:
    """The cluster whose files are in `folder`. `up` and `down` may be called again at any time."""

    def __init__(self, folder: Path, *, nodes: int = 3, cpus: int = 4) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self._cpus = cpus

    @property
    def environment(self) -> dict[str, str]:
        """This process' environment, with the variables that make SLURM's commands talk to this cluster."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def up(self) -> None:
        install()
        for name in ("run", "log", "state", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o711)  # munged refuses a folder that others may write
        if not self._is_running("slurmctld"):  # a running one keeps the ports that it has
            self._write_configuration()
        self._start_munged()
        self._start("slurmctld", ["slurmctld", "-i"])
        for node in self.nodes:
            self.start_node(node)
        self._wait_until_idle()

    def down(self) -> None:
        """End the jobs, then the daemons, each by its recorded process id."""
        if self._is_running("slurmctld"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.run("scancel", "--user=root", timeout=20)
                self.wait_for(lambda: not self.run("squeue", "--noheader").strip(), seconds=20, quiet=True)
        for name in (*self.nodes, "slurmctld", "munged"):
            self._end(name, signal.SIGTERM)
        for node in self.nodes:
            self._kill_jobs(node)

    def start_node(self, node: str) -> None:
        """Start the slurmd of `node` if it is not running; one that was down comes back by itself."""
        self._start(node, ["slurmd", "-N", node])

    def kill_node(self, node: str) -> None:
        """The daemon and everything that it started die at once, as if the power had failed."""
        self.kill_daemon(node)
        self._kill_jobs(node)

    def kill_daemon(self, node: str) -> None:
        """Only slurmd dies; what it started lives on."""
        pid = self._pid(node)
        assert pid is not None, f"{node} is not running"
        os.kill(pid, signal.SIGKILL)

    def run(self, *command: str, timeout: float = 60, check: bool = True) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(
            command, env=self.environment, text=True, capture_output=True, timeout=timeout, check=False
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def wait_for(self, condition: object, *, seconds: float, quiet: bool = False) -> bool:
        """Until `condition()` is true; an error after `seconds`, unless `quiet`."""
        assert callable(condition)
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                if quiet:
                    return False
                raise TimeoutError(f"not so after {seconds:g} s\n{self.run('squeue', '--long', check=False)}")
            time.sleep(0.5)
        return True

    # --- daemons -----------------------------------------------------------------------------------------------------

    def _write_configuration(self) -> None:
        controller_port, *node_ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={self._cpus} ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"
            for node, port in zip(self.nodes, node_ports, strict=True)
        )
        text = _SLURM_CONF.format(
            host=host,
            controller_port=controller_port,
            folder=self.folder,
            kill_wait=KILL_WAIT_SECONDS,
            grace=GRACE_SECONDS,
            nodes=nodes,
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start_munged(self) -> None:
        munge, key = self.folder / "munge", self.folder / "munge" / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(1024))
        files = {"socket": munge / "socket", "key-file": key, "seed-file": munge / "seed"}
        files |= {"pid-file": self.folder / "run" / "munged.pid", "log-file": self.folder / "log" / "munged.log"}
        self._start("munged", ["munged", "--force", *(f"--{name}={path}" for name, path in files.items())])

    def _start(self, name: str, command: Sequence[str]) -> None:
        if self._is_running(name):
            return
        self._pid_file(name).unlink(missing_ok=True)
        started = subprocess.run(command, env=self.environment, text=True, capture_output=True, check=False)
        # A daemon forks before it has bound its port: only a process that stays has started.
        if started.returncode != 0 or not self.wait_for(lambda: self._is_running(name), seconds=20, quiet=True):
            log = self.folder / "log" / f"{name}.log"
            last = log.read_text().splitlines()[-5:] if log.exists() else []
            raise RuntimeError("\n".join([f"{name} did not start: {started.stderr}", *last]))

    def _end(self, name: str, number: signal.Signals) -> None:
        pid = self._pid(name)
        if pid is None:
            return
        os.kill(pid, number)
        if not self.wait_for(lambda: self._pid(name) is None, seconds=10, quiet=True):
            os.kill(pid, signal.SIGKILL)

    def _kill_jobs(self, node: str) -> None:
        """What outlives the daemon of a node: first the step daemons, which would report, then the jobs' processes."""
        log = str(self.folder / "log" / f"{node}.log")  # which a step daemon has open
        mine = {f"SLURM_CONF={self.folder / 'slurm.conf'}".encode(), f"SLURMD_NODENAME={node}".encode()}
        steps, others = [], []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if any(os.readlink(descriptor) == log for descriptor in (process / "fd").iterdir()):
                    steps.append(int(process.name))
                elif mine <= set((process / "environ").read_bytes().split(b"\0")):
                    others.append(int(process.name))
        for pid in (*steps, *others):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_running(self, name: str) -> bool:
        return self._pid(name) is not None

    def _pid(self, name: str) -> int | None:
        """The process in the pid file, if it is there and really that daemon: process ids come round again."""
        program = name if name in ("munged", "slurmctld") else "slurmd"
        try:
            pid = int(self._pid_file(name).read_text())
            executable = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
        except (OSError, ValueError):
            return None
        return pid if Path(executable).name.removesuffix("-wlm") == program else None

    def _pid_file(self, name: str) -> Path:
        return self.folder / "run" / f"{name}.pid"

    def _wait_until_idle(self) -> None:
        def ready() -> bool:
            states = dict(line.split() for line in self.run("sinfo", "-hNo", "%N %T", check=False).splitlines())
            for node in self.nodes:
                if states.get(node, "").startswith(("down", "drain")):
                    self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            usable = ("idle", "mixed", "allocated", "completing")
            return all(states.get(node) in usable for node in self.nodes)

        self.wait_for(ready, seconds=_START_SECONDS)


def install() -> None:
    """Install Debian's packages unless the programs are there; `RuntimeError` with the reason if that cannot be."""
    if all(shutil.which(program, path=_PATH) for program in PROGRAMS) and os.geteuid() == 0:
        return
    if os.geteuid() != 0:
        raise RuntimeError("slurmd and apt-get want root; run this as root, in a container for example")
    if shutil.which("apt-get") is None:
        raise RuntimeError(f"{', '.join(PROGRAMS)} are not all there and neither is apt-get; install SLURM yourself")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *command], env=environment, text=True, capture_output=True, timeout=300, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"apt-get {' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel hands out by itself (32768 and up)."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32000), k=1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free ports between 20000 and 32000")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="number of slurmd (3)")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "unmask-slurm", help="where everything is kept"
    )
    options = parser.parse_args(argv)
    cluster = Cluster(options.folder, nodes=options.nodes)
    if options.action == "down":
        cluster.down()
        return 0
    cluster.up()
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
