#!/usr/bin/env bash
# Runs the fast tests on the newest JAX, in the environment .venv-newest: new releases of JAX need a newer Python than the
# oldest that this package supports. Uses $PYTHON or the newest of python3.14, 3.13, 3.12 on PATH or among pyenv's versions.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
. launch/environment.sh

newest_python() {
  local candidate
  for candidate in ${PYTHON:-} {python3.14,"$HOME"/.pyenv/versions/3.14.*/bin/python} \
    {python3.13,"$HOME"/.pyenv/versions/3.13.*/bin/python} {python3.12,"$HOME"/.pyenv/versions/3.12.*/bin/python}; do
    # Run it: pyenv puts commands on PATH that only say that their version is not chosen.
    if "$candidate" -c "import ensurepip, venv" 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
}

export VIRTUAL_ENV="$PWD/.venv-newest"
if [ ! -x "$VIRTUAL_ENV/bin/python" ]; then
  python="$(newest_python)"
  if [ -z "$python" ]; then
    echo "not run: the fast tests on the newest JAX need Python 3.12 or newer, and none was found; set PYTHON to one" >&2
    exit 0
  fi
  echo "creating the environment .venv-newest with $("$python" --version)" >&2
  "$python" -m venv "$VIRTUAL_ENV"
fi
export PATH="$VIRTUAL_ENV/bin:$PATH"
pip_install "the package and the tests' tools (about 130 packages, 3 min the first time)" --editable '.[test]'
python -c "import jax; print('the fast tests run on jax', jax.__version__)" >&2
exec bash launch/fast.sh "$@"
