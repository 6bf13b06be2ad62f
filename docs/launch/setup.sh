#!/usr/bin/env bash
# Prepares one machine: Python 3.12 with this repository in ~/meteor, the shared folder on
# /mnt/shared.
#
#   bash docs/launch/setup.sh tpu|cuda [NFS_SERVER:/SHARE]
set -euo pipefail
extra=$1
share=${2:-}

cd "$(dirname "$0")/../.."
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -d $HOME/meteor ]] || uv venv --python 3.12 "$HOME/meteor"
uv pip install --python "$HOME/meteor/bin/python" -e ".[$extra]"

if [[ -n $share ]] && ! mountpoint -q /mnt/shared; then
  sudo apt-get update && sudo apt-get install -y nfs-common
  sudo mkdir -p /mnt/shared
  sudo mount -t nfs "$share" /mnt/shared
fi
