#!/usr/bin/env bash
# The two-minute loop: ruff, then the tests marked "fast". Installs nothing: run launch/test.sh once before.
# Arguments go to pytest: launch/fast.sh -x. To run it before every commit:
#
#   ln -s ../../launch/fast.sh .git/hooks/pre-commit
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
. launch/environment.sh

if [ -z "${VIRTUAL_ENV:-}" ] && [ ! -x .venv/bin/python ]; then
  echo "error: no environment is active and there is no .venv; run launch/test.sh once, which makes it" >&2
  exit 2
fi
use_environment
# Compiled programs are kept from run to run.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.pytest_cache/compiled}"

ruff check .
# Only their files: pytest would import all others too, which takes a while and needs torch.
mapfile -t files < <(grep -rl --include='test_*.py' 'pytest.mark.fast' tests)
python -m pytest -m fast -n 2 --dist loadfile "${files[@]}" "$@"
