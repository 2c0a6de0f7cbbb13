#!/usr/bin/env bash
# Runs a stage to its end, through preemptions: makes the slice if need be, installs, runs, and does it again when the
# slice is lost. The run resumes from its --workdir. Start it where it can stay (tmux, a small VM); started again while
# the job runs, it goes on watching.
source "$(dirname "$0")/common.sh"
source "$LAUNCH/slice.sh"

(($# > 0)) || usage "launch/watch.sh STAGE [--flag=value ...]"
check_stage "$1"
load_settings
need ACCELERATOR RUNTIME_VERSION

# Returns with a slice that is ready. Only a very first request that is refused ends the watch: the settings are wrong.
ensure_slice() {
  local state
  while :; do
    state=$(slice_state) || state=UNKNOWN
    if dry || [[ $state == NONE ]]; then
      request_slice queue || ((requests)) || die "slice $NAME was refused; gcloud says why"
      requests=$((requests + 1))
    elif is_lost "$state"; then
      say "$NAME is $state: deleting what is left of it"
      delete_slice || say "it cannot be deleted yet"
    fi
    if wait_until_ready; then return; fi
    sleep "$POLL"
  done
}

# done, failed, lost (no process, no exit code: the VM has restarted), running or none; fails if a worker is silent.
job_outcome() {
  local status
  status=$("$LAUNCH/job.sh" status) || return
  if dry; then status=" exit 0"; fi
  case $status in
    *" exit "[1-9]*) echo failed ;;
    *" lost"*) echo lost ;;
    *" running"*) echo running ;;
    *" exit 0"*) echo "done" ;;
    *) echo none ;;
  esac
}

# Prints how the job ended: done, failed or lost.
follow_job() {
  local outcome state failures=0
  while :; do
    outcome=$(job_outcome) || outcome=unknown
    state=$(slice_state) || state=UNKNOWN
    # A slice that is being preempted kills its job first: believe a failure when the slice is still there a look later.
    if [[ $outcome == failed ]]; then failures=$((failures + 1)); fi
    if [[ $outcome == "done" ]] || ((failures > 1)); then break; fi
    if [[ $outcome == lost || $outcome == none || $state == NONE ]] || is_lost "$state"; then
      outcome=lost
      break
    fi
    sleep "$POLL"
  done
  echo "$outcome"
}

# The second time, what was packed the first time: a checkout that has changed since does not change the run.
start_job() {
  "$LAUNCH/install.sh" ${packed[@]+"${packed[@]}"} || return
  packed=(--again)
  "$LAUNCH/run.sh" "$@"
}

requests=0 starts_failed=0 packed=()
ensure_slice
until outcome=$(job_outcome); do sleep "$POLL"; done
if [[ $outcome == running ]]; then
  say "a job runs already: watching it"
  packed=(--again)
  outcome=$(follow_job)
else
  outcome=lost
fi
while [[ $outcome == lost ]]; do
  ensure_slice
  STOP_WAIT=30 "$LAUNCH/job.sh" stop || : # where some workers have restarted and others wait for them in vain
  if start_job "$@"; then
    starts_failed=0
    outcome=$(follow_job)
    if [[ $outcome == lost ]]; then say "the job is lost: running it again"; fi
  else
    if ((++starts_failed == 3)); then
      die "the job cannot be started on $NAME; the slice is still there (launch/delete.sh)"
    fi
    sleep "$POLL"
  fi
done
[[ $outcome == "done" ]] ||
  die "the job failed; launch/job.sh logs WORKER says why, and the slice is still there (launch/delete.sh)"
say "done; the slice is still there (launch/delete.sh)"
