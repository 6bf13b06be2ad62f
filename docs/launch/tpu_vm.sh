#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice of many hosts.
#
#   export PROJECT=… ZONE=… REPOSITORY=https://… SHARE=NFS_SERVER:/SHARE
#   bash docs/launch/tpu_vm.sh create|setup|train|log|stop|delete
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}"
NAME=${NAME:-meteor}
TYPE=${TYPE:-v5litepod-64}             # v5e:8x8
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
CONFIG=${CONFIG:-configs/eagle.py:meteor_x4_7b}
RUN=${RUN:-meteor_x4_7b}

where=(--zone="$ZONE" --project="$PROJECT")
on() { gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"; }

case ${1:?create, setup, train, log, stop or delete} in
  create)
    gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" \
      --accelerator-type="$TYPE" --version="$RUNTIME"
    ;;
  setup)
    on all "test -d meteor_jax || git clone ${REPOSITORY:?} meteor_jax"
    on all "bash meteor_jax/docs/launch/setup.sh tpu ${SHARE:?}"
    ;;
  train) # the same command on every host; also to go on after an interruption
    on all "cd /mnt/shared && setsid nohup ~/meteor/bin/python ~/meteor_jax/train.py \
      --config=\$HOME/meteor_jax/$CONFIG --config.data.data_dir=/mnt/shared/data \
      --workdir=/mnt/shared/runs/$RUN >~/train.log 2>&1 </dev/null &"
    ;;
  log) on 0 "tail -F ~/train.log" ;;
  stop) on all "pkill -TERM -f meteor_jax/train.py" ;; # saves, then ends
  delete) gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" ;;
  *) echo "no such step: $1" >&2 && exit 2 ;;
esac
