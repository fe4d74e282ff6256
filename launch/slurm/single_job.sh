#!/usr/bin/env bash
# One run on 2 nodes of 8 GPUs, which survives preemption and the time limit: two minutes before the end SLURM sends USR1, the run
# saves, and the job is requeued and goes on from its checkpoint. Change the numbers to your cluster, then: sbatch launch/slurm/single_job.sh
#SBATCH --job-name=mesokurt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

# Every task must see all GPUs of its node (no --gpus-per-task): rank i of a node takes GPU i.
# `exec` leaves this shell's process to pretrain.sh, so that USR1 reaches it.
exec bash launch/pretrain.sh --config configs/quickstart.yaml run.dir=runs/quickstart "$@"
