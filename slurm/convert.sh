#!/usr/bin/env bash
# Convert a checkpoint between Hugging Face's format and Megatron-Core's on one node, without GPUs.
#
#   sbatch slurm/convert.sh hf-to-megatron /shared/models/Qwen2.5-72B-Instruct /shared/megatron/qwen2.5-72b
#   sbatch slurm/convert.sh megatron-to-hf runs/chord_qwen72b/checkpoints/step-000100 /shared/trained --hf /shared/...
#
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

# Site settings: as in chord_qwen7b.sh.
export CHORD_HOME="${CHORD_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
export CHORD_VENV="${CHORD_VENV:-$CHORD_HOME/.venv}"
export CHORD_CONTAINER_IMAGE="${CHORD_CONTAINER_IMAGE:-}"
export CHORD_CONTAINER_MOUNTS="${CHORD_CONTAINER_MOUNTS:-}"
export CHORD_JOBS="${CHORD_JOBS:-$CHORD_HOME/runs/jobs}"

if [[ ! -f "$CHORD_HOME/slurm/lib/launch.sh" ]]; then
  echo "error: CHORD_HOME=$CHORD_HOME has no slurm/lib/launch.sh: submit from the repository's folder, or set CHORD_HOME" >&2
  exit 2
fi
# shellcheck source=slurm/lib/launch.sh
source "$CHORD_HOME/slurm/lib/launch.sh"
convert "$@"
