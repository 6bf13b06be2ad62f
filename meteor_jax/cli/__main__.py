"""`meteor COMMAND --flags`, or `python -m meteor_jax.cli COMMAND --flags`.

A command's module is imported when it is asked for, so that `meteor --help` is quick.
"""

from __future__ import annotations

import faulthandler
import importlib
import sys
from collections.abc import Sequence

from absl import logging

from meteor_jax import __version__
from meteor_jax.config import suggest

GROUPS = {
    "train and evaluate": {
        "train": "train a model through its stages, and evaluate it",
        "evaluate": "score a checkpoint under plans",
        "report": "one HTML page about one run or several",
        "pretrain-encoders": "train small encoders on pictures of shapes and text",
    },
    "weights and data": {
        "convert": "PyTorch checkpoints into workdirs, and back",
        "prepare": "conversations in LLaVA's JSON into a data set",
    },
    "pruning plans": {
        "calibrate": "measure feature ranks and λ, which some plans need",
        "sweep-layers": "before which decoder layers may a plan prune?",
        "flops": "operations of a model under plans",
    },
    "speed and memory": {
        "bench": "time plans against each other",
        "bench-adaptive-prefill": "time what an adaptive budget costs",
        "bench-torch": "time the same model in PyTorch beside it",
        "aot": "compile for a TPU topology: does it fit, and how fast could it be?",
    },
}
COMMANDS = [name for group in GROUPS.values() for name in group]


def main(arguments: Sequence[str] | None = None, *, program: str = "meteor") -> int:
    """Runs the command that the command line names; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(overview())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: no command '{name}'.{suggest(name, COMMANDS)}", file=sys.stderr)
        return 2
    from meteor_jax.cli.run import run

    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    logging.use_absl_handler()
    command = importlib.import_module(f"meteor_jax.cli.{name.replace('-', '_')}")
    return run(command, rest, name=f"{program} {name}")


def overview() -> str:
    """All commands, with a line for each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: meteor COMMAND --FLAG=VALUE …", "", "meteor COMMAND --help lists its flags."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:{width}}  {summary}" for name, summary in commands.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
