"""A real SLURM cluster of two nodes on this machine, in a temporary folder: slurmctld and two
slurmd."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
FAILED = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}
CPUS = 4  # of each node, for SLURM; the machine may have fewer

# The nodes' names are addresses of this machine, so that they resolve wherever the tests run.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
SchedulerParameters=bf_interval=1,sched_interval=5,batch_sched_delay=0
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:8
"""


def missing() -> str | None:
    """Why there can be no cluster here; None when there can be one."""
    absent = [program for program in PROGRAMS if _find(program) is None]
    return f"no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)" if absent else None


class Job:
    """What `scontrol show job` says."""

    def __init__(self, cluster: Cluster, job_id: str) -> None:
        self.cluster, self.id = cluster, job_id

    def facts(self) -> dict[str, str]:
        """Its fields. Of an array, those of an element that has an id of its own: N_0."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id).splitlines()[0]
        return dict(re.findall(r"(\w+)=(.*?)(?= [\w:/]+=|\s*$)", text))  # values may hold spaces

    def wait(self, *states: str, timeout_s: float = 100) -> dict[str, str]:
        """Wait until the job is in one of the states, without any given until it has ended; what it
        is then."""
        wanted = set(states) or {"COMPLETED", *FAILED}
        return self.until(lambda facts: facts["JobState"] in wanted, timeout_s)

    def until(
        self, condition: Callable[[dict[str, str]], bool], timeout_s: float = 100
    ) -> dict[str, str]:
        """Ask until the condition holds for what the job is then. The job must not fail before."""
        end = time.monotonic() + timeout_s
        # one question for both: the job may end between two
        while not condition(facts := self.facts()):
            assert facts["JobState"] not in FAILED, f"{facts}\n{self.log()}"
            assert time.monotonic() < end, f"{facts}\n{self.log()}\n{self.cluster.logs()}"
            time.sleep(0.05)
        return facts

    def log(self) -> str:
        """Its output so far."""
        file = Path(self.facts()["StdOut"])
        return file.read_text() if file.exists() else ""


class Cluster:
    """Two nodes that run jobs. `close` ends all daemons, whatever happened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool-127.0.0.1", "spool-127.0.0.2"):
            (folder / name).mkdir()
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                folder=folder,
                ports=_free_ports(3),
                cpus=CPUS,
                user=getpass.getuser(),
            )
        )
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        unwanted = re.compile("SLURM|SBATCH|RANK$|WORLD_SIZE$|MASTER_|TORCHELASTIC")
        self.environment = {
            name: value for name, value in os.environ.items() if not unwanted.search(name)
        }
        self.environment |= {"SLURM_CONF": str(configuration), "PATH": path, "OMP_NUM_THREADS": "1"}
        try:
            self._start("slurmctld", "-D", "-i")
            for node in ("127.0.0.1", "127.0.0.2"):
                self._start("slurmd", "-D", "-N", node)
            self._wait_for_nodes()
        except BaseException:
            self.close()
            raise

    def run(self, *command: str, folder: Path | None = None, code: int = 0) -> str:
        """The output of a command that must end with `code`."""
        done = self._do(command, folder, {})
        assert done.returncode == code, (
            f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout + done.stderr

    def submit(self, *arguments: str, folder: Path, **variables: str) -> Job:
        """`sbatch` with these arguments from this folder, and these variables set."""
        done = self._do(["sbatch", "--parsable", *arguments], folder, variables)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip())

    def logs(self) -> str:
        """The end of what the daemons wrote."""
        return "\n".join(
            f"{file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log"))
        )

    def close(self) -> None:
        """End all daemons, and all that they have started. Nothing of it is needed again."""
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        while started := self._started():
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)

    def _do(
        self, command: Sequence[str], folder: Path | None, variables: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    def _start(self, *command: str) -> None:
        program = _find(command[0])
        assert program is not None
        self._daemons.append(
            subprocess.Popen(
                [program, *command[1:]],
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def _wait_for_nodes(self) -> None:
        end = time.monotonic() + 30
        while True:
            done = self._do(["sinfo", "--noheader", "--format=%T"], None, {})
            if done.stdout.split() == ["idle"]:
                return
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not dead, f"{dead}\n{self.logs()}"
            assert time.monotonic() < end, f"{done.stdout}{done.stderr}\n{self.logs()}"
            time.sleep(0.05)

    def _started(self) -> list[int]:
        """The processes that have this cluster's configuration: steps live on without slurmd, until
        they end."""
        mark, found = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it is gone, or somebody else's
                if (
                    mark in (process / "environ").read_bytes().split(b"\0")
                    and int(process.name) != os.getpid()
                ):
                    found.append(int(process.name))
        return found


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has now; the kernel would not choose them, as they are below the range of
    its own choices."""
    found: list[int] = []
    candidate = 30000 + os.getpid() % 2000
    while len(found) < count:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
                found.append(candidate)
            except OSError:
                pass
        candidate += 1
    return found
