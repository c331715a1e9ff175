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

# pip_install WHAT ARGUMENTS..: prints one line that says WHAT, then installs; pip's progress goes to a log file.
pip_install() {
  local log="$VIRTUAL_ENV/install.log"
  echo "installing $1 into $VIRTUAL_ENV (log: $log)" >&2
  python -m pip install -qq --log "$log" "${@:2}"
}
