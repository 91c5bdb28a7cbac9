"""A real Slurm on two hosts made of network namespaces, with a munge of its own; started here, ended by process id."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from cluster_hosts import SUBNET, SWITCH, Host, Network, environment

PORT = 17_000
CONFIGURATION = """\
ClusterName=dmpo
SlurmctldHost=ctl({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/m.sock
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    """Why Slurm cannot be started here; None where it can."""
    lacking = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    return f"{', '.join(lacking)} not on PATH (Debian: slurm-wlm, munge)" if lacking else None


class Slurm:
    """Two nodes with one CPU each; ``client`` is where its commands run."""

    def __init__(self, network: Network) -> None:
        self.folder = network.folder / "slurm"
        self.client = Host(network, "ctl", f"{SUBNET}.{SWITCH}", network.switch)
        self.env = environment(SLURM_CONF=str(self.folder / "slurm.conf"))
        self._write(nodes := {name: network.host(name) for name in ("n1", "n2")})
        self._munge()
        self._daemon(self.client, "slurmctld")
        for host in nodes.values():
            self._daemon(host, "slurmd")
        self._wait_for_nodes()

    def close(self) -> None:
        """End munge; the hosts end with their network."""
        self._munged.terminate()
        self._munged.wait(timeout=20)

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        return self.client.run(*command, env=self.env)

    def state(self, job: str) -> str:
        """Slurm's word for a job; empty when it has left the queue."""
        return self.run("squeue", "--noheader", "--jobs", job, "--format=%T").stdout.strip()

    def _write(self, hosts: dict[str, Host]) -> None:
        for name in ("state", "munge", *(f"spool-{host}" for host in hosts)):
            (self.folder / name).mkdir(parents=True)
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr={host.address} Port={PORT + 1} CPUs=1 RealMemory=4000"
            for name, host in hosts.items()
        ]
        text = CONFIGURATION.format(
            controller=self.client.address, port=PORT, folder=self.folder, nodes="\n".join(lines)
        )
        (self.folder / "slurm.conf").write_text(text)

    def _munge(self) -> None:
        place = self.folder / "munge"
        key = place / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        options = {"key-file": key, "socket": place / "m.sock", "pid-file": place / "pid", "log-file": place / "log",
                   "seed-file": place / "seed"}  # fmt: skip
        command = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in options.items())]
        self._munged = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _until(lambda: (place / "m.sock").exists(), "munged did not start", place / "log")

    def _daemon(self, host: Host, program: str) -> None:
        host.start(program, "-D", log=f"slurm/{program}-{host.name}.out", env=self.env)

    def _wait_for_nodes(self) -> None:
        def idle() -> bool:
            return self.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split() == ["idle", "idle"]

        _until(idle, "the two nodes did not become idle", self.folder / "slurmctld.log")


def _until(ready, failure: str, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        shown = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        assert time.monotonic() < deadline, f"{failure}\n{shown}"
        time.sleep(0.5)
