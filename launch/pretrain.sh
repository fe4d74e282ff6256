#!/usr/bin/env bash
# Starts a pretraining run. This one file is a bash script, a SLURM batch script and a Python program, because every launcher
# reads it in its own language (`deepspeed launch/pretrain.sh` executes it with Python):
#
#   bash launch/pretrain.sh [--config FILE] [section.key=value ...]     one host; NPROC=2 bash ... for two processes
#   deepspeed [--num_gpus N] launch/pretrain.sh ...                     one host, or the hosts of a hostfile
#   torchrun --nproc-per-node N launch/pretrain.sh ...
#   sbatch [--nodes N --ntasks-per-node GPUS --gpus-per-node GPUS] launch/pretrain.sh ...
#   srun python launch/pretrain.sh ...                                  inside an allocation
#
# USR1 or TERM: the run saves and exits with 75; under SLURM the job is then requeued and resumes from its checkpoint.
# A lost rank or a hang: the run is started again from its newest checkpoint, at most RESTARTS times (default 3; docs/multi_node.md).
# CONTAINER='apptainer exec --nv image.sif' (or the like) runs the ranks of a SLURM job through that command.
#
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#
# shellcheck disable=SC2034,SC2317
# From here to the closing quotes Python sees one raw string, so three single quotes in a row may not occur in the bash part.
polyglot=r''':'
set -euo pipefail

die() { printf 'pretrain.sh: %s\n' "$1" >&2; exit 2; }

find_self() { # sbatch runs a spooled copy, the original path is known to the controller only
  self=$(realpath "${BASH_SOURCE[0]}")
  [ "${self##*/}" = slurm_script ] || return 0
  local command
  command=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p" | head -n 1)
  self=${command%%.sh*}.sh
  [ -f "$self" ] || die "cannot read '$self' on $(hostname): submit the file itself (sbatch launch/pretrain.sh), from a shared file system"
}

use_project_venv() {
  local bin
  bin=$(dirname "$(dirname "$self")")/.venv/bin
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$bin/python3" ]; then export PATH="$bin:$PATH"; fi
}

in_slurm_allocation() { # a batch script or an salloc shell (whose step id, if any, is one of the reserved ids near 2^32)
  [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_STEP_ID:-4294967295}" -ge 4294967280 ]
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

start_in_slurm() {
  local inside=()
  read -ra inside <<<"${CONTAINER:-}"
  signal_ranks() { scancel --signal="$1" "$SLURM_JOB_ID" || true; } # reaches the steps, not this script
  ranks_left() { false; }
  # One failed rank must not make srun kill the others while they save; after a minute it may.
  srun --kill-on-bad-exit=0 --wait=60 "${inside[@]}" python3 -u "$self" "$@" &
}

start_locally() {
  signal_ranks() { kill -s "$1" -- "-$child" 2>/dev/null || true; }
  ranks_left() { kill -0 -- "-$child" 2>/dev/null; }
  local port=${MASTER_PORT:-$(free_port)}
  set -m # a process group of its own, which signal_ranks reaches as a whole
  # deepspeed must outlive USR1 to pass on the exit code of its ranks; those install their own handler.
  (trap "" USR1 && exec deepspeed --master_port "$port" ${NPROC:+--num_accelerators "$NPROC"} "$self" "$@") &
  set +m
}

wait_for_ranks() { # sets rc; `wait` returns early whenever a trap runs
  child=$!
  if [ "$stopping" = 1 ]; then signal_ranks TERM; fi # a signal came between two starts
  while :; do
    wait "$child" && rc=0 || rc=$?
    kill -0 "$child" 2>/dev/null || break
  done
  # The deepspeed command can end before its ranks have saved; after a failure there is nothing to save, and none may stay.
  local patience=300
  while ranks_left; do
    sleep 0.2
    if [ "$stopping" = 0 ] && [ $((patience -= 1)) -lt 0 ]; then signal_ranks KILL; fi
  done
}

worth_a_restart() { # 76: a rank was lost or the run hung; above 128: a rank died of a signal
  [ "$stopping" = 0 ] && { [ "$rc" = 76 ] || [ "$rc" -gt 128 ]; }
}

should_requeue() { # also 75: saved and stopped
  local restarts=${SLURM_RESTART_COUNT:-0} job
  job=$(scontrol show job "$SLURM_JOB_ID") || return 1
  case $job in
    *BatchFlag=0* | *JobState=CANCELLED*) return 1 ;;
    *JobState=COMPLETING*) case $job in *Reason=TimeLimit*) ;; *) return 1 ;; esac ;; # ended by SLURM: only the time limit deserves more
  esac
  if [ "$rc" = 75 ] || { [ "$stopping" = 1 ] && [ "$rc" != 0 ]; }; then [ "$restarts" -lt 20 ]; return; fi
  worth_a_restart && [ "$restarts" -lt "$max_restarts" ]
}

find_self
use_project_venv
if [ -n "${RANK:-}" ] && [ -n "${WORLD_SIZE:-}" ]; then exec python3 -u "$self" "$@"; fi # already a rank (--no_python)
stopping=0 rc=0 child="" restarts=0 max_restarts=${RESTARTS:-3}
case $max_restarts in *[!0-9]*) die "RESTARTS is '$max_restarts', not a number" ;; esac
if ! in_slurm_allocation && [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
  exec python3 -u "$self" "$@" # srun bash launch/pretrain.sh: already a rank
fi
start=start_locally
if in_slurm_allocation; then start=start_in_slurm; fi
"$start" "$@"
child=$!
trap "stopping=1; signal_ranks TERM" TERM INT
trap "stopping=1; signal_ranks USR1" USR1
wait_for_ranks
if in_slurm_allocation && should_requeue; then
  printf 'pretrain.sh: exit code %s, requeueing job %s\n' "$rc" "$SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until SLURM ends this script
fi
while ! in_slurm_allocation && worth_a_restart && [ "$restarts" -lt "$max_restarts" ]; do
  restarts=$((restarts + 1))
  printf 'pretrain.sh: exit code %s, restart %s of %s\n' "$rc" "$restarts" "$max_restarts" >&2
  "$start" "$@"
  wait_for_ranks
done
exit "$rc"
: <<'pass'
'''
import os
import runpy
import sys

if __name__ == "__main__":
    # Ranks started by other launchers find ninja, which compiles DeepSpeed's operators, beside their interpreter.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from training.rendezvous import export_rank_environment, read_rank_environment

    export_rank_environment(read_rank_environment())
    runpy.run_module("training.pretrain", run_name="__main__", alter_sys=True)
pass
