#!/usr/bin/env bash
# Packs this checkout into the bucket and installs it on all workers; with --again, what was packed the last time.
source "$(dirname "$0")/common.sh"

# Tracked files as they are now, committed or not; with them the commit, for the self check, and the day, so that
# whoever installs this later gets the packages of that day.
pack() (
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  cd "$LAUNCH/.."
  commit=$(git rev-parse HEAD) tree=""
  if ! git diff --quiet HEAD; then
    say "packing changes that are not committed, too (files that git does not track stay here)"
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
# Folders that hold code are replaced, so that a file deleted here is deleted there; data and .venv stay.
on_workers all "set -eo pipefail; mkdir -p mask2dit_jax; cd mask2dit_jax; rm -rf mask2dit_jax configs launch; \
gcloud storage cat $(quoted "$sources") | tar -xz; $(quoted env WEIGHTS="${WEIGHTS:-}") bash launch/worker/install.sh"
say "installed on all workers of $NAME; next: launch/run.sh STAGE --flag=value ..."
