#!/usr/bin/env bash
# Trains wherever SkyPilot finds capacity: a managed job on one GPU node or one TPU slice.
#
#   ACCELERATORS=tpu-v6e-8 BUCKET=gs://... launch/skypilot.sh [--dry-run] -- \
#     --config=configs/backbone.py:2b --data=/mnt/voxcpm2/shards --workdir=/mnt/voxcpm2/run
#
# Needs `sky` with a cloud account set up. The machine runs this copy of the repository.
#   ACCELERATORS     what to train on, such as tpu-v6e-8 or H100:8
#   BUCKET           bucket for shards and checkpoints; it is mounted at /mnt/voxcpm2, through a cache on the machine's disk
#   NAME             of the job (default voxcpm2)
#   SPOT             true (default) or false
#   MAX_FAILURES     restarts after a failure, on one machine (default 10)
#
# After the loss of the machine, or exit code 75, SkyPilot looks for a machine again, in other regions too, and training
# resumes from the last checkpoint in the bucket. What a lost machine had not uploaded yet is lost.
# To stop: sky jobs cancel --name NAME
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "$0")/arguments.sh"
need ACCELERATORS "the accelerators, such as tpu-v6e-8 or H100:8"
need BUCKET "a bucket for shards and checkpoints"
SPOT="${SPOT:-true}"
[[ "$SPOT" =~ ^(true|false)$ ]] || mistake "SPOT is '$SPOT'; expected true or false"
[ ${#flags[@]} -eq 0 ] || mistake "unknown option ${flags[*]}; expected --dry-run or --"
extra=cuda
[[ "$ACCELERATORS" != tpu-* ]] || extra=tpu
case "$ACCELERATORS" in
  tpu-v5p-* | tpu-v4-*) devices=$((${ACCELERATORS##*-} / 2)) ;; # these names count cores, two per chip
  tpu-*) devices=${ACCELERATORS##*-} ;;
  *:*) devices=${ACCELERATORS##*:} ;;
  *) devices=1 ;;
esac
check_training "$devices"

# SkyPilot cannot leave exit code 2 alone and restart after other failures. So the loop below restarts after failures on the
# machine itself, and SkyPilot restarts after 75 only.
# MOUNT_CACHED, for MOUNT does not append to files. SkyPilot appends commands to `run` that wait until everything is uploaded:
# so `run` does not exit, but has the trap give its exit code after them.
task() {
  cat << YAML
name: $NAME
workdir: "$(cd "$(dirname "$0")/.." && pwd)"
resources:
  accelerators: "$ACCELERATORS"
  use_spot: $SPOT
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes: [75]
file_mounts:
  /mnt/voxcpm2: {source: "$BUCKET", mode: MOUNT_CACHED}
setup: |
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python=3.12 ~/voxcpm2
  python3 -m uv pip install --quiet --python ~/voxcpm2/bin/python --editable '.[$extra]'
run: |
  trap 'exit \$code' EXIT
  for ((failures = 0; failures <= $MAX_FAILURES; failures++)); do
    code=0
    ~/voxcpm2/bin/$(quoted voxcpm2-jax train "${train[@]}") || code=\$?
    case \$code in
      0 | 2 | 75) break ;;
    esac
    echo "exit code \$code, failure \$((failures + 1)); at most $MAX_FAILURES restarts" >&2
    sleep 10
  done
YAML
}

if [ -n "$dry_run" ]; then
  task
else
  file=$(mktemp --suffix=.yaml)
  trap 'rm -f "$file"' EXIT
  task > "$file"
  sky jobs launch --name="$NAME" --yes --detach-run "$file"
fi
