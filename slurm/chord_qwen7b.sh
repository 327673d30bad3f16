#!/usr/bin/env bash
# CHORD on Qwen2.5-7B on one node of 8 GPUs, vLLM on the same GPUs.
#
#   sbatch slurm/chord_qwen7b.sh \
#     model.path=/shared/models/... data.prompts=/shared/rl.jsonl data.demonstrations=/shared/sft.jsonl
#
#SBATCH --job-name=chord_qwen7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Site settings; the environment comes before these defaults (docs/cluster.md). Account and partition are sbatch's own:
# export SBATCH_ACCOUNT and SBATCH_PARTITION.
export CHORD_HOME="${CHORD_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"        # this repository, on a shared file system
export CHORD_VENV="${CHORD_VENV:-$CHORD_HOME/.venv}"               # an environment that all nodes see, or else
export CHORD_CONTAINER_IMAGE="${CHORD_CONTAINER_IMAGE:-}"          # a pyxis image (IMAGE, or PATH.sqsh), with
export CHORD_CONTAINER_MOUNTS="${CHORD_CONTAINER_MOUNTS:-}"        # what it must see beside the repository
export CHORD_JOBS="${CHORD_JOBS:-$CHORD_HOME/runs/jobs}"           # logs, one folder a job
export CHORD_RUN="${CHORD_RUN:-examples/cluster/chord_qwen7b.yaml}"
export CHORD_ROLLOUT_NODES="${CHORD_ROLLOUT_NODES:-0}"             # nodes (of --nodes) that only sample

if [[ ! -f "$CHORD_HOME/slurm/lib/launch.sh" ]]; then
  echo "error: CHORD_HOME=$CHORD_HOME has no slurm/lib/launch.sh: submit from the repository's folder, or set CHORD_HOME" >&2
  exit 2
fi
# shellcheck source=slurm/lib/launch.sh
source "$CHORD_HOME/slurm/lib/launch.sh"
launch "$CHORD_RUN" "$@"
