#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster: one batch job with one process per GPU.
#
#   NODES=4 launch/slurm.sh [--dry-run] -- --config=configs/backbone.py:2b --data=/shared/shards --workdir=/shared/run
#
# Start it from an environment that has the package with the extra "cuda", on a file system that all nodes mount. Other
# options of the site are Slurm's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_QOS ... The job
# asks for all memory of its nodes (--mem=0); where a site refuses that, SBATCH_MEM_PER_NODE says how much.
#   NODES            number of nodes
#   MIN_NODES        start with as few, if Slurm has no more (default NODES); the batch stays the same
#   GPUS             GPUs per node (default 8)
#   NAME             of the job (default voxcpm2); the log is NAME-JOBID.log in the current directory
#   GRACE_SEC        seconds before the time limit at which the run saves (default 180)
#   MAX_FAILURES     restarts after a failure, inside one allocation (default 10)
#
# GRACE_SEC before the time limit, and when the job is preempted, all processes get SIGTERM, save and exit with 75; the job
# then requeues itself. Slurm also requeues it when a node fails. `scancel` lets it save and ends it.
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "$0")/arguments.sh"
need NODES "the number of nodes"
GPUS="${GPUS:-8}" GRACE_SEC="${GRACE_SEC:-180}"
whole NODES GPUS GRACE_SEC
check_training "$((NODES * GPUS))"
MIN_NODES="${MIN_NODES:-$NODES}" count="$NODES"
whole MIN_NODES
((MIN_NODES <= NODES)) || mistake "MIN_NODES is '$MIN_NODES'; expected at most NODES=$NODES"
if ((MIN_NODES < NODES)); then
  check_sizes "$MIN_NODES" "${NODES}x$GPUS" "$((NODES * GPUS))"
  # Slurm gives any number of a range, and only those of a list that the batch can be split over.
  count="${sizes[-1]}-$NODES"
  ((${#sizes[@]} == NODES - sizes[-1] + 1)) || count="$(printf '%s\n' "${sizes[@]}" | sort -n | paste -sd,)"
fi
[ ${#flags[@]} -eq 0 ] || mistake "unknown option ${flags[*]}; expected --dry-run or --"

# JAX expects one process per GPU in a Slurm job, and that each process sees all GPUs of its node: no --gpus-per-task.
# srun must not kill the other processes when one exits, because they may still be saving (--kill-on-bad-exit=0), nor bind a
# process to one core, because reading data takes more (--cpu-bind=none). --exclusive gives all cores of a node, but only the
# site's default of memory, a few GB per core; --mem=0 asks for all of it.
batch() {
  cat << SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --output=$NAME-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=$count
#SBATCH --gpus-per-node=$GPUS
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=TERM@$GRACE_SEC
trap : TERM # the processes get the signal too; this script has to wait for them
for ((failures = 0; failures <= $MAX_FAILURES; failures++)); do
  code=0
  srun --kill-on-bad-exit=0 --wait=$GRACE_SEC --cpu-bind=none $(quoted voxcpm2-jax train "${train[@]}") || code=\$?
  case \$code in
    0 | 2) exit \$code ;;
    75)
      # A cancelled job is no longer RUNNING and is not requeued.
      state=\$(squeue --noheader --format=%T --jobs="\$SLURM_JOB_ID")
      if [ "\$state" = RUNNING ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
      exit 75
      ;;
  esac
  echo "exit code \$code, failure \$((failures + 1)); at most $MAX_FAILURES restarts" >&2
  sleep 10
done
exit \$code
SCRIPT
}

if [ -n "$dry_run" ]; then batch; else batch | sbatch; fi
