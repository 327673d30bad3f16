#!/usr/bin/env bash
# Evaluate a policy on all nodes of the job, with a vLLM server on each GPU (server.tensor=N: on N of them).
#
#   sbatch slurm/evaluate.sh /shared/runs/chord_qwen7b/policy --suite paper
#   sbatch --nodes=4 slurm/evaluate.sh /shared/runs/chord_qwen7b/policy --suite paper
#   sbatch slurm/evaluate.sh /shared/models/Qwen2.5-7B-Instruct --suite my_suite.yaml server.tensor=2
#
# Before its time limit the job goes back to the queue. When it runs again, it continues from the answers that it has.
#
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
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
evaluate "$@"
