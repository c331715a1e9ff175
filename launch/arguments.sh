# Sourced by every launcher of this directory: what they have in common.
#
#   launch/SITE.sh [--dry-run] -- TRAIN_ARGUMENTS
#
# TRAIN_ARGUMENTS are those of `voxcpm2-jax train`, the same at every site; they are checked before anything is queued.
# --dry-run prints what would be submitted and submits nothing. Hosts, projects, images and paths come from the
# environment; what is missing is one line on standard error and exit code 2.
#
# `voxcpm2-jax train` goes on from its last checkpoint when it is started again, so a launcher only has to know when:
#
#   exit code   means                         then
#   0           done                          stop
#   2           a mistake in the arguments    stop: it would come again
#   75          preempted after saving        start again, however often
#   other       it failed, or was killed      start again, MAX_FAILURES times (default 10)
#
# Variables for those who source it: dry_run (empty or yes), flags (other options that stood before --), train (an array).
# shellcheck shell=bash disable=SC2034

mistake() {
  echo "error: $1" >&2
  exit 2
}

# need NAME MEANING: the environment has to say.
need() {
  [ -n "${!1:-}" ] || mistake "$1 is not set; expected $2 (see the top of $0)"
}

# whole NAME..: each of them is a whole number over 0.
whole() {
  local name
  for name in "$@"; do
    [[ "${!name}" =~ ^[1-9][0-9]{0,8}$ ]] || mistake "$name '${!name}' is no whole number over 0"
  done
}

dry_run='' flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    -h | --help) sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --*) flags+=("$1") ;;
    *) mistake "'$1' stands before --; expected $0 [--dry-run] -- TRAIN_ARGUMENTS" ;;
  esac
  shift
done
[ $# -gt 1 ] || mistake "no arguments for training; expected $0 [--dry-run] -- --config=... --data=... --workdir=..."
train=("${@:2}")
[[ "${train[*]}" != *[[:cntrl:]]* ]] || mistake "the arguments for training hold a line break or another control character"
command -v voxcpm2-jax > /dev/null || mistake "no voxcpm2-jax here, which checks the arguments: pip install --editable ."
voxcpm2-jax train --dry-run "${train[@]}" > /dev/null || exit

NAME="${NAME:-voxcpm2}"
MAX_FAILURES="${MAX_FAILURES:-10}"
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || mistake "NAME '$NAME' is no name for a job: small letters, digits and -"
[[ "$MAX_FAILURES" =~ ^[0-9]{1,9}$ ]] || mistake "MAX_FAILURES '$MAX_FAILURES' is no number"

# TOPOLOGY, written as for `voxcpm2-jax plan`: 4xv6e:8x8 is four slices -> slices, chip, shape, chips (of a slice).
read_topology() {
  need TOPOLOGY "[SLICESx]CHIP:SHAPE such as v5e:16x16 or 4xv6e:8x8"
  [[ "$TOPOLOGY" =~ ^(([1-9][0-9]*)x)?(v5e|v5p|v6e):([1-9][0-9]*(x[1-9][0-9]*){1,2})$ ]] ||
    mistake "TOPOLOGY '$TOPOLOGY' is none; expected [SLICESx]CHIP:SHAPE with v5e, v5p or v6e, such as 4xv6e:8x8"
  slices="${BASH_REMATCH[2]:-1}" chip="${BASH_REMATCH[3]}" shape="${BASH_REMATCH[4]}"
  chips=$((${shape//x/*}))
}

# accelerator_type: Cloud TPU's name of a slice. v5p counts cores, two a chip; the others chips.
accelerator_type() {
  case "$chip" in
    v5e) echo "v5litepod-$chips" ;;
    v5p) echo "v5p-$((2 * chips))" ;;
    v6e) echo "v6e-$chips" ;;
  esac
}

# json WORDS: a JSON list, which YAML takes as well.
json() {
  local word list=''
  for word in "$@"; do
    word="${word//\\/\\\\}"
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  echo "[$list]"
}

# quoted WORDS: one line that a shell takes apart again.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}
