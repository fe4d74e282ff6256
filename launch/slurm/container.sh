#!/usr/bin/env bash
# The ranks run inside an image that has the dependencies; the code is this checkout, mounted into it. The host needs SLURM only.
#   sbatch launch/slurm/container.sh
#SBATCH --job-name=mesokurt-image
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

# pretrain.sh starts each rank as `srun $CONTAINER python3 launch/pretrain.sh ...`.
export CONTAINER="${CONTAINER:-apptainer exec --nv --bind $PWD --pwd $PWD mesokurt.sif}"
# enroot, with an image that was imported and created on every node before:
#   CONTAINER="enroot start --mount $PWD:$PWD mesokurt" sbatch launch/slurm/container.sh
exec bash launch/pretrain.sh --config configs/quickstart.yaml run.dir=runs/container "$@"
