"""Whether a program fits a kind of chip, how it would run there, and what to change if not."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh

from meteor_jax.config import ConfigError
from meteor_jax.inference.layout import param_dtype
from meteor_jax.models.family import build_model
from meteor_jax.parallel.chips import Chip, find_chip
from meteor_jax.parallel.mesh import AXES, BATCH_AXES, MeshConfig, num_slices
from meteor_jax.perf.programs import (
    Program,
    Request,
    build_program,
    count_flops,
    tracing_for,
    with_remat,
)
from meteor_jax.perf.roofline import Roofline, make_roofline
from meteor_jax.perf.traffic import Collective, read_traffic

PLATFORM = "tpu"
REMAT = "nothing_saveable"
REMAT_LABEL = f"remat={REMAT}"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(RuntimeError):
    """A program needs more memory than a device has. The message is one line.

    Attributes:
        is_held: what every device must hold is too much, however the program is run.
    """

    def __init__(self, message: str, *, is_held: bool) -> None:
        super().__init__(message)
        self.is_held = is_held


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled program, every amount that of one device.

    Attributes:
        mesh: devices along each axis.
        param_dtype: of the matrices among the parameters.
        argument_bytes, output_bytes, alias_bytes, temp_bytes: XLA's buffers; outputs that take
            the place of arguments are counted in both and are the alias.
        peak_bytes: the most that is alive at any moment, by XLA's count.
        flops, model_flops: with and without what remat computes again.
        hbm_bytes, collectives, unknown_loops: see `Traffic`.
        compile_s: seconds that compiling took.
    """

    mesh: Mapping[str, int]
    param_dtype: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int
    flops: float
    model_flops: float
    hbm_bytes: float
    collectives: Mapping[str, Collective]
    unknown_loops: int
    roofline: Roofline
    rows: int
    compile_s: float


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Another way to run a program, and what it changes, in words."""

    label: str
    request: Request
    mesh: MeshConfig


def chip_of(mesh: Mesh) -> Chip:
    """The mesh's kind of chip; ConfigError if its peaks are not known."""
    kind = mesh.devices.flat[0].device_kind
    chip = find_chip(kind)
    if chip is None:
        raise ConfigError(
            f"no peaks are known of '{kind}': add it to meteor_jax.parallel.chips.CHIPS."
        )
    return chip


def check_held(program: Program, *, chip: Chip) -> None:
    """Raises DoesNotFit if what every device must hold is more than its memory."""
    if program.resident_bytes > chip.memory_bytes:
        missing = program.resident_bytes - chip.memory_bytes
        raise DoesNotFit(
            f"arguments and gradients alone take {show_bytes(program.resident_bytes)} a device, "
            f"{show_bytes(missing)} more than the {show_bytes(chip.memory_bytes)} of a "
            f"{chip.name}; split over all, they need more than "
            f"{math.floor(program.total_bytes / chip.memory_bytes)} devices",
            is_held=True,
        )


def measure(request: Request, mesh: Mesh) -> Measured:
    """Compiles what `request` asks for on `mesh`, and reads off what one device does.

    Raises:
        DoesNotFit: if a device cannot hold the arguments, or XLA runs out of memory.
    """
    chip, program = chip_of(mesh), build_program(request, mesh, platform=PLATFORM)
    check_held(program, chip=chip)
    started = time.perf_counter()
    with tracing_for(PLATFORM, mesh):
        lowered = program.function.lower(*program.args)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise read_out_of_memory(str(error)) or error from error
    compile_s = time.perf_counter() - started
    slices = num_slices(mesh.devices.flat)
    traffic = read_traffic(
        compiled.as_text(), slice_size=mesh.size // slices if slices > 1 else None
    )
    memory = compiled.memory_analysis()
    counted = count_flops(request, mesh, platform=PLATFORM)
    flops, model_flops = (total / mesh.size for total in counted)
    return Measured(
        mesh=dict(mesh.shape),
        param_dtype="float32" if request.program == "train" else param_dtype(request.experiment),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        flops=flops,
        model_flops=model_flops,
        hbm_bytes=traffic.hbm_bytes,
        collectives=traffic.collectives,
        unknown_loops=traffic.unknown_loops,
        roofline=make_roofline(
            chip,
            flops=flops,
            model_flops=model_flops,
            hbm_bytes=traffic.hbm_bytes,
            link_bytes=traffic.link_bytes,
            network_bytes=traffic.network_bytes,
        ),
        rows=program.rows,
        compile_s=compile_s,
    )


