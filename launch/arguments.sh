# Sourced by gke.sh, skypilot.sh, slurm.sh and tpu_vm.sh: the part that is the same at every site.
#
#   launch/SITE.sh [--dry-run] -- TRAIN_ARGUMENTS
#
# TRAIN_ARGUMENTS are those of `voxcpm2-jax train`; they are checked for this machine before anything is queued. --dry-run prints what would
# be submitted and submits nothing. Projects, images and storage come from environment variables. A missing variable is one
# line on standard error and exit code 2.
#
# `voxcpm2-jax train` resumes from its last checkpoint, so a launcher only decides whether to start it again:
#
#   exit code   meaning                       the launcher
#   0           done                          stops
#   2           a mistake in the arguments    stops: it would fail again
#   75          preempted after saving        starts again, without limit
#   other       failed, or was killed         starts again, at most MAX_FAILURES times (default 10)
#
# Sets: dry_run (empty or "yes"), flags (options before -- other than --dry-run), train (array of TRAIN_ARGUMENTS).
# shellcheck shell=bash disable=SC2034

mistake() {
  echo "error: $1" >&2
  exit 2
}

# need NAME MEANING: refuses an unset variable.
need() {
  [ -n "${!1:-}" ] || mistake "$1 is not set; expected $2 (see $0 --help)"
}

# whole NAME..: refuses variables that are not whole numbers of 1 or more.
whole() {
  local name
  for name in "$@"; do
    [[ "${!name}" =~ ^[1-9][0-9]{0,8}$ ]] || mistake "$name is '${!name}'; expected a whole number of 1 or more"
  done
}

dry_run='' flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    -h | --help) sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --*) flags+=("$1") ;;
    *) mistake "unexpected argument '$1' before --; expected $0 [--dry-run] -- TRAIN_ARGUMENTS" ;;
  esac
  shift
done
[ $# -gt 1 ] || mistake "no training arguments; expected $0 [--dry-run] -- --config=... --data=... --workdir=..."
train=("${@:2}")
[[ "${train[*]}" != *[[:cntrl:]]* ]] ||
  mistake "a training argument contains a line break or another control character; remove it"
command -v voxcpm2-jax > /dev/null ||
  mistake "voxcpm2-jax is not installed here; it checks the training arguments: pip install --editable ."

NAME="${NAME:-voxcpm2}"
MAX_FAILURES="${MAX_FAILURES:-10}"
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  mistake "NAME is '$NAME'; expected at most 40 lower-case letters, digits and -, a letter first"
[[ "$MAX_FAILURES" =~ ^[0-9]{1,9}$ ]] || mistake "MAX_FAILURES is '$MAX_FAILURES'; expected a whole number"

# check_training [SLICESx]DEVICES: checks the training arguments, and that every stage's batch can be split over the devices.
check_training() {
  voxcpm2-jax train --dry-run --topology="$1" "${train[@]}" > /dev/null || exit
}

# check_sizes LEAST UNITSxDEVICES [SLICESx]DEVICES: for a start with fewer slices or nodes than UNITS. Adds --planned to the
# training arguments, by which `train` fits mesh and accumulate to what has started.
# Sets: sizes (array: from UNITS down to LEAST, those that every stage's batch can be split over).
check_sizes() {
  local size
  sizes=()
  train+=("--planned=$2")
  for size in $(voxcpm2-jax train --dry-run --topology="$3" "${train[@]}" | sed 's/.*"sizes": \[\([^]]*\)\].*/\1/; s/,//g'); do
    ((size < $1)) || sizes=("$size" "${sizes[@]}")
  done
  [ ${#sizes[@]} -gt 0 ] || exit 2
}

# read_topology: parses TOPOLOGY, in the notation of `voxcpm2-jax plan` (4xv6e:8x8 is four slices of 8 x 8 chips).
# Sets: slices (their number), chip (kind), shape, chips (in a slice), sizes (numbers of slices to start with, falling).
read_topology() {
  need TOPOLOGY "[SLICESx]CHIP:SHAPE such as v5e:16x16 or 4xv6e:8x8"
  [[ "$TOPOLOGY" =~ ^(([1-9][0-9]*)x)?(v5e|v5p|v6e):([1-9][0-9]*(x[1-9][0-9]*){1,2})$ ]] ||
    mistake "TOPOLOGY is '$TOPOLOGY'; expected [SLICESx]CHIP:SHAPE with v5e, v5p or v6e, such as 4xv6e:8x8"
  slices="${BASH_REMATCH[2]:-1}" chip="${BASH_REMATCH[3]}" shape="${BASH_REMATCH[4]}"
  chips=$((${shape//x/*}))
  check_training "${slices}x$chips"
  MIN_SLICES="${MIN_SLICES:-$slices}" WAIT_SEC="${WAIT_SEC:-3600}"
  whole MIN_SLICES WAIT_SEC
  sizes=("$slices")
  ((MIN_SLICES <= slices)) || mistake "MIN_SLICES is '$MIN_SLICES'; expected at most the $slices slices of TOPOLOGY"
  ((MIN_SLICES == slices)) || check_sizes "$MIN_SLICES" "${slices}x$chips" "${slices}x$chips"
}

# accelerator_type: Cloud TPU's name for a slice. Names of v5p count cores, two per chip; the others count chips.
accelerator_type() {
  case "$chip" in
    v5e) echo "v5litepod-$chips" ;;
    v5p) echo "v5p-$((2 * chips))" ;;
    v6e) echo "v6e-$chips" ;;
  esac
}

# json WORDS: a JSON list, which is also valid YAML.
json() {
  local word list=''
  for word in "$@"; do
    word="${word//\\/\\\\}"
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  echo "[$list]"
}

# quoted WORDS: one line that a shell splits into the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}
