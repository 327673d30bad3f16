# shellcheck shell=bash
# What the scripts in slurm/ share: the step that checks the nodes and runs the job on them, and its end.
# Everything that takes more than a few lines is Python, in megatron_chord/cluster/. See docs/cluster.md.
set -euo pipefail
: "${CHORD_HOME:?}" "${CHORD_JOBS:?}"

# launch RUN.yaml [NAME=VALUE ...]: train, and end the batch job with the run's exit code.
launch() {
  cd "$CHORD_HOME"
  prepare
  local code=0
  step megatron_chord.cluster.node "$@" || code=$?
  finish "$code"
}

# convert ARGUMENT...: tools/convert.py on one node; its exit code.
convert() {
  cd "$CHORD_HOME"
  step tools.convert "$@"
}

# evaluate ARGUMENT...: megatron-chord evaluate with servers on all nodes; end the batch job with its exit code.
evaluate() {
  cd "$CHORD_HOME"
  prepare
  local code=0
  step megatron_chord.cluster.evaluate "$@" || code=$?
  finish "$code"
}

# The job's folder, key, nodes and port, as the nodes read them.
prepare() {
  if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "error: start this with sbatch: it needs a Slurm allocation" >&2
    exit 2
  fi
  # A second run in one allocation has a folder of its own: files of the first, such as `stop`, would end it.
  local folder="$CHORD_JOBS/$SLURM_JOB_ID/restart-${SLURM_RESTART_COUNT:-0}" run=1
  export CHORD_JOB="$folder"
  while [[ -e "$CHORD_JOB" ]]; do
    CHORD_JOB="$folder-run$((run += 1))"
  done
  (
    umask 077
    mkdir -p "$CHORD_JOB/logs" "$CHORD_JOB/failures"
    head -c 48 /dev/urandom | base64 -w 0 | tr -d '+/=' >"$CHORD_JOB/key"
  )
  trap 'echo "a stop was requested: the job saves its work and returns to the queue"; touch "$CHORD_JOB/stop"' USR1
  # Slurm sends SIGTERM here when the job is cancelled, and only to the nodes' tasks when it is preempted.
  trap 'touch "$CHORD_JOB/cancelled"; exit 143' TERM
  CHORD_NODES="$(scontrol show node "$SLURM_JOB_NODELIST" |
    sed -nE 's/^NodeName=([^ ]+).*/\1/p; s/.*NodeAddr=([^ ]+).*/\1/p' | paste -d= - - | paste -sd' ' -)"
  if [[ -n "${CHORD_NETWORK:-}" ]]; then
    local addresses name entries=()
    addresses="$(step megatron_chord.cluster.address)" || finish "$?"
    for name in $CHORD_NODES; do
      entries+=("$(grep -m 1 "^${name%%=*}=" <<<"$addresses")")
    done
    CHORD_NODES="${entries[*]}"
  fi
  export CHORD_NODES
  export CHORD_PORT="${CHORD_PORT:-$((10000 + SLURM_JOB_ID * 2 % 20000))}"
  export HF_HUB_OFFLINE=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
  # Compiled kernels are on each node's own disk: many nodes would lock and rewrite the files of a shared home.
  # DeepGEMM's are below VLLM_CACHE_ROOT. The nodes check these folders (megatron_chord/cluster/caches.py).
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-$UID}"
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-/tmp/torchinductor-$UID}"
  export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-/tmp/vllm-$UID}"
  export FLASHINFER_WORKSPACE_BASE="${FLASHINFER_WORKSPACE_BASE:-/tmp/flashinfer-$UID}"
  ulimit -Sn "$(ulimit -Hn)" || true
  echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $CHORD_NODES; its files are in $CHORD_JOB"
}

