#!/usr/bin/env bash
# config_flags of ml_collections takes the overrides of a config file (--config.steps=5) from sys.argv
# and not from the arguments that absl's flags are parsed with. A program that parses a list of its
# own, such as a command with subcommands or a test, sees the override refused or ignored; setting
# sys.argv to the same list before the flags are parsed makes it work.
#
# Versions: ml_collections 1.1.0, absl-py 2.5.1, Python 3.11.
# Seen:
#   parsed from a list: UnrecognizedFlagError
#   the same list in sys.argv: 5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet ml_collections==1.1.0 absl-py==2.5.1
cat > "$folder/config.py" <<'PYTHON'
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({"steps": 1})
PYTHON
cat > "$folder/show.py" <<'PYTHON'
import pathlib
import sys

from absl import flags
from ml_collections import config_flags


def steps(arguments):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    try:
        values(arguments)
        return values.config.steps
    except flags.Error as error:
        return type(error).__name__


config = pathlib.Path(__file__).with_name("config.py")
arguments = ["program", f"--config={config}", "--config.steps=5"]
sys.argv = ["program"]
print("parsed from a list:", steps(arguments))
sys.argv = arguments
print("the same list in sys.argv:", steps(arguments))
PYTHON
"$folder/environment/bin/python" "$folder/show.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
parsed from a list: UnrecognizedFlagError
the same list in sys.argv: 5
EXPECTED
