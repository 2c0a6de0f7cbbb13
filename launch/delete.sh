#!/usr/bin/env bash
# Deletes the slice, queued or running. The bucket is not touched.
source "$(dirname "$0")/common.sh"
source "$LAUNCH/slice.sh"

(($# == 0)) || usage "launch/delete.sh"
load_settings
delete_slice
