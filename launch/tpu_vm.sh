#!/usr/bin/env bash
# Trains on Cloud TPU VMs: requests queued resources, trains on all their hosts, requests new ones when they are preempted,
# and deletes them at the end.
#
#   TOPOLOGY=2xv5e:16x16 ZONE=... IMAGE=... SHARE=... launch/tpu_vm.sh [--dry-run] -- \
#     --config=configs/backbone.py:2b --config.batch.rows=512 --data=/mnt/voxcpm2/shards --workdir=/mnt/voxcpm2/run
#
# Needs gcloud, signed in and with a project set. The script has to keep running: use a small VM or a terminal multiplexer.
#   TOPOLOGY         slices, chip and shape of a slice, as for `voxcpm2-jax plan`
#   ZONE             zone in which the project has quota
#   IMAGE            image built from launch/Dockerfile with EXTRA=tpu, in a registry that the VMs can read
#   SHARE            an NFS export, HOST:/PATH (Filestore, ...); it is mounted at /mnt/voxcpm2
#   NAME             of the queued resources (default voxcpm2)
#   CAPACITY         spot (default), reserved or guaranteed
#   RUNTIME          runtime version of the VMs (default: the one for the chip)
#   MAX_FAILURES     restarts after a failure (default 10)
#   MIN_SLICES       go on with as few slices, if no more are to be had (default: all of TOPOLOGY); the batch stays the same
#   WAIT_SEC         seconds to wait for them before fewer are requested (default 3600)
#   POLL_SEC         seconds between two queries of the queue (default 60)
#
# When VMs are preempted, the processes get SIGTERM and have about 30 s for saving. The script then deletes what is left of
# the resources and requests new ones, and training resumes from the last checkpoint. Stopping the script does not stop the
# training: the same command attaches to it again. With other arguments, IMAGE or SHARE the command lets the running training
# save, ends it and starts the new one on the same hosts. To stop both:
# gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "$0")/arguments.sh"
read_topology
need ZONE "a zone in which the project has quota"
need IMAGE "an image built from launch/Dockerfile, in a registry that the VMs can read"
need SHARE "an NFS export HOST:/PATH for shards and checkpoints"
CAPACITY="${CAPACITY:-spot}" POLL_SEC="${POLL_SEC:-60}"
[[ "$CAPACITY" =~ ^(spot|reserved|guaranteed)$ ]] || mistake "CAPACITY is '$CAPACITY'; expected spot, reserved or guaranteed"
[ ${#flags[@]} -eq 0 ] || mistake "unknown option ${flags[*]}; expected --dry-run or --"
case "$chip" in
  v5e) RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" ;;
  v5p) RUNTIME="${RUNTIME:-v2-alpha-tpuv5}" ;;
  v6e) RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}" ;;
esac
# On every host: start the existing container again, which does nothing if it is running; if there is none, make it. The label
# tells whether it is the container of these arguments. Another one is stopped, which lets it save, and removed; its share is
# unmounted. If it cannot be removed, the new one finds its name taken.
label="arguments=$(printf '%s\0' "$IMAGE" "$SHARE" "${train[@]}" | cksum | cut -d' ' -f1)"
start="same=\$(sudo docker ps --all --quiet --filter=name=^$NAME\$ --filter=label=$label)"
start+="; [ -n \"\$same\" ] || { { sudo docker stop $NAME && sudo docker rm $NAME; } > /dev/null 2>&1"
start+="; ! mountpoint -q /mnt/voxcpm2 || sudo umount /mnt/voxcpm2; }"
start+=" && sudo mkdir -p /mnt/voxcpm2"
start+=" && { mountpoint -q /mnt/voxcpm2 || {"
start+=" sudo apt-get -qq install -y nfs-common && sudo mount -t nfs $(quoted "$SHARE") /mnt/voxcpm2; }; }"
[[ "$IMAGE" != *.pkg.dev/* ]] || start+=" && sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet"
start+=" && if [ -n \"\$same\" ]; then sudo docker start $NAME"
start+="; else sudo docker run --detach --name=$NAME --label=$label --pull=always --init --stop-timeout=600"
start+=" --privileged --user=0 --network=host --volume=/mnt/voxcpm2:/mnt/voxcpm2 $(quoted "$IMAGE" train "${train[@]}"); fi"

# create SLICES: requests so many.
create() {
  local nodes=(--node-id="$NAME")
  (($1 == 1)) || nodes=(--node-count="$1" --node-prefix="$NAME")
  gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --accelerator-type="$(accelerator_type)" \
    --runtime-version="$RUNTIME" "${nodes[@]}" "--$CAPACITY"
}
state() {
  gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name~/$NAME\$" --format='value(state.state)'
}
# on all|0 COMMAND: on all hosts of all slices, or on the first host of the first slice.
on() { gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --node="$1" --worker="$1" --command="$2"; }
delete() { gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet; }

if [ -n "$dry_run" ]; then
  gcloud() { quoted gcloud "$@"; }
  create "$slices"
  state
  on all "$start"
  on all "sudo docker wait $NAME"
  delete
  exit
fi

failures=0 turn=0 since=$SECONDS # sizes[turn] slices are requested
while true; do
  if ! state=$(state); then
    sleep "$POLL_SEC"
    continue
  fi
  case "$state" in
    '')
      create "${sizes[turn]}"
      since=$SECONDS
      ;;
    ACTIVE)
      turn=0 # after a preemption all slices are requested again
      # `docker wait` prints one exit code per host when its process has ended; the connection may break before.
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
    *)
      if ((turn + 1 < ${#sizes[@]} && SECONDS - since >= WAIT_SEC)); then
        turn=$((turn + 1))
        echo "not active after $WAIT_SEC s; requesting ${sizes[turn]} of $slices slices" >&2
        delete
      else
        sleep "$POLL_SEC"
      fi
      ;;
  esac
done
