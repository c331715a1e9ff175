#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: one batch job, a process for each GPU.
#
#   NODES=4 launch/slurm.sh [--dry-run] -- --config=configs/backbone.py:2b --data=/shared/shards --workdir=/shared/run
#
# Needs the package in the environment it is called from (extra "cuda"), on a file system that all nodes see. Whatever else
# the site wants goes into Slurm's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_QOS ...
#   NODES            how many
#   GPUS             of a node (default 8)
#   NAME             of the job (default voxcpm2); it writes NAME-JOBID.log where it was started
#   GRACE_SEC        to save in, before the time limit (default 180)
#   MAX_FAILURES     restarts after a failure, inside one allocation (default 10)
#
# GRACE_SEC before the time limit, and when preempted, all processes get SIGTERM, save and leave with 75; then the job puts
# itself into the queue again. A node that fails puts it there too. `scancel` saves and ends it.
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "$0")/arguments.sh"
need NODES "the number of nodes"
GPUS="${GPUS:-8}" GRACE_SEC="${GRACE_SEC:-180}"
whole NODES GPUS GRACE_SEC
[ ${#flags[@]} -eq 0 ] || mistake "unknown option ${flags[*]}; expected --dry-run or --"

# One process for each GPU is what JAX makes of a Slurm job; each has to see all GPUs of its node, so no --gpus-per-task.
# srun: a process that is done saving must not have the others killed (they may still be at it), and reading data takes more
# than the one core that Slurm would bind a process to.
batch() {
  cat << SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --output=$NAME-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=$NODES
#SBATCH --gpus-per-node=$GPUS
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@$GRACE_SEC
trap : TERM # the processes are told as well; this script waits for them
for ((failures = 0; failures <= $MAX_FAILURES; failures++)); do
  code=0
  srun --kill-on-bad-exit=0 --wait=$GRACE_SEC --cpu-bind=none $(quoted voxcpm2-jax train "${train[@]}") || code=\$?
  case \$code in
    0 | 2) exit \$code ;;
    75)
      # A job that somebody cancelled is no longer running, and stays away.
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
