"""Compiling for TPUs that this machine need not have: topologies, tables, what else would fit.

Needs libtpu (`pip install 'meteor_jax[tpu]'`). See docs/aot.md.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from meteor_jax.config import ConfigError, one_line
from meteor_jax.parallel.chips import Chip
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.perf.fit import (
    PLATFORM,
    DoesNotFit,
    Measured,
    alternatives,
    measure,
    show_bytes,
)
from meteor_jax.perf.programs import Request

# Set before libtpu is loaded: it must not ask what TPUs this machine has, nor refuse to be loaded
# by two processes. The accelerator's type can be any.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TOPOLOGIES = "v4:2x2x1…4x4x4, v5e:2x2…16x16, v5p:2x2x1…4x4x4, v6e:2x2…16x16, tpu7x:2x2x1…"


def open_topology(name: str, *, slices: int = 1) -> list[Any]:
    """The devices of a TPU slice that need not exist, such as "v5e:8x8".

    Raises:
        ConfigError: without libtpu, or for a name that it does not know.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for TPUs needs libtpu: pip install 'meteor_jax[tpu]'.")
    os.environ.update(ENVIRONMENT)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith(("v4:", "v5p:")):  # one device a chip, as on the machines themselves
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(name, PLATFORM, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(
            f"topology '{name}' is not known to libtpu; expected such as {TOPOLOGIES} "
            f"({one_line(error)})"
        ) from error


def report(results: dict[str, Measured], *, chip: Chip, title: str) -> Table:
    """One column a program, one row a quantity, all of one device."""
    table = Table("one device", *results, title=title)

    def row(label: str, show: Any) -> None:
        table.add_row(label, *(show(result) for result in results.values()))

    row("mesh", lambda result: show_mesh(result.mesh))
    row("matrices", lambda result: result.param_dtype)
    table.add_section()
    row("arguments", lambda result: show_bytes(result.argument_bytes))
    row("outputs", lambda result: show_bytes(result.output_bytes))
    row("outputs in place of arguments", lambda result: show_bytes(result.alias_bytes))
    row("temporaries", lambda result: show_bytes(result.temp_bytes))
    row("peak", lambda result: show_bytes(result.peak_bytes))
    row(
        f"peak of {show_bytes(chip.memory_bytes)}",
        lambda result: f"{result.peak_bytes / chip.memory_bytes:.1%}",
    )
    table.add_section()
    row("TFLOP", lambda result: f"{result.flops / 1e12:,.3f}")
    row("TFLOP without remat", lambda result: f"{result.model_flops / 1e12:,.3f}")
    row("GB to and from memory", lambda result: f"{result.hbm_bytes / 1e9:,.2f}")
    kinds = [kind for result in results.values() for kind in result.collectives]
    for kind in dict.fromkeys(kinds):
        row(f"GB of {kind}", lambda result, kind=kind: _show_collective(result, kind))
    table.add_section()
    for part in ("compute", "memory", "links", "network"):
        times = [getattr(result.roofline, f"{part}_s") for result in results.values()]
        if part != "network" or any(times):
            table.add_row(f"{part}, ms", *(f"{1e3 * seconds:,.2f}" for seconds in times))
    row("roofline, ms", lambda result: f"{1e3 * result.roofline.seconds:,.2f}")
    row("bound by", lambda result: result.roofline.bound)
    row("MFU at the roofline", lambda result: f"{result.roofline.mfu:.1%}")
    row("rows", lambda result: str(result.rows))
    row("compiled in, s", lambda result: f"{result.compile_s:.1f}")
    return table


def show_mesh(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _show_collective(result: Measured, kind: str) -> str:
    moved = result.collectives.get(kind)
    return f"{moved.result_bytes / 1e9:,.2f} in {moved.count:,.0f}" if moved else "–"


def try_alternatives(
    request: Request, mesh: Mesh, *, refused: DoesNotFit, console: Console
) -> str | None:
    """Says of each alternative whether it fits; the first that does is returned."""
    sizes = MeshConfig(**mesh.shape)
    for alternative in alternatives(request, mesh):
        if refused.is_held and alternative.mesh == sizes:
            continue  # only another mesh changes what is held
        tried = make_mesh(alternative.mesh, devices=list(mesh.devices.flat))
        try:
            measured = measure(alternative.request, tried)
        except DoesNotFit as error:
            say(console, f"  with {alternative.label}: {error}")
            continue
        say(
            console,
            f"  with {alternative.label}: fits, {show_bytes(measured.peak_bytes)} at the peak, "
            f"MFU {measured.roofline.mfu:.1%} at the roofline",
        )
        return alternative.label
    say(console, "  nothing tried fits: take a larger slice")
    return None


def say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
