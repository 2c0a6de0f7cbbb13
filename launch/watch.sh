#!/usr/bin/env bash
# Runs a stage to its end, through preemptions. Creates the slice if needed, installs and runs, and starts over when the
# slice is lost; the run resumes from its --workdir. Run this script where it can keep running (tmux, a small VM). If it
# is restarted while the job runs, it continues to watch the job.
source "$(dirname "$0")/common.sh"
source "$LAUNCH/slice.sh"

(($# > 0)) || usage "launch/watch.sh STAGE [--flag=value ...]"
check_stage "$1"
load_settings
need ACCELERATOR RUNTIME_VERSION

# Returns when a slice is ready. A refused request ends the script only if it is the first, as the settings are wrong.
ensure_slice() {
  local state
  while :; do
    state=$(slice_state) || state=UNKNOWN
    if dry || [[ $state == NONE ]]; then
      request_slice queue || ((requests)) || die "slice $NAME was refused; see the message of gcloud above"
      requests=$((requests + 1))
    elif is_lost "$state"; then
      say "$NAME is $state; deleting it"
      delete_slice || say "it cannot be deleted yet"
    fi
    if wait_until_ready; then return; fi
    sleep "$POLL"
  done
}

# Prints done, failed, lost (no process and no exit code, because the VM has restarted), running or none. Fails if a
# worker does not answer.
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

# Waits for the job and prints how it ended: done, failed or lost.
follow_job() {
  local outcome state failures=0
  while :; do
    outcome=$(job_outcome) || outcome=unknown
    state=$(slice_state) || state=UNKNOWN
    # A preemption kills the job before the slice, so a failure counts only if the slice still exists at the next check.
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

# Installs and runs. Later starts reuse the first package, so that changes of the checkout do not affect the run.
start_job() {
  "$LAUNCH/install.sh" ${packed[@]+"${packed[@]}"} || return
  packed=(--again)
  "$LAUNCH/run.sh" "$@"
}

requests=0 starts_failed=0 packed=()
ensure_slice
until outcome=$(job_outcome); do sleep "$POLL"; done
if [[ $outcome == running ]]; then
  say "a job is running already; watching it"
  packed=(--again)
  outcome=$(follow_job)
else
  outcome=lost
fi
while [[ $outcome == lost ]]; do
  ensure_slice
  STOP_WAIT=30 "$LAUNCH/job.sh" stop || : # some workers may wait in vain for others that have restarted
  if start_job "$@"; then
    starts_failed=0
    outcome=$(follow_job)
    if [[ $outcome == lost ]]; then say "the job is lost; running it again"; fi
  else
    if ((++starts_failed == 3)); then
      die "the job cannot be started on $NAME; the slice still exists (launch/delete.sh)"
    fi
    sleep "$POLL"
  fi
done
[[ $outcome == "done" ]] ||
  die "the job failed; launch/job.sh logs WORKER shows why, and the slice still exists (launch/delete.sh)"
say "done; the slice still exists (launch/delete.sh)"
