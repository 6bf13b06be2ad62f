"""Trains and evaluates: `python train.py --config=configs/tiny.py --workdir=runs/tiny`.

The same as `meteor train`; `python train.py --help` shows its flags.
"""

import sys

from meteor_jax.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
