#!/usr/bin/env bash
# Manages the job of a worker, which runs one job at a time. `start` detaches it from the ssh session. The job's folder
# contains the files pid, log and exit.
set -euo pipefail

REPO=$(cd "$(dirname "$0")/../.." && pwd)
JOBS=$HOME/mask2dit_jobs
PYTHON=${PYTHON:-$REPO/.venv/bin/python}
UPLOAD_EVERY=${UPLOAD_EVERY:-60}
# JAX takes 100 s to notice a dead worker. A worker that restarts earlier meets others that still wait for its old
# process. Three restarts a minute apart outlast that.
RESTART_DELAY=${RESTART_DELAY:-60}
STOP_WAIT=${STOP_WAIT:-600} # seconds for the current step to end and for its checkpoint to reach the bucket
# An attempt of ten minutes shows that the job can run, so the count of restarts begins anew, unless the attempt ended
# with the same error message as the one before.
GOOD_WHILE=${GOOD_WHILE:-600}

# Prints the number of this worker. GKE sets a variable; a TPU VM has it in its metadata.
worker_number() {
  local metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
  echo "${TPU_WORKER_ID:-$(curl -sf -H 'Metadata-Flavor: Google' "$metadata")}"
}

current_job() { cat "$JOBS/current" 2>/dev/null || echo none; }

is_running() { [[ -f $1/pid && ! -f $1/exit ]] && kill -0 -- "-$(<"$1/pid")" 2>/dev/null; }

upload() { gcloud storage cp --quiet "$1" "$HOME_IN_BUCKET/jobs/$(basename "$(dirname "$1")")/$2" >/dev/null; }

start() {
  local folder=$JOBS/$1
  if is_running "$JOBS/$(current_job)"; then
    echo "error: worker $number runs $(current_job); stop it with launch/job.sh stop" >&2
    exit 1
  fi
  mkdir -p "$folder"
  echo "$1" >"$JOBS/current"
  # In its own session, the job outlives ssh, and stop can signal the whole process group. Wait until the group exists:
  # a status request before that would report the job as lost.
  setsid nohup bash "$0" loop "$@" >"$folder/log" 2>&1 </dev/null &
  while kill -0 $! 2>/dev/null && ! kill -0 -- -$! 2>/dev/null; do sleep 0.05; done
  echo $! >"$folder/pid"
}

loop() {
  local folder=$JOBS/$1 stage=$2 left=${RESTARTS:-3} code began uploader printed why before=""
  keep_uploading "$folder" &
  uploader=$!
  while :; do
    began=$SECONDS code=0 printed=$(wc -c <"$folder/log")
    attempt "${@:2}" || code=$?
    why=$(tail -c "+$((printed + 1))" "$folder/log" | grep '^error: ' | tail -n 1) || :
    if ((code && SECONDS - began >= GOOD_WHILE)) && [[ -z $why || $why != "$before" ]]; then left=${RESTARTS:-3}; fi
    before=$why
    if ((code == 0 || left-- <= 0)); then break; fi
    echo "$stage exited with $code; restarting it, with ${left} restarts left after this one"
    sleep "$RESTART_DELAY"
  done
  kill "$uploader"
  wait "$uploader" || :
  finish "$folder" "$code"
}

attempt() {
  cd "$REPO"
  if [[ $1 != self_check && ${CHECK:-1} == 1 ]]; then
    "$PYTHON" -m mask2dit_jax.self_check --bucket="${HOME_IN_BUCKET%/*}" || return
  fi
  "$PYTHON" -m "mask2dit_jax.$1" "${@:2}"
}

# On SIGTERM, end the upload under way, so that no older log replaces the last one.
keep_uploading() {
  local sleeper
  trap 'kill "$sleeper" 2>/dev/null || :; exit 0' TERM
  while :; do
    sleep "$UPLOAD_EVERY" &
    sleeper=$!
    wait "$sleeper"
    upload "$1/log" "worker_$number.log" || echo "cannot upload the log"
  done
}

finish() {
  echo "$2" >"$1/exit.new"
  mv "$1/exit.new" "$1/exit" # whoever finds it finds the code in it
  upload "$1/log" "worker_$number.log" || :
  upload "$1/exit" "worker_$number.exit" || :
}

# Prints one line, which launch/watch.sh parses.
status() {
  local folder
  folder=$JOBS/$(current_job)
  if [[ -f $folder/exit ]]; then
    echo "worker $number: $(basename "$folder") exit $(<"$folder/exit")"
  elif is_running "$folder"; then
    echo "worker $number: $(basename "$folder") running"
  elif [[ -f $folder/pid ]]; then
    echo "worker $number: $(basename "$folder") lost"
  else
    echo "worker $number: none"
  fi
}

stop() {
  local folder group
  folder=$JOBS/$(current_job)
  is_running "$folder" || return 0
  group=$(<"$folder/pid")
  kill -TERM -- "-$group"
  local until=$((SECONDS + STOP_WAIT))
  while ((SECONDS < until)) && kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
  kill -KILL -- "-$group" 2>/dev/null || :
  finish "$folder" 143
}

number=$(worker_number)
case ${1:-} in
  start | loop) "$@" ;;
  status | stop) "$1" ;;
  follow) tail -n 100 -F "$JOBS/$(current_job)/log" ;;
  *)
    echo "error: usage: launch/worker/job.sh start JOB STAGE [--flag=value ...] | status | stop | follow" >&2
    exit 1
    ;;
esac
