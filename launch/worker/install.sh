#!/usr/bin/env bash
# On a worker, in the unpacked sources: a virtual environment with the package. Cloud TPU images bring Python 3.10, the
# package needs 3.11; uv brings one, and takes the packages of the day the sources were packed on.
set -euo pipefail

cd "$(dirname "$0")/../.."
export PATH=$HOME/.local/bin:$PATH PIP_BREAK_SYSTEM_PACKAGES=1
command -v uv >/dev/null || python3 -m pip install --user --quiet uv
uv venv --quiet --allow-existing --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --exclude-newer "$(<PACKED)" --editable '.[tpu]'
# Weight files are mapped into memory, so they must be on a disk: each worker has its copy, brought up to date.
if [[ -n ${WEIGHTS:-} ]]; then
  target=weights/$(basename "$WEIGHTS")
  mkdir -p "$target"
  gcloud storage rsync --recursive --quiet "$WEIGHTS" "$target"
fi
