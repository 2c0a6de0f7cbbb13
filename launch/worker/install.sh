#!/usr/bin/env bash
# Installs the package from its unpacked sources into a virtual environment on a worker. Cloud TPU images have Python
# 3.10, but the package needs 3.11. uv provides a newer one and installs dependencies as of the date of packing.
set -euo pipefail

cd "$(dirname "$0")/../.."
export PATH=$HOME/.local/bin:$PATH PIP_BREAK_SYSTEM_PACKAGES=1
command -v uv >/dev/null || python3 -m pip install --user --quiet uv
uv venv --quiet --allow-existing --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --exclude-newer "$(<PACKED)" \
  --constraint constraints.txt --editable '.[tpu]'
# Weight files are memory-mapped, so they must be on a disk. Each worker has its own copy, which is updated here.
if [[ -n ${WEIGHTS:-} ]]; then
  target=weights/$(basename "$WEIGHTS")
  mkdir -p "$target"
  gcloud storage rsync --recursive --quiet "$WEIGHTS" "$target"
fi
