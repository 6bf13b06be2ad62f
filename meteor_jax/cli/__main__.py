"""`meteor COMMAND --flags`, or `python -m meteor_jax.cli COMMAND --flags`.

A command's module is imported when it is asked for, so that `meteor --help` is quick.
"""

from __future__ import annotations

import runpy
import sys

from meteor_jax import __version__
from meteor_jax.config import suggest

COMMANDS = {
    "convert": ("meteor_jax.cli.convert", "PyTorch checkpoints into workdirs, and back"),
    "prepare": ("meteor_jax.data.sources.llava", "conversations in LLaVA's JSON into a data set"),
    "pretrain-encoders": ("meteor_jax.training.pretrain_encoders", "train encoders on shapes"),
    "calibrate": ("meteor_jax.inference.calibrate", "measure what rank-guided plans need"),
    "sweep-layers": ("meteor_jax.inference.sweep_layers", "where in the LLM can a plan prune?"),
    "report": ("meteor_jax.reports.html", "one HTML page of one run or of several"),
    "flops": ("meteor_jax.models.eagle.cost", "operations of a model under plans"),
    "bench": ("meteor_jax.perf.bench.measure", "time plans against each other"),
    "bench-adaptive-prefill": (
        "meteor_jax.perf.bench.adaptive_prefill",
        "time what an adaptive budget costs",
    ),
    "bench-torch": ("meteor_jax.perf.bench.torch_comparison", "time transformers beside it"),
    "aot": ("meteor_jax.perf.aot", "compile for a TPU topology: does it fit, how fast is it?"),
}


def main() -> int | None:
    """Runs the command that the command line names; returns the exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        print("usage: meteor COMMAND [--flags]; meteor COMMAND --help lists its flags.\n")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:{width}}  {summary}")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        print(
            f"error: no command '{arguments[0]}'{suggest(arguments[0], COMMANDS)}", file=sys.stderr
        )
        return 2
    sys.argv = [f"meteor {arguments[0]}", *arguments[1:]]
    runpy.run_module(COMMANDS[arguments[0]][0], run_name="__main__")
    return None


if __name__ == "__main__":
    sys.exit(main())
