#!/usr/bin/env bash
# Lints and tests everything: makes .venv unless an environment is active, installs what the tests need, the reference
# package included, then runs ruff and pytest. Arguments go to pytest: launch/test.sh -k loop
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  . .venv/bin/activate
fi
python -m pip install -qq --editable '.[test,demo,eval,torch,tpu]' transformers einops pydantic
# The reference brings a web demo and downloaders along, the speaker encoder a C extension to be compiled; the comparisons
# need their models alone.
python -m pip install -qq --no-deps voxcpm==2.0.3 resemblyzer==0.1.4

ruff check .
python -m pytest -n 2 --dist loadfile "$@"