# step MODULE ARGUMENT...: one task on every node; srun's exit code, also when signals come in between.
step() {
  local python="${CHORD_PYTHON:-}" container=()
  if [[ -n "${CHORD_CONTAINER_IMAGE:-}" ]]; then
    mkdir -p "$CHORD_JOBS"
    container=(--container-image="$CHORD_CONTAINER_IMAGE" --container-workdir="$CHORD_HOME" --no-container-mount-home
      --container-mounts="$CHORD_HOME,$CHORD_JOBS${CHORD_CONTAINER_MOUNTS:+,$CHORD_CONTAINER_MOUNTS}")
    python="${python:-python3}"
  fi
  python="${python:-$CHORD_VENV/bin/python}"
  if ((${#container[@]} == 0)) && ! command -v "$python" >/dev/null; then
    echo "error: there is no Python at $python. Make the environment (docs/cluster.md, step 2), or set CHORD_VENV or" \
      "CHORD_PYTHON to one that all nodes see" >&2
    return 2
  fi
  # All CPUs and GPUs of the node for its one task, which shares them out itself. --export: after sbatch --export=NONE,
  # srun would give the task none of the variables above.
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    --export=ALL --kill-on-bad-exit=1 --wait=300 --unbuffered ${container[@]+"${container[@]}"} \
    "$python" -m "$@" &
  local pid=$! code=0
  while true; do
    wait "$pid" && code=0 || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  wait "$pid" && code=0 || code=$?
  return "$code"
}

# finish CODE: say what failed first, requeue a run that its next start continues, exit with the run's own code.
finish() {
  local code="$1" first
  touch "$CHORD_JOB/failures/.read" # writing to it makes an NFS client look at the folder anew
  first="$(find "$CHORD_JOB/failures" -type f ! -name '.*' | sort | head -n 1)"
  if [[ -f "$CHORD_JOB/ended" ]]; then
    code="$(<"$CHORD_JOB/ended")"
    if [[ -n "$first" ]]; then
      echo "warning: this failed after the end of the run: $(tail -n +2 "$first")" >&2
    fi
  elif [[ -n "$first" ]]; then
    code="$(head -n 1 "$first")"
    echo "failed first: $(tail -n +2 "$first")" >&2
  elif [[ -f "$CHORD_JOB/outcome" ]]; then
    code="$(<"$CHORD_JOB/outcome")"
  elif ((code == 143)); then
    # SIGTERM ended the nodes before they listened to it. If the job was cancelled, it ends this script, too.
    sleep 2
    touch "$CHORD_JOB/preempted"
    code=76
  elif ((code == 0)); then
    code=1
    echo "the nodes ended without saying how: see $CHORD_JOB/logs" >&2
  fi
  local how="stopped as requested" why_not=""
  case "$code" in
    75) ;;
    76) # Stopped before a single step was done. If that happens twice in a row, it would never end.
      local before="${CHORD_JOB%/*}/restart-$((${SLURM_RESTART_COUNT:-0} - 1))/outcome"
      if [[ ! -f "$CHORD_JOB/preempted" && -f "$before" && "$(<"$before")" == 76 ]]; then
        why_not=", twice without a single step: is --time longer than --signal and the start?"
      fi
      ;;
    79) # A fault of the machine, or one of the run itself, which the next start would repeat.
      how="a process froze"
      local last="${CHORD_JOB%/*}/frozen-at" checkpoint
      checkpoint="$(cat "$CHORD_JOB/checkpoint" 2>/dev/null || echo unknown)"
      if [[ -f "$last" && "$(<"$last")" == "$checkpoint" ]]; then
        why_not=" again, and there was no new checkpoint in between (the last one: $checkpoint). Is the run the cause?"
      elif ! echo "$checkpoint" >"$last"; then
        why_not=", and $last cannot be written"
      fi
      ;;
    *) exit "$code" ;;
  esac
  if [[ -z "$why_not" ]] && ((${SLURM_RESTART_COUNT:-0} >= ${CHORD_MAX_RESTARTS:-100})); then
    why_not=" after ${SLURM_RESTART_COUNT:-0} restarts, the most allowed (CHORD_MAX_RESTARTS)"
  fi
  if [[ -n "$why_not" ]]; then
    echo "$how$why_not" >&2
  else
    echo "$how; the job goes back to the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
  exit "$code"
}
