#!/usr/bin/env bash
# Trains on TPU slices of Google Kubernetes Engine: one JobSet, with one job per slice and one pod per host.
#
#   TOPOLOGY=4xv6e:16x16 IMAGE=... CLAIM=... launch/gke.sh [--dry-run] -- \
#     --config=configs/backbone.py:2b --config.batch.rows=1024 --data=/mnt/voxcpm2/shards --workdir=/mnt/voxcpm2/run
#
# Needs kubectl with the cluster as its context, and JobSet 0.10 or newer in the cluster.
#   TOPOLOGY         slices, chip and shape of a slice, as for `voxcpm2-jax plan`
#   IMAGE            image built from launch/Dockerfile with EXTRA=tpu, in a registry that the cluster can read
#   CLAIM            persistent volume claim that all pods may write (Filestore, ...); it is mounted at /mnt/voxcpm2
#   NAME             of the JobSet (default voxcpm2)
#   QUEUE            Kueue's local queue (default none)
#   SPOT=1           use spot nodes
#   CHIPS_PER_HOST   4 (default), or 8 for the largest single-host slices
#   MIN_SLICES       go on with as few slices, if no more are to be had (default: all of TOPOLOGY); the batch stays the same.
#                    The script then keeps running: see below
#   WAIT_SEC         seconds in which slices may be missing before fewer are submitted (default 3600)
#   POLL_SEC         seconds between two looks at the JobSet (default 60)
#   GRACE_SEC        seconds that a preempted pod has for saving (default 600; spot nodes allow about 30)
#   MAX_FAILURES     restarts of all slices after a failure (default 10)
#
# A preempted pod gets SIGTERM, saves and exits with 75. Then, and after the loss of a node, all slices start again; these
# restarts are not counted. A JobSet has a fixed number of slices. So with MIN_SLICES the script watches it: when slices have
# been missing for WAIT_SEC, it deletes the JobSet, which lets the run save, and submits one of the next smaller number, which
# goes on from the last checkpoint. It never goes back to more by itself: delete the JobSet and start the script again.
# With --xpk the job is submitted through xpk to the cluster CLUSTER, and CLAIM is a storage that
# `xpk storage` lists.
# To stop: kubectl delete jobset NAME. To watch: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=NAME
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "$0")/arguments.sh"
read_topology
need IMAGE "an image built from launch/Dockerfile, in a registry that the cluster can read"
need CLAIM "a persistent volume claim that all pods may write"
GRACE_SEC="${GRACE_SEC:-600}" CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}" POLL_SEC="${POLL_SEC:-60}"
whole GRACE_SEC CHIPS_PER_HOST POLL_SEC
per_host=$((chips < CHIPS_PER_HOST ? chips : CHIPS_PER_HOST))
((chips % per_host == 0)) ||
  mistake "TOPOLOGY is '$TOPOLOGY', $chips chips a slice; expected a multiple of CHIPS_PER_HOST=$CHIPS_PER_HOST"
case "$chip" in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
esac
labels='{}' spot=''
[ -z "${QUEUE:-}" ] || labels="{kueue.x-k8s.io/queue-name: \"$QUEUE\"}"
[ -z "${SPOT:-}" ] || spot=$'\n                cloud.google.com/gke-spot: "true"'

# manifest [SLICES]: the JobSet. Kubernetes expands $(WORD) in an argument; $$(WORD) gives a literal $(WORD).
manifest() {
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  labels: $labels
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # a slice is a node pool
spec:
  failurePolicy:
    maxRestarts: $MAX_FAILURES
    restartStrategy: BlockingRecreate # no slice starts before the old pods of all slices are gone
    # The message of a failed job ends with the index of the podFailurePolicy rule below that matched. A failure that
    # matches no rule here restarts all slices and is counted.
    rules:
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["rule at index 0\$"]
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["rule at index [12]\$"]
  replicatedJobs:
    - name: slice
      replicas: ${1:-$slices}
      template:
        spec:
          parallelism: $((chips / per_host))
          completions: $((chips / per_host))
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [75]}
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $GRACE_SEC
              hostNetwork: true # slices communicate over the network of their hosts
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $shape$spot
              containers:
                - name: train
                  image: "$IMAGE"
                  args: $(json train "${train[@]//\$(/\$\$(}")
                  ports: # the TPU runtime, jax.distributed, traffic between slices
                    - {containerPort: 8471, protocol: TCP}
                    - {containerPort: 8482, protocol: TCP}
                    - {containerPort: 8080, protocol: TCP}
                  securityContext: {privileged: true, runAsUser: 0} # the TPU device files belong to root
                  resources:
                    limits: {google.com/tpu: $per_host}
                  volumeMounts: [{name: work, mountPath: /mnt/voxcpm2}]
              volumes:
                - name: work
                  persistentVolumeClaim: {claimName: "$CLAIM"}
YAML
}

case "${flags[*]}" in
  '') submit=(kubectl create --filename=-) ;;
  --xpk)
    need CLUSTER "the name of the cluster, as xpk lists it"
    ((${#sizes[@]} == 1)) || mistake "MIN_SLICES does not go with --xpk, which submits and ends"
    # By default xpk restarts only on exit code 42 and on signals. Codes that are not listed, such as 2, end the workload.
    submit=(
      xpk workload create --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$(accelerator_type)" --num-slices="$slices"
      --docker-image="$IMAGE" --storage="$CLAIM" --command="$(quoted voxcpm2-jax train "${train[@]}")"
      --max-restarts="$MAX_FAILURES" "--restart-on-exit-codes=1,75" --termination-grace-period-seconds="$GRACE_SEC"
    )
    ;;
  *) mistake "unknown option ${flags[*]}; expected --dry-run, --xpk or --" ;;
esac

# watch: waits for the end of the JobSet, and submits smaller ones.
watch() {
  local turn=0 since=$SECONDS name ready state
  while true; do
    sleep "$POLL_SEC"
    state=$(kubectl get jobset "$NAME" --ignore-not-found \
      --output='jsonpath={.metadata.name} {.status.replicatedJobsStatus[0].ready} {.status.terminalState}') || continue
    read -r name ready state <<< "$state"
    [ -n "$name" ] || mistake "the JobSet $NAME is gone; somebody has deleted it"
    if [[ ! "$ready" =~ ^[0-9]+$ ]]; then # no status yet, or the first field is missing
      state="$ready" ready=0
    fi
    case "$state" in
      Completed) exit 0 ;;
      Failed) exit 1 ;;
    esac
    if ((ready >= sizes[turn])); then
      since=$SECONDS
    elif ((turn + 1 < ${#sizes[@]} && SECONDS - since >= WAIT_SEC)); then
      turn=$((turn + 1)) since=$SECONDS
      echo "$ready slices ready for $WAIT_SEC s; submitting ${sizes[turn]} of $slices slices" >&2
      kubectl delete jobset "$NAME" --ignore-not-found --cascade=foreground
      manifest "${sizes[turn]}" | "${submit[@]}"
    fi
  done
}

if [ "${submit[0]}" = kubectl ]; then
  if [ -n "$dry_run" ]; then manifest; else manifest | "${submit[@]}"; fi
  if [ -z "$dry_run" ] && ((${#sizes[@]} > 1)); then watch; fi
elif [ -n "$dry_run" ]; then
  quoted "${submit[@]}"
else
  exec "${submit[@]}"
fi
