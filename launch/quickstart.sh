#!/usr/bin/env bash
# From nothing to a speaking model: makes a corpus of spoken digits, trains a codec and a voice on it from scratch,
# generates held-out strings, scores them with Whisper, and exports the model for PyTorch.
#
#   launch/quickstart.sh [demo|demo_long|tiny] [WORKDIR]      default: demo runs/demo
#
# Uses the active environment, or makes .venv with $PYTHON, and installs what it needs. A finished step is not repeated, and
# a training that was stopped resumes: start the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
variant="${1:-demo}"
work="${2:-runs/$variant}"
case "$variant" in
  demo | demo_long) judge=digits ;;
  tiny) judge=tiny ;;
  *) echo "error: expected demo, demo_long or tiny, got '$variant'" >&2; exit 2 ;;
esac

use_environment
extras=demo,eval
if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then extras="$extras,cuda"; fi
pip_install "the package with the extras $extras (about 100 packages, 2 min the first time)" --editable ".[$extras]"

# Huge pages take a quarter off the codec's training step on a CPU and a tenth off the voice's.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

started=$SECONDS
step() { printf '\n== %s (%d min)\n' "$1" $(((SECONDS - started) / 60)) >&2; }

step "1/7 speech: digit strings by a neural English voice, words of five more languages by espeak-ng"
[ -d "$work/recordings" ] || voxcpm2-jax prepare --config="configs/data.py:$variant" --output="$work/recordings"
step "2/7 codec: trained from scratch"
voxcpm2-jax train-vae --config="configs/vae.py:$variant" --data="$work/recordings/train.jsonl" --workdir="$work/codec"
step "3/7 shards: text ids and latents"
[ -f "$work/shards/header.json" ] || voxcpm2-jax prepare --config="configs/data.py:$variant" \
  --config.source=manifest --config.manifest="$work/recordings/train.jsonl" --vae="$work/codec" --output="$work/shards"
step "4/7 voice: trained from scratch"
voxcpm2-jax train --config="configs/backbone.py:$variant" --data="$work/shards" --workdir="$work/voice"
step "5/7 evaluation: held-out strings, scored by Whisper"
voxcpm2-jax evaluate --config="configs/evaluate.py:$judge" --checkpoint="$work/voice" \
  --data="$work/recordings/heldout.jsonl" --output="$work/judged"
step "6/7 export: a directory that the PyTorch package loads"
[ -d "$work/exported" ] || voxcpm2-jax export-torch "$work/voice" "$work/exported"
step "7/7 the exported model speaks"
voxcpm2-jax generate --checkpoint="$work/exported" --text="three one four" --seed=0 --output="$work/three_one_four.wav"
step "done: $work/judged/result.json, spectrograms beside it, $work/three_one_four.wav"
