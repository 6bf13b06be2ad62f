#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster through xpk (pip install xpk).
#
#   export PROJECT=… ZONE=… CLUSTER=… IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/meteor
#   bash docs/launch/xpk.sh cluster|storage|image|train|stop
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}"
TYPE=${TYPE:-v5litepod-64}             # v5e:8x8
SLICES=${SLICES:-1}
CONFIG=${CONFIG:-configs/eagle.py:meteor_x4_7b}
RUN=${RUN:-meteor-x4-7b}

where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

case ${1:?cluster, storage, image, train or stop} in
  cluster)
    xpk cluster create "${where[@]}" --tpu-type="$TYPE" --num-slices="$SLICES" \
      --enable-gcpfilestore-csi-driver
    ;;
  storage) # an NFS share that every pod sees; size in GB
    xpk storage create meteor-share "${where[@]}" --type=gcpfilestore --tier=ZONAL \
      --size="${SIZE:-4096}" --access-mode=ReadWriteMany --vol=default \
      --mount-point=/mnt/shared --readonly=false --auto-mount=true
    ;;
  image)
    docker build --platform=linux/amd64 -f docs/launch/Dockerfile -t "${IMAGE:?}" .
    docker push "$IMAGE"
    ;;
  train)
    xpk workload create "${where[@]}" --workload="$RUN" --docker-image="${IMAGE:?}" \
      --tpu-type="$TYPE" --num-slices="$SLICES" --max-restarts=50 --command="cd /mnt/shared && \
      python /app/train.py --config=/app/$CONFIG --config.data.data_dir=/mnt/shared/data \
      --config.train.mesh.data=$SLICES \
      --workdir=/mnt/shared/runs/$RUN"
    ;;
  stop) xpk workload delete "${where[@]}" --workload="$RUN" ;;
  *) echo "no such step: $1" >&2 && exit 2 ;;
esac
