#!/usr/bin/env bash
# Scores, selects and fine-tunes on all hosts of a TPU VM slice together; then exports on the first of them. Runs on your
# own machine, from the repository's root, with gcloud.
#
#     export LARK_TPU=my-slice LARK_ZONE=us-east5-a LARK_SHARED=10.0.0.2:/share
#     scripts/tpu_pod.sh setup      # once per slice and change of source or config: copies them, environment, shared folder
#     scripts/tpu_pod.sh run --config=configs/qwen7b.py --config.student.path=/mnt/lark/Qwen2.5-7B \
#         --config.pool.path=/mnt/lark/pool.jsonl --config.workdir=/mnt/lark/runs/qwen7b
#     scripts/tpu_pod.sh log                                     # follows the first host; all logs are in /mnt/lark/logs
#     scripts/tpu_pod.sh stop                                    # ends the processes on all hosts
#
# A slice, if there is none yet (a spot one is cheaper, and may be taken away at any time):
#
#     gcloud alpha compute tpus tpu-vm create "$LARK_TPU" --zone="$LARK_ZONE" --spot \
#         --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
#
# After a preemption: delete the slice (`gcloud alpha compute tpus tpu-vm delete`), create it again, `setup`, and `run`
# with the same arguments. All results are in the shared folder, so the run continues: finished tasks are not computed
# again, and training continues from its last checkpoint. The same applies if one host fails: the others end by
# themselves, and `run` starts all of them again. `stop` lets a training step end and saves it.
#
# Settings, from the environment:
#   LARK_TPU, LARK_ZONE  name and zone of the slice (the project is gcloud's own)
#   LARK_SHARED          what all hosts mount at /mnt/lark: an NFS export HOST:/PATH, such as a Filestore instance, or a
#                        bucket gs://NAME. Student, pool and working directory belong there. An NFS export is the safer
#                        choice: a bucket has no atomic renames of folders.
#   LARK_STAGES          stages of the run (default: score,select,finetune,export). Evaluation needs an engine that works
#                        on the first host only, see config.evaluate; on a slice of several hosts few engines do, but the
#                        exported student can be evaluated anywhere.
#   LARK_PYTHON          version of Python to install (default: 3.12)
set -euo pipefail
source scripts/job_stages.sh

: "${LARK_TPU:?set it to the name of the slice}"
: "${LARK_ZONE:?set it to the zone of the slice}"
python_version=${LARK_PYTHON:-3.12}
mount_point=/mnt/lark
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes

# Runs a command on all hosts at once (a slice may have more than gcloud's usual 64), or on the one given.
on_hosts() {
  gcloud alpha compute tpus tpu-vm ssh "$LARK_TPU" --zone="$LARK_ZONE" --worker="$1" --batch-size=all --command="$2"
}

setup() {
  : "${LARK_SHARED:?set it to HOST:/PATH of an NFS export, or gs://BUCKET}"
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  # The working tree as it is, including uncommitted files.
  git ls-files --cached --others --exclude-standard -z | while IFS= read -r -d '' file; do
    if [ -e "$file" ]; then printf '%s\0' "$file"; fi
  done | tar --null --files-from=- -czf "$archive"
  gcloud alpha compute tpus tpu-vm scp "$archive" "$LARK_TPU":lark_jax.tar.gz --zone="$LARK_ZONE" --worker=all \
    --batch-size=all
  rm -f "$archive"
  # The image's Python may be older than 3.11, so uv installs one.
  on_hosts all "set -e
    rm -rf ~/lark_jax && mkdir ~/lark_jax && tar -xzf ~/lark_jax.tar.gz -C ~/lark_jax
    python3 -m pip install --quiet --user uv
    ~/.local/bin/uv venv --quiet --clear --python $python_version ~/lark_venv
    cd ~/lark_jax && ~/.local/bin/uv pip install --quiet --python ~/lark_venv/bin/python -e '.[tpu]'"
  # Hosts must see each other's files soon after they are written, so metadata is cached only briefly.
  case "$LARK_SHARED" in
    gs://*)
      on_hosts all "set -e
        sudo mkdir -p $mount_point && sudo chown \"\$USER\" $mount_point
        command -v gcsfuse >/dev/null || { echo 'error: install gcsfuse on the hosts, or use an NFS export' >&2; exit 1; }
        mountpoint -q $mount_point || gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
          ${LARK_SHARED#gs://} $mount_point
        mkdir -p $mount_point/logs"
      ;;
    *)
      on_hosts all "set -e
        sudo apt-get install --quiet --yes nfs-common >/dev/null
        sudo mkdir -p $mount_point
        mountpoint -q $mount_point || sudo mount -t nfs -o hard,actimeo=1 $LARK_SHARED $mount_point
        sudo mkdir -p $mount_point/logs && sudo chown \"\$USER\" $mount_point $mount_point/logs"
      ;;
  esac
}

# The script that a host runs; $1 is its number in the slice. One process per host drives the host's chips. JAX gets its
# index and the coordinator's address from the slice's metadata; a slice of one host has one process.
job() {
  local lark arguments stage
  lark="~/lark_venv/bin/python -m lark_jax.run"
  arguments=$(printf ' %q' "$@")
  echo "set -e; export HF_HUB_OFFLINE=1"
  if [ -n "$together" ]; then
    echo "$lark$arguments --config.stages=$stages --only=$together --config.distributed.connect_timeout=600"
  fi
  echo '[ "$1" = 0 ] || exit 0'
  # The chips of one host of a slice do not start without the others, and export computes nothing: it uses the host's
  # CPU. The other stages leave the chips to the evaluation engine.
  for stage in ${single//,/ }; do
    case "$stage" in
      export)
        echo "JAX_PLATFORMS=cpu $lark$arguments --config.stages=$stages --only=export --config.distributed.start=never" \
          "--config.mesh.data=-1 --config.mesh.tensor=1 --config.finetune.remat=block"
        ;;
      *) echo "$lark$arguments --config.stages=$stages --only=$stage --config.distributed.start=never" ;;
    esac
  done
}

# The job leads its own process group, so that it outlives the ssh connection.
run() {
  split_stages "$@"
  local job
  job=$(printf '%q' "$(job "$@")")
  on_hosts all "set -e
    cd ~/lark_jax
    if [ -f ~/lark_jax.pid ] && kill -0 -- -\$(cat ~/lark_jax.pid) 2>/dev/null; then
      echo 'error: still running here; scripts/tpu_pod.sh stop ends it' >&2
      exit 1
    fi
    number=\$(curl --silent --show-error --fail --header 'Metadata-Flavor: Google' $metadata/agent-worker-number)
    setsid nohup bash -c $job lark_jax \"\$number\" >>$mount_point/logs/\$(hostname).log 2>&1 </dev/null &
    echo \$! >~/lark_jax.pid"
}

log() {
  on_hosts 0 "tail -n 50 -F $mount_point/logs/\$(hostname).log"
}

stop() {
  on_hosts all "if [ -f ~/lark_jax.pid ]; then kill -- -\$(cat ~/lark_jax.pid) 2>/dev/null || true; fi"
}

case "${1:-}" in
  setup | log | stop) "$1" ;;
  run)
    shift
    if [ "$#" -eq 0 ]; then
      echo "usage: scripts/tpu_pod.sh run --config=FILE [--config.FIELD=VALUE ...]" >&2
      exit 2
    fi
    run "$@"
    ;;
  *)
    echo "usage: scripts/tpu_pod.sh setup | run --config=FILE [--config.FIELD=VALUE ...] | log | stop" >&2
    exit 2
    ;;
esac
