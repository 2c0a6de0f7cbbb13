#!/usr/bin/env bash
# Shows or stops the job of the slice. `logs` reads the log of the newest job, or of the job named in JOB.
source "$(dirname "$0")/common.sh"

usage_line="launch/job.sh status | stop | logs [WORKER] | follow [WORKER]"
(($# == 1 || $# == 2)) || usage "$usage_line"
worker=${2:-0}
[[ $worker =~ ^[0-9]+$ ]] || usage "$usage_line"
load_settings

# Prints the command for a worker. It does nothing on a worker without an installation.
at_worker() {
  local script=mask2dit_jax/launch/worker/job.sh
  echo "test ! -f $script || $(quoted env HOME_IN_BUCKET="$HOME_IN_BUCKET" ${STOP_WAIT:+STOP_WAIT="$STOP_WAIT"} bash $script "$1")"
}

newest_job() {
  local folders
  folders=$(cloud storage ls "$HOME_IN_BUCKET/jobs/")
  basename "$(tail -n 1 <<<"$folders")"
}

case $1 in
  status | stop) on_workers all "$(at_worker "$1")" ;;
  follow) on_workers "$worker" "$(at_worker follow)" ;;
  # Read from the bucket, because the slice may no longer exist.
  logs) cloud storage cat "$HOME_IN_BUCKET/jobs/${JOB:-$(newest_job)}/worker_$worker.log" ;;
  *) usage "$usage_line" ;;
esac
