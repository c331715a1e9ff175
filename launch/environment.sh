# Sourced by quickstart.sh, test.sh and fast.sh, in the repository's root: the Python environment that they run in.
# shellcheck shell=bash

# use_environment: the active environment; if none is active, .venv, which is created with $PYTHON (default python3).
use_environment() {
  [ -z "${VIRTUAL_ENV:-}" ] || return 0
  if [ ! -x .venv/bin/python ]; then
    echo "creating the environment .venv with ${PYTHON:-python3}" >&2
    "${PYTHON:-python3}" -m venv .venv
  fi
  . .venv/bin/activate
}

# pip_install WHAT ARGUMENTS..: prints one line that says WHAT, then installs. pip's own output goes to a log file; if pip
# fails, its end is printed.
pip_install() {
  local log="$VIRTUAL_ENV/install.log"
  echo "installing $1 into $VIRTUAL_ENV (log: $log)" >&2
  if ! python -m pip install --progress-bar off "${@:2}" >> "$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "error: pip failed; see $log" >&2
    exit 1
  fi
}
