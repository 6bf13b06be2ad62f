"""Whether a config fits a TPU slice, and how fast it could be, before one is rented.

    meteor aot --config=configs/eagle.py:meteor_x4_7b --topology=v5e:8x8

Compiles the train step, prefill and extend for TPUs that this machine need not have. Needs libtpu:
pip install -e '.[tpu]'. docs/aot.md says how to read the table.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console

from meteor_jax.cli.flags import (
    define_calibration,
    define_config,
    define_output,
    define_plans,
    read_calibration,
    read_config,
    read_plans,
)
from meteor_jax.inference.layout import inference_mesh
from meteor_jax.parallel.mesh import make_mesh, parse_mesh
from meteor_jax.perf.aot import (
    TOPOLOGIES,
    open_topology,
    report,
    say,
    show_mesh,
    try_alternatives,
)
from meteor_jax.perf.fit import DoesNotFit, Measured, chip_of, measure
from meteor_jax.perf.programs import PROGRAMS, Request, check_program, programs_of


def define_flags() -> None:
    define_config()
    flags.DEFINE_string("topology", "v5e:8x8", f"A TPU slice: {TOPOLOGIES}")
    flags.DEFINE_integer(
        "slices", 1, "Slices of that topology; they divide the data axis.", lower_bound=1
    )
    flags.DEFINE_string("mesh", None, "Of training, as data=1,fsdp=64. Default: the config's.")
    flags.DEFINE_list(
        "programs", None, f"Out of {', '.join(PROGRAMS)}. Default: all that the model has."
    )
    define_plans(None, "Default: the first of the stage.")
    flags.DEFINE_enum("stage", "finetune", ("pretrain", "finetune"), "The stage to train.")
    flags.DEFINE_integer(
        "batch_size", 0, "Prompts of prefill and extend; 0 takes the config's.", lower_bound=0
    )
    define_calibration()
    flags.DEFINE_bool("alternatives", True, "Search for what would fit where something does not.")
    define_output("File for the numbers, as JSON.")


def main(options: flags.FlagValues) -> int:
    """Compiles what the flags ask for; returns 1 if something does not fit."""
    jax.config.update("jax_platforms", "cpu")  # whatever this machine has, it is not used
    console = Console()
    experiment, plans = read_config(options), read_plans(options) or [""]
    names = [check_program(name) for name in options.programs or programs_of(experiment)]
    devices = open_topology(options.topology, slices=options.slices)
    asked = parse_mesh(options.mesh) if options.mesh else experiment.train.mesh
    meshes = {"train": make_mesh(asked, devices=devices)} if "train" in names else {}
    if names != ["train"]:
        evaluated = inference_mesh(experiment, devices=devices)
        meshes |= {name: evaluated for name in names if name != "train"}
    request = Request(
        program="",
        experiment=experiment,
        stage=options.stage,
        calibration=read_calibration(options),
        rows=options.batch_size,
    )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    title = (
        f"{options.topology}{f' × {options.slices}' if options.slices > 1 else ''}, "
        f"jax {versions['jax']}, libtpu {versions['libtpu']}"
    )
    results, refused = {}, {}
    for plan, name in itertools.product(plans, names):
        label = name if len(plans) == 1 else f"{name} {plan}"
        request = dataclasses.replace(request, program=name, plan=plan)
        try:
            results[label] = measure(request, meshes[name])
        except DoesNotFit as error:
            shape = show_mesh(meshes[name].shape)
            say(console, f"{label} does not fit {title}, mesh {shape}: {error}")
            refused[label] = {"reason": str(error)}
            if options.alternatives:
                refused[label]["fits_with"] = try_alternatives(
                    request, meshes[name], refused=error, console=console
                )
    if results:
        chip = chip_of(next(iter(meshes.values())))
        console.print(report(results, chip=chip, title=title))
    if options.output:
        written = {
            "topology": options.topology,
            "slices": options.slices,
            "meshes": {name: dict(mesh.shape) for name, mesh in meshes.items()},
            "plans": plans,
            "versions": versions,
            "does_not_fit": refused,
            "programs": {label: _as_json(result) for label, result in results.items()},
        }
        Path(options.output).write_text(json.dumps(written, indent=2) + "\n")
    return 1 if refused else 0


def _as_json(result: Measured) -> dict[str, Any]:
    values = dataclasses.asdict(result)
    roofline = result.roofline
    values["roofline"] |= {"seconds": roofline.seconds, "bound": roofline.bound}
    return values
