"""Evaluates a checkpoint: `python evaluate.py --checkpoint=runs/tiny --plans=full,meteor`.

The same as `meteor evaluate`; `python evaluate.py --help` shows its flags. docs/evaluate.md says
what it reads and writes.
"""

import sys

from meteor_jax.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
