#!/usr/bin/env bash
# Scores, selects and fine-tunes on one or more nodes of 8 A100s under SLURM, all of them together; then exports (and,
# if asked, evaluates and reports) on the first of them. Submit it from the repository's root:
#
#     sbatch scripts/slurm_8xa100.sh --config=configs/qwen7b.py --config.workdir=/shared/runs/qwen7b
#     sbatch --nodes=4 scripts/slurm_8xa100.sh --config=...      # four nodes, 32 GPUs: nothing else changes
#
# Everything after the script's name is passed to lark_jax unchanged, except for the stages. Submitted again, also after
# a failure or with another number of nodes, it continues: finished tasks are skipped, and with the same number of GPUs
# per process no trajectory is scored twice; training continues from its last checkpoint. The student, the pool and the
# working directory must be on a file system that all nodes share.
#
# Settings, from the environment (sbatch passes it on):
#   LARK_VENV     virtual environment with `pip install -e '.[gpu]'`, visible from all nodes (default: .venv)
#   LARK_MODULES  environment modules to load first, e.g. "cuda/12.4" (default: none; jax[cuda12] brings its own CUDA)
#   LARK_STAGES   stages of the job (default: score,select,finetune,export). Evaluation needs benchmarks and an engine,
#                 see config.evaluate.
#
# Pass site settings (account, partition, QOS) to sbatch. The following belong to the job; sbatch's own options come
# before them, for example `sbatch --gres=gpu:8 --cpus-per-task=32 --time=12:00:00 scripts/slurm_8xa100.sh ...`.
#SBATCH --job-name=lark_jax
#SBATCH --nodes=1
# One process per node drives its 8 GPUs: they share one copy of the pool in host memory, and the student is loaded
# once per node. One process per GPU works too (--ntasks-per-node=8 --cpus-per-task=8): each then scores by itself, with
# eight times the host memory. Scoring processes communicate only if the student needs the GPUs of several nodes
# (config.mesh); training processes always do, since parameters and rows are split over all GPUs.
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:a100:8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=lark_jax-%j.log
# A requeued job keeps its number, and its log.
#SBATCH --open-mode=append
# SLURM may put the job back into the queue when a node fails or a more urgent job takes the nodes ...
#SBATCH --requeue
# ... and tells this script (B:), not the processes, five minutes before the time is over.
#SBATCH --signal=B:USR1@300

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/job_stages.sh

if [ "$#" -eq 0 ]; then
  echo "usage: sbatch [--nodes=N] scripts/slurm_8xa100.sh --config=FILE [--config.FIELD=VALUE ...]" >&2
  exit 2
fi
if [ -n "${LARK_MODULES:-}" ]; then
  # shellcheck disable=SC2086  # a list of names
  module load ${LARK_MODULES}
fi
python="${LARK_VENV:-.venv}/bin/python"
if [ ! -x "$python" ]; then
  echo "error: $python does not exist; create the environment (pip install -e '.[gpu]') and set LARK_VENV" >&2
  exit 2
fi
split_stages "$@"
# jax.distributed speaks gRPC, which would otherwise send the nodes' own traffic through a proxy.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
# Compute nodes download nothing: download the student first, on a node with network access.
export HF_HUB_OFFLINE=1

# SIGTERM makes the processes save the current training step; scoring needs no warning. The job's steps get it from
# scancel (srun itself would pass on SIGKILL), and have all but the last minute to react.
requeue() {
  echo "the time limit is near: requeueing the job, which then continues" >&2
  scancel --signal=TERM "$SLURM_JOB_ID"
  for ((second = 0; second < 240; second++)); do
    kill -0 "${srun:-none}" 2>/dev/null || break
    sleep 1
  done
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1

# Runs `srun` so that the trap above runs immediately; returns srun's status.
step() {
  srun --kill-on-bad-exit=1 --wait=0 --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" &
  srun=$!
  wait "$srun"
}

echo "job ${SLURM_JOB_ID:-?} on ${SLURM_JOB_NODELIST:-?}, attempt $((${SLURM_RESTART_COUNT:-0} + 1))" >&2

# Every process gets its index and the first one's address from SLURM. The processes end together: if one fails, the
# others end within seconds; if one dies silently, within config.distributed.lost_timeout.
if [ -n "$together" ]; then
  step "$python" -m lark_jax.run "$@" --config.stages="$stages" --only="$together" \
    --config.distributed.connect_timeout=600
fi

# One process, on the first node; a mesh given for all GPUs of the job is reduced to the GPUs of that node.
if [ -n "$single" ]; then
  step --nodes=1 --ntasks=1 "$python" -m lark_jax.run "$@" --config.stages="$stages" --only="$single" \
    --config.mesh.data=-1
fi
