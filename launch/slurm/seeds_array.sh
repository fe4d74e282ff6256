#!/usr/bin/env bash
# The same run with five seeds, two at a time, each in a run directory of its own: sbatch launch/slurm/seeds_array.sh
#SBATCH --job-name=mesokurt-seeds
#SBATCH --array=0-4%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --output=slurm-%A_%a.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

seed=$SLURM_ARRAY_TASK_ID
exec bash launch/pretrain.sh --config configs/quickstart.yaml "run.seed=$seed" "run.dir=runs/seed-$seed" "$@"
