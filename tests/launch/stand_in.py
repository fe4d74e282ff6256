"""Stands in for training.pretrain where the launch script is under test: says who it is, and stops the way a run does.

It is copied into a temporary project and never imported from here. `--seconds S` runs that long, `--collective` adds
up the ranks, `--die` kills rank 1 as the kernel does when memory runs out. Files go to $STAND_IN_OUT: `rank-R.jsonl`
gets a line per start of rank R; `saved-R` says that a signal stopped it, `done-R` that it finished.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

SHOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")
EXIT_SAVED = 75


def main() -> None:
    """Record this start, then finish, or save and exit with 75 on USR1 or TERM."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signal.signal(signal.SIGUSR1, remember)
    signal.signal(signal.SIGTERM, remember)
    out, rank = Path(os.environ["STAND_IN_OUT"]), os.environ.get("RANK", "0")
    record = {
        "arguments": sys.argv[1:],
        "environment": {name: os.environ.get(name) for name in SHOWN},
        "python": sys.executable,
        "path": os.environ["PATH"].split(os.pathsep)[0],
        "directory": os.getcwd(),
        "pid": os.getpid(),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }
    if "--collective" in sys.argv:
        record["sum"] = _sum_of_ranks()
    with (out / f"rank-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    if "--die" in sys.argv and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    seconds = float(sys.argv[sys.argv.index("--seconds") + 1]) if "--seconds" in sys.argv else 0.0
    end = time.monotonic() + (0.0 if record["restarts"] else seconds)  # a restarted run has only a little left to do
    while time.monotonic() < end:
        time.sleep(0.05)
        if received:
            (out / f"saved-{rank}").write_text(str(received))
            sys.exit(EXIT_SAVED)
    (out / f"done-{rank}").touch()


def _sum_of_ranks() -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return total.item()


if __name__ == "__main__":
    main()
