#!/usr/bin/env bash
# sbatch experiments/many_gpus/slurm.sh experiment=shapes_owl3 trainer=fsdp
# One process a GPU; Lightning reads ranks and addresses from SLURM's own variables.
#SBATCH --job-name=owlfuse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGTERM@120 # the step under way ends, and a checkpoint is written, two minutes before the limit
set -euo pipefail
srun owlfuse train "$@" trainer.accelerator=gpu trainer.devices=8 trainer.num_nodes="$SLURM_NNODES"
