#!/usr/bin/env bash
# Trains wherever SkyPilot finds room: a managed job on one node of GPUs or one TPU slice.
#
#   ACCELERATORS=tpu-v6e-8 BUCKET=gs://... launch/skypilot.sh [--dry-run] -- \
#     --config=configs/backbone.py:2b --data=/mnt/voxcpm2/shards --workdir=/mnt/voxcpm2/run
#
# Needs `sky` with an account set up, and starts from this directory's copy of the code.
#   ACCELERATORS     such as tpu-v6e-8 or H100:8
#   BUCKET           storage for shards and checkpoints; it is mounted at /mnt/voxcpm2
#   NAME             of the job (default voxcpm2)
#   SPOT             true (default) or false
#   MAX_FAILURES     restarts after a failure, on one machine (default 10)
#
# A machine that is taken away is looked for again, in another place if need be; training goes on from the last checkpoint.
# So does a process that saved and left with 75. To stop: sky jobs cancel --name NAME
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "$0")/arguments.sh"
need ACCELERATORS "what to train on, such as tpu-v6e-8 or H100:8"
need BUCKET "a bucket for shards and checkpoints"
SPOT="${SPOT:-true}"
[[ "$SPOT" =~ ^(true|false)$ ]] || mistake "SPOT '$SPOT' is neither true nor false"
[ ${#flags[@]} -eq 0 ] || mistake "unknown option ${flags[*]}; expected --dry-run or --"
extra=cuda
[[ "$ACCELERATORS" != tpu-* ]] || extra=tpu

# SkyPilot restarts after every failure or after none, so failures are dealt with on the machine; only 75 is passed on.
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
  /mnt/voxcpm2: {source: "$BUCKET", mode: MOUNT}
setup: |
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python=3.12 ~/voxcpm2
  python3 -m uv pip install --quiet --python ~/voxcpm2/bin/python --editable '.[$extra]'
run: |
  for ((failures = 0; failures <= $MAX_FAILURES; failures++)); do
    code=0
    ~/voxcpm2/bin/$(quoted voxcpm2-jax train "${train[@]}") || code=\$?
    case \$code in
      0 | 2 | 75) exit \$code ;;
    esac
    echo "exit code \$code, failure \$((failures + 1)); at most $MAX_FAILURES restarts" >&2
    sleep 10
  done
  exit \$code
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
