# shellcheck shell=bash
# Sourced. The life cycle of a slice, which is a queued resource with a node of the same name, or only a node.

# describe KIND FIELD: prints the value of a field, or NONE if the resource does not exist. Any other error is a
# failure, because a network error must not look like a lost slice.
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

# Prints READY, NONE, or Google's name for the state of the queued resource or the node. If the queued resource is
# ACTIVE, the state of the node counts, because a preempted node may leave its queued resource ACTIVE.
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

# Whether a slice in this state can only be deleted.
is_lost() {
  case $1 in
    LOST | FAILED | SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | HIDING | HIDDEN) ;;
    *) return 1 ;;
  esac
}

# request_slice queue|now: requests the slice.
request_slice() {
  need ACCELERATOR RUNTIME_VERSION
  local flags
  read -ra flags <<<"${CREATE_FLAGS:-}"
  if [[ ${SPOT:-0} == 1 ]]; then flags+=(--spot); fi
  # The workers need to write to the bucket. Their service account limits what else they may do.
  flags+=(--accelerator-type="$ACCELERATOR" --scopes=https://www.googleapis.com/auth/cloud-platform)
  case $1 in
    queue) tpus queued-resources create "$NAME" --node-id="$NAME" --runtime-version="$RUNTIME_VERSION" "${flags[@]}" ;;
    now) tpus tpu-vm create "$NAME" --version="$RUNTIME_VERSION" "${flags[@]}" ;;
  esac
}

# Fails if the slice is lost before it is ready.
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
