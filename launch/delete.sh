#!/usr/bin/env bash
# Deletes the slice, queued or not; what is in the bucket stays.
source "$(dirname "$0")/common.sh"
source "$LAUNCH/slice.sh"

(($# == 0)) || usage "launch/delete.sh"
load_settings
delete_slice
