# shellcheck shell=bash
# Sourced: the life of a slice. It is either a queued resource with a node of the same name, or a node alone.

# describe KIND FIELD: its value, or NONE if there is no such thing. Any other failure is one: an error of the network
# must not look like a slice that is gone.
describe() {
  local errors code=0
  errors=$(mktemp)
  tpus "$1" describe "$NAME" --format="value($2)" 2>"$errors" || code=$?
  if ((code)) && grep -q NOT_FOUND "$errors"; then
    code=0
    echo NONE
  elif ((code)); then
    cat "$errors" >&2
  fi
  rm -f "$errors"
  return "$code"
}

# READY, NONE, or what Google calls the state of the queue or of the node. A node that is preempted while its queued
# resource still says ACTIVE counts as what the node says.
slice_state() {
  local queue node
  queue=$(describe queued-resources state.state) || return
  if [[ -n $queue && $queue != ACTIVE && $queue != NONE ]]; then
    echo "$queue"
    return
  fi
  node=$(describe tpu-vm state) || return
  if dry; then node=READY; fi
  if [[ $queue == ACTIVE && $node == NONE ]]; then node=LOST; fi
  echo "$node"
}

# States that nothing leads out of but deleting.
is_lost() {
  case $1 in
    LOST | FAILED | SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | HIDING | HIDDEN) ;;
    *) return 1 ;;
  esac
}

# request_slice queue|now
request_slice() {
  need ACCELERATOR RUNTIME_VERSION
  local flags
  read -ra flags <<<"${CREATE_FLAGS:-}"
  if [[ ${SPOT:-0} == 1 ]]; then flags+=(--spot); fi
  # The workers write to the bucket; what else they may is up to their service account.
  flags+=(--accelerator-type="$ACCELERATOR" --scopes=https://www.googleapis.com/auth/cloud-platform)
  case $1 in
    queue) tpus queued-resources create "$NAME" --node-id="$NAME" --runtime-version="$RUNTIME_VERSION" "${flags[@]}" ;;
    now) tpus tpu-vm create "$NAME" --version="$RUNTIME_VERSION" "${flags[@]}" ;;
  esac
}

# Fails when the slice is lost on the way.
wait_until_ready() {
  local state said=""
  while :; do
    state=$(slice_state) || state=UNKNOWN
    if [[ $state != "$said" ]]; then say "$NAME is $state"; fi
    said=$state
    if [[ $state == READY ]]; then return 0; fi
    if [[ $state == NONE ]] || is_lost "$state"; then return 1; fi
    sleep "$POLL"
  done
}

delete_slice() {
  local queue node
  queue=$(describe queued-resources state.state) || return
  node=$(describe tpu-vm state) || return
  if [[ $queue != NONE ]]; then
    tpus queued-resources delete "$NAME" --force
  elif [[ $node != NONE ]]; then
    tpus tpu-vm delete "$NAME"
  else
    say "there is no slice $NAME in $ZONE"
  fi
}
