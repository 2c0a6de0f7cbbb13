#!/usr/bin/env bash
# Queues a slice and waits until it is ready. With --now, the slice is created immediately or not at all.
source "$(dirname "$0")/common.sh"
source "$LAUNCH/slice.sh"

case "$*" in
  "") how=queue ;;
  --now) how=now ;;
  *) usage "launch/create.sh [--now]" ;;
esac
load_settings
request_slice "$how" || die "slice $NAME was refused; see the message of gcloud above"
wait_until_ready || die "slice $NAME did not become ready; run launch/delete.sh, then create it again"
say "next: launch/install.sh"
