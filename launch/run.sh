#!/usr/bin/env bash
# Starts a stage on all workers. The job keeps running when this machine is switched off.
source "$(dirname "$0")/common.sh"

(($# > 0)) || usage "launch/run.sh STAGE [--flag=value ...], e.g. launch/run.sh train --config=configs/sft.py:5b"
stage=$1
check_stage "$stage"
load_settings

job=$(date -u +%Y%m%d-%H%M%S)-$stage # the newest job sorts last
variables=(HOME_IN_BUCKET="$HOME_IN_BUCKET")
for variable in LIBTPU_INIT_ARGS XLA_FLAGS CHECK RESTARTS ${PASS_ENV:-}; do
  if [[ -n ${!variable:-} ]]; then variables+=("$variable=${!variable}"); fi
done
on_workers all "$(quoted env "${variables[@]}" bash mask2dit_jax/launch/worker/job.sh start "$job" "$@")"
say "job $job runs on all workers of $NAME; launch/job.sh status|logs|follow|stop; logs in $HOME_IN_BUCKET/jobs/$job"
