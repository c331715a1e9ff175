#!/usr/bin/env bash
# Trains on TPU slices of Google Kubernetes Engine: one JobSet with a job for each slice and a pod for each host.
#
#   TOPOLOGY=4xv6e:16x16 IMAGE=... CLAIM=... launch/gke.sh [--dry-run] -- \
#     --config=configs/backbone.py:2b --data=/mnt/voxcpm2/shards --workdir=/mnt/voxcpm2/run
#
# Needs kubectl with the cluster as its context, and JobSet 0.10 or newer in the cluster.
#   TOPOLOGY         slices, chip and shape of a slice, as for `voxcpm2-jax plan`
#   IMAGE            of launch/Dockerfile with EXTRA=tpu, in a registry that the cluster reads
#   CLAIM            persistent volume claim that all pods may write (Filestore, ...); it is mounted at /mnt/voxcpm2
#   NAME             of the JobSet (default voxcpm2)          QUEUE   Kueue's local queue, if there is one
#   CHIPS_PER_HOST   4, or 8 on the largest single hosts      SPOT=1  on spot nodes
#   GRACE_SEC        to save in, when preempted (default 600; spot nodes give half a minute)
#   MAX_FAILURES     restarts of all slices after a failure (default 10)
#
# Preempted pods get SIGTERM, save and leave with 75; then, as after the loss of a node, all slices start again, uncounted.
# With --xpk it goes through xpk, on the cluster CLUSTER; CLAIM is then a storage that `xpk storage` knows.
# To stop: kubectl delete jobset NAME. To watch: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=NAME
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "$0")/arguments.sh"
read_topology
need IMAGE "the image of launch/Dockerfile, where the cluster finds it"
need CLAIM "a persistent volume claim that all pods may write"
GRACE_SEC="${GRACE_SEC:-600}" CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}"
whole GRACE_SEC CHIPS_PER_HOST
per_host=$((chips < CHIPS_PER_HOST ? chips : CHIPS_PER_HOST))
((chips % per_host == 0)) || mistake "$chips chips of TOPOLOGY '$TOPOLOGY' are no whole hosts of CHIPS_PER_HOST=$CHIPS_PER_HOST"
case "$chip" in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
esac
labels='{}' spot=''
[ -z "${QUEUE:-}" ] || labels="{kueue.x-k8s.io/queue-name: \"$QUEUE\"}"
[ -z "${SPOT:-}" ] || spot=$'\n                cloud.google.com/gke-spot: "true"'

# Kubernetes takes $(WORD) in an argument for a variable; $$(WORD) stands for itself.
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
    restartStrategy: BlockingRecreate # no slice starts while another one's old pods are still there
    # A job that failed says by which of its pod rules, at the end of its message. What matches nothing here restarts all
    # slices and is counted.
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
      replicas: $slices
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
              hostNetwork: true # slices talk to each other over the hosts' own network
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $shape$spot
              containers:
                - name: train
                  image: "$IMAGE"
                  args: $(json train "${train[@]//\$(/\$\$(}")
                  ports: # of the chips' runtime, of jax.distributed, between slices
                    - {containerPort: 8471, protocol: TCP}
                    - {containerPort: 8482, protocol: TCP}
                    - {containerPort: 8080, protocol: TCP}
                  securityContext: {privileged: true, runAsUser: 0} # the chips' device files are root's
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
    need CLUSTER "the cluster, as xpk knows it"
    # Of itself xpk restarts on 42 and on signals alone; whatever is not named does not come again, so 2 stops.
    submit=(
      xpk workload create --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$(accelerator_type)" --num-slices="$slices"
      --docker-image="$IMAGE" --storage="$CLAIM" --command="$(quoted voxcpm2-jax train "${train[@]}")"
      --max-restarts="$MAX_FAILURES" "--restart-on-exit-codes=1,75" --termination-grace-period-seconds="$GRACE_SEC"
    )
    ;;
  *) mistake "unknown option ${flags[*]}; expected --dry-run, --xpk or --" ;;
esac
if [ "${submit[0]}" = kubectl ]; then
  if [ -n "$dry_run" ]; then manifest; else manifest | "${submit[@]}"; fi
elif [ -n "$dry_run" ]; then
  quoted "${submit[@]}"
else
  exec "${submit[@]}"
fi
