#!/usr/bin/env bash
# Lints and tests everything: installs what the tests need, the PyTorch package included, then runs ruff and pytest.
# Uses the active environment, or makes .venv with $PYTHON. Arguments go to pytest: launch/test.sh -k loop
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

use_environment
pip_install "the package and what its tests need (about 200 packages, 4 min the first time)" \
  --editable '.[test,demo,eval,torch,tpu,lhotse]' transformers einops pydantic
# --no-deps: the tests use only the models of these two. voxcpm would bring a web demo and downloaders along, resemblyzer a C
# extension that has to be compiled.
pip_install "the PyTorch package (voxcpm) and the speaker encoder (resemblyzer)" --no-deps voxcpm==2.0.3 resemblyzer==0.1.4

ruff check .
# In the order of their names: xdist would begin with the files of most tests, and end with the few long ones on one core.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
