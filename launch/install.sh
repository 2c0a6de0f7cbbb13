#!/usr/bin/env bash
# Packs this checkout into the bucket and installs it on all workers. With --again, installs the last package instead.
source "$(dirname "$0")/common.sh"

# Packs the tracked files in their current state, committed or not. The package also contains the commit, for the self
# check, and the date, so that a later installation gets the dependencies of that date.
pack() (
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  cd "$LAUNCH/.."
  commit=$(git rev-parse HEAD) tree=""
  if ! git diff --quiet HEAD; then
    say "packing uncommitted changes, too (untracked files are left out)"
    tree=$(git stash create)
  fi
  echo "$commit${tree:+-dirty}" >"$folder/COMMIT"
  date -u +%Y-%m-%dT%H:%M:%SZ >"$folder/PACKED"
  git archive --format=tar.gz --output="$folder/sources.tar.gz" --add-file="$folder/COMMIT" \
    --add-file="$folder/PACKED" "${tree:-$commit}"
  cloud storage cp --quiet "$folder/sources.tar.gz" "$sources"
)

case "$*" in
  "" | --again) ;;
  *) usage "launch/install.sh [--again]" ;;
esac
load_settings
sources=$HOME_IN_BUCKET/sources.tar.gz
if (($# == 0)); then pack; fi
# The folders of code are replaced, so that a file deleted here disappears there. Data and .venv stay.
on_workers all "set -eo pipefail; mkdir -p mask2dit_jax; cd mask2dit_jax; rm -rf mask2dit_jax configs launch; \
gcloud storage cat $(quoted "$sources") | tar -xz; $(quoted env WEIGHTS="${WEIGHTS:-}") bash launch/worker/install.sh"
say "installed on all workers of $NAME; next: launch/run.sh STAGE --flag=value ..."
