#!/usr/bin/env bash
# A ConfigDict of ml_collections does not keep the order of a mapping: iterating over it, items() and
# to_dict() sort the keys. to_json_best_effort() keeps the order, so that two ways to write one config
# disagree, and an order that means something (encoders whose tokens are joined) must be a field of
# its own.
#
# Versions: ml_collections 1.1.0, absl-py 2.5.1, Python 3.11.
# Seen:
#   iteration: ['clip', 'sam', 'vit']
#   items: ['clip', 'sam', 'vit']
#   to_dict: ['clip', 'sam', 'vit']
#   to_json_best_effort: ['vit', 'clip', 'sam']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet ml_collections==1.1.0 absl-py==2.5.1
cat > "$folder/show.py" <<'PYTHON'
import json

from ml_collections import ConfigDict

encoders = {"vit": 1, "clip": 2, "sam": 3}
config = ConfigDict({"encoders": encoders})
print("iteration:", list(config.encoders))
print("items:", [name for name, _ in config.encoders.items()])
print("to_dict:", list(config.to_dict()["encoders"]))
print("to_json_best_effort:", list(json.loads(config.to_json_best_effort())["encoders"]))
PYTHON
"$folder/environment/bin/python" "$folder/show.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
iteration: ['clip', 'sam', 'vit']
items: ['clip', 'sam', 'vit']
to_dict: ['clip', 'sam', 'vit']
to_json_best_effort: ['vit', 'clip', 'sam']
EXPECTED
