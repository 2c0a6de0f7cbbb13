# shellcheck shell=bash
# Sourced by every script. Holds the settings, the quoting, and the only way to call gcloud.

set -euo pipefail
shopt -s inherit_errexit # bash 4.4

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ENV_FILE=${ENV_FILE:-$LAUNCH/env}
POLL=${POLL:-60} # seconds between two checks of a slice or a job

# File descriptor of a dry run's output. It reaches the terminal even from inside $(...) and from nested scripts.
if [[ -z ${DRY_RUN_OUT:-} ]]; then
  exec {DRY_RUN_OUT}>&1
  export DRY_RUN_OUT
fi

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

usage() { die "usage: $*"; }

# need NAME...: fails unless all these variables are set.
need() {
  local name missing=()
  for name; do [[ -n ${!name:-} ]] || missing+=("$name"); done
  ((${#missing[@]} == 0)) || die "not set: ${missing[*]}; fill in $ENV_FILE (see launch/env.example)"
}

# Rejects a mistyped stage before a slice is created for it.
check_stage() {
  [[ $1 =~ ^[a-z_]+$ && -f $LAUNCH/../mask2dit_jax/$1.py ]] ||
    die "there is no stage $1; a stage is a file mask2dit_jax/STAGE.py, such as train or self_check"
}

load_settings() {
  # shellcheck source=env.example
  if [[ -f $ENV_FILE ]]; then source "$ENV_FILE"; fi
  need PROJECT ZONE NAME BUCKET
  [[ $BUCKET == gs://?* ]] || die "BUCKET=$BUCKET does not start with gs://"
  # shellcheck disable=SC2153 # NAME is a setting
  export HOME_IN_BUCKET=${BUCKET%/}/$NAME
}

dry() { [[ ${DRY_RUN:-0} == 1 ]]; }

# Quotes words for a shell, so that spaces and quotes inside a word survive the way to a worker.
quoted() {
  local line
  printf -v line ' %q' "$@"
  printf '%s' "${line# }"
}

cloud() {
  if dry; then
    printf '+ gcloud %s\n' "$(quoted "$@")" >&"$DRY_RUN_OUT"
  else
    gcloud "$@"
  fi
}

tpus() { cloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

# on_workers all|NUMBER COMMAND: runs the command, a single string, in the shell of the workers.
on_workers() {
  local flags
  read -ra flags <<<"${SSH_FLAGS:-}"
  # A lost worker must not block the script, so no answer for a minute is an error.
  tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2" ${flags[@]+"${flags[@]}"} --ssh-flag="-o ConnectTimeout=30" \
    --ssh-flag="-o ServerAliveInterval=15" --ssh-flag="-o ServerAliveCountMax=4"
}
