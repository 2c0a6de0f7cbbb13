#!/usr/bin/env bash
# Queues a slice (or, with --now, creates it at once or fails) and waits until it is ready.
source "$(dirname "$0")/common.sh"
source "$LAUNCH/slice.sh"

case "$*" in
  "") how=queue ;;
  --now) how=now ;;
  *) usage "launch/create.sh [--now]" ;;
esac
load_settings
request_slice "$how" || die "slice $NAME was refused; gcloud says why"
wait_until_ready || die "slice $NAME did not get ready; launch/delete.sh, then create it again"
say "next: launch/install.sh"
