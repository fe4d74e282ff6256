"""A handle on a real SLURM cluster that launch/cluster/cluster.sh started on this machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.launch.project import ROOT, launch_environment, wait_until

SCRIPT = ROOT / "launch/cluster/cluster.sh"
# Loop mode: the names of the nodes do not resolve, and the ranks meet on the loopback device.
LOOP_ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}


class SlurmCluster:
    """Submits, signals and watches jobs; client calls are bounded, since they retry a dead controller for minutes."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = launch_environment(folder / "out") | environment | {"SLURM_CONF": str(folder / "slurm.conf")}

    def client(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """Run a SLURM client command and return what it prints.

        Raises:
            AssertionError: it failed, with its error output.
        """
        env = self.environment | environment
        result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, log: Path, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """`sbatch` with the given arguments; returns the job id."""
        return self.client("sbatch", "--parsable", "--output", log, *command, cwd=cwd, **environment).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState."""
        match = re.search(rf"\b{name}=(\S*)", self.client("scontrol", "show", "job", job))
        assert match is not None, f"job {job} has no field {name}"
        return match[1]

    def wait_ended(self, job: str, log: Path, timeout_s: float) -> str:
        """Wait until the job is over and return its state.

        Raises:
            AssertionError: not within `timeout_s`; the message has the job's and the daemons' logs.
        """
        try:
            wait_until(lambda: self.field(job, "JobState") in ENDED, timeout_s, f"job {job} over")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs(log)}") from None
        return self.field(job, "JobState")

    def logs(self, job_log: Path) -> str:
        """The job's output and the tails of the daemons' logs, for failure messages."""
        tails = [f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted((self.folder / "log").glob("*.log"))]
        return "\n".join([job_log.read_text() if job_log.exists() else "no job output", *tails])


def control(*arguments: str | Path, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Call cluster.sh; output goes through files, as its daemons inherit the streams and would keep a pipe open."""
    log = Path(arguments[1]).with_suffix(".control.log")
    with log.open("w+") as file:
        result = subprocess.run(
            [SCRIPT, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=timeout_s, check=False
        )
        file.seek(0)
        return subprocess.CompletedProcess(result.args, result.returncode, file.read(), "")