def read_out_of_memory(message: str) -> DoesNotFit | None:
    """XLA's message as ours; None if it is about something else."""
    number = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {number} of {number} hbm", message) or re.search(
        rf"temporaries \({number}\) exceeds available HBM \({number}\)", message
    )
    if found is None:
        return None
    used, limit = (float(found[i]) * UNITS[found[i + 1]] for i in (1, 3))
    return DoesNotFit(
        f"XLA needs {show_bytes(used)} a device, {show_bytes(used - limit)} more than the "
        f"{show_bytes(limit)} that there are",
        is_held=False,
    )


def alternatives(request: Request, mesh: Mesh) -> Iterator[Alternative]:
    """What would need less memory. In training each with what came before: remat, then parameters
    split over all devices, then fewer rows at a time, then every layer split over some devices; in
    inference, where parameters stay put, every layer over more devices."""
    sizes = MeshConfig(**{axis: mesh.shape[axis] for axis in AXES})
    slices = num_slices(mesh.devices.flat)
    heads = build_model(request.experiment.model).tensor_divisor
    if request.program != "train":
        most = math.gcd(mesh.size // slices, heads)
        for tensor in range(sizes.tensor + 1, most + 1):
            if most % tensor == 0:
                wider = MeshConfig(data=mesh.size // tensor, fsdp=1, tensor=tensor)
                yield Alternative(f"mesh data={wider.data},tensor={tensor}", request, wider)
        return
    labels: list[str] = []

    def changed(*label: str) -> Alternative:
        return Alternative(" + ".join((*labels, *label)), request, sizes)

    experiment = with_remat(request.experiment, REMAT)
    if experiment != request.experiment:
        request = dataclasses.replace(request, experiment=experiment)
        labels.append(REMAT_LABEL)
        yield changed()
    split = MeshConfig(data=slices, fsdp=mesh.size // slices, tensor=1)
    if sizes != split and _rows(request) % mesh.size == 0:
        sizes = split
        labels.append(f"mesh data={sizes.data},fsdp={sizes.fsdp}")
        yield changed()
    shards = math.prod(getattr(sizes, axis) for axis in BATCH_AXES)
    while _rows(request) > shards and (_rows(request) // 2) % shards == 0:
        request = _accumulating(request, 2 * request.stage_config.grad_accum_steps)
        yield changed(f"grad_accum_steps={request.stage_config.grad_accum_steps}")
    for tensor in (2, 4, 8):
        fsdp = split.fsdp // tensor
        batch_size = request.stage_config.batch_size
        if split.fsdp % tensor or heads % tensor or batch_size % (slices * fsdp):
            return
        sizes = MeshConfig(data=slices, fsdp=fsdp, tensor=tensor)
        request = _accumulating(request, batch_size // (slices * fsdp))
        yield Alternative(
            f"{REMAT_LABEL} + mesh data={slices},fsdp={fsdp},tensor={tensor} + "
            f"grad_accum_steps={request.stage_config.grad_accum_steps}",
            request,
            sizes,
        )


def _rows(request: Request) -> int:
    """Rows of a batch that are worked on at the same time."""
    return request.stage_config.batch_size // request.stage_config.grad_accum_steps


def _accumulating(request: Request, parts: int) -> Request:
    stage = dataclasses.replace(request.stage_config, grad_accum_steps=parts)
    train = dataclasses.replace(request.experiment.train, **{request.stage: stage})
    return dataclasses.replace(
        request, experiment=dataclasses.replace(request.experiment, train=train)
    )


def show_bytes(amount: float) -> str:
    return f"{amount / 2**30:,.2f} GiB"
