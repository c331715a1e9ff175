#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for queued resources, trains on all their hosts, asks again when they are taken away, and
# gives them back at the end.
#
#   TOPOLOGY=2xv5e:16x16 ZONE=... IMAGE=... SHARE=... launch/tpu_vm.sh [--dry-run] -- \
#     --config=configs/backbone.py:2b --data=/mnt/voxcpm2/shards --workdir=/mnt/voxcpm2/run
#
# Needs gcloud, signed in and with a project set, on a machine that stays up: a small VM, or a terminal multiplexer.
#   TOPOLOGY         slices, chip and shape of a slice, as for `voxcpm2-jax plan`
#   ZONE             such as the project has its quota in
#   IMAGE            of launch/Dockerfile with EXTRA=tpu, in a registry that the VMs may read
#   SHARE            an NFS export, HOST:/PATH (Filestore, ...); it is mounted at /mnt/voxcpm2
#   NAME             of the queued resources (default voxcpm2)
#   CAPACITY         spot (default), reserved or guaranteed
#   RUNTIME          software of the VMs (default: that of the chip)
#   MAX_FAILURES     restarts after a failure (default 10)
#   POLL_SEC         between two looks at the queue (default 60)
#
# Preempted VMs are shut down: the processes get SIGTERM and save if half a minute is enough for them; this script then
# deletes what is left, queues again, and training goes on from the last checkpoint. Stopping this script stops no training:
# the same command finds it again. To stop all: gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "$0")/arguments.sh"
read_topology
need ZONE "the zone to ask in"
need IMAGE "the image of launch/Dockerfile, where the VMs find it"
need SHARE "an NFS export HOST:/PATH for shards and checkpoints"
CAPACITY="${CAPACITY:-spot}" POLL_SEC="${POLL_SEC:-60}"
[[ "$CAPACITY" =~ ^(spot|reserved|guaranteed)$ ]] || mistake "CAPACITY '$CAPACITY' is none of spot, reserved, guaranteed"
[ ${#flags[@]} -eq 0 ] || mistake "unknown option ${flags[*]}; expected --dry-run or --"
case "$chip" in
  v5e) RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" ;;
  v5p) RUNTIME="${RUNTIME:-v2-alpha-tpuv5}" ;;
  v6e) RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}" ;;
esac
# On every host: a container that is there is started again, as it was; docker leaves one alone that runs.
start="sudo mkdir -p /mnt/voxcpm2"
start+=" && { mountpoint -q /mnt/voxcpm2 || {"
start+=" sudo apt-get -qq install -y nfs-common && sudo mount -t nfs $(quoted "$SHARE") /mnt/voxcpm2; }; }"
[[ "$IMAGE" != *.pkg.dev/* ]] || start+=" && sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet"
start+=" && { sudo docker start $NAME 2> /dev/null || sudo docker run --detach --name=$NAME --init --stop-timeout=600"
start+=" --privileged --user=0 --network=host --volume=/mnt/voxcpm2:/mnt/voxcpm2 $(quoted "$IMAGE" train "${train[@]}"); }"

create() {
  local nodes=(--node-id="$NAME")
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$NAME")
  gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --accelerator-type="$(accelerator_type)" \
    --runtime-version="$RUNTIME" "${nodes[@]}" "--$CAPACITY"
}
state() {
  gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name~/$NAME\$" --format='value(state.state)'
}
# on all|0 COMMAND: on all hosts of all slices, or on the first of the first.
on() { gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --node="$1" --worker="$1" --command="$2"; }
delete() { gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet; }

if [ -n "$dry_run" ]; then
  gcloud() { quoted gcloud "$@"; }
  create
  state
  on all "$start"
  on all "sudo docker wait $NAME"
  delete
  exit
fi

failures=0
while true; do
  if ! state=$(state); then
    sleep "$POLL_SEC"
    continue
  fi
  case "$state" in
    '') create ;;
    ACTIVE)
      # One line for each host, when its process has ended; the connection may end before.
      if on all "$start" && codes=$(on all "sudo docker wait $NAME" | grep -x '[0-9]\+' | sort -nu | xargs); then
        case " $codes " in
          ' 0 ') code=0 ;;
          *' 2 '*) code=2 ;;
          ' 75 ' | ' 0 75 ') continue ;;
          *) code=1 failures=$((failures + 1)) ;;
        esac
        ((code == 0)) || on 0 "sudo docker logs --tail=50 $NAME" >&2 || true
        if ((code == 1 && failures <= MAX_FAILURES)); then
          echo "exit codes $codes, failure $failures; at most $MAX_FAILURES restarts" >&2
          continue
        fi
        delete
        exit "$code"
      fi
      sleep "$POLL_SEC"
      ;;
    FAILED | SUSPENDED) delete && sleep "$POLL_SEC" ;;
    *) sleep "$POLL_SEC" ;;
  esac
done
