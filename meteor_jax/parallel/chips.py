"""What accelerators can do at most: the denominators of MFU and of the roofline."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of some kind, as its maker specifies it (dense, without sparsity).

    Attributes:
        memory_bytes: of its high-bandwidth memory; of a TPU's, what XLA lets a program use.
        flops_per_s: bfloat16 products with float32 sums.
        bytes_per_s: to and from that memory.
        link_bytes_per_s: to other devices of the same slice or node, all links together, one way.
        network_bytes_per_s: to other slices, one way; None where it is not specified by chip.
    """

    name: str
    memory_bytes: float
    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float | None = None


# By the beginning of `jax.Device.device_kind`; the longest that fits wins. Sources: Google Cloud's
# TPU system architecture pages, libtpu 0.0.42's messages for the memory of TPUs, and NVIDIA's data
# sheets. A TPU7x chip is two devices. The links of a TPU: half of the "bidirectional" bandwidth;
# older pages give one direction in Gbps (v5e: 1600).
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip("v4", 30.75 * GIB, 275e12, 1.228e12, 300e9),
    "TPU v5 lite": Chip("v5e", 15.75 * GIB, 197e12, 0.819e12, 200e9, 3.125e9),
    "TPU v5": Chip("v5p", 95.74 * GIB, 459e12, 2.765e12, 600e9, 6.25e9),
    "TPU v6 lite": Chip("v6e", 31.25 * GIB, 918e12, 1.638e12, 400e9, 12.5e9),
    "TPU7x": Chip("tpu7x", 94.75 * GIB, 1153.5e12, 3.69e12, 300e9, 6.25e9),
    "NVIDIA A100-SXM4-80GB": Chip("a100", 80e9, 312e12, 2.039e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("h100", 80e9, 989e12, 3.35e12, 450e9),
    "NVIDIA H200": Chip("h200", 141e9, 989e12, 4.8e12, 450e9),
    "NVIDIA B200": Chip("b200", 180e9, 2250e12, 8e12, 900e9),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that calls itself `device_kind`; None where its peaks are not known (a CPU)."""
    fitting = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(fitting, key=len)] if fitting else None
