"""How fast a program could be at most on a kind of chip."""

from __future__ import annotations

import dataclasses

from meteor_jax.config import ConfigError
from meteor_jax.parallel.chips import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one run keeps each part of a device busy, at the part's peak.

    Attributes:
        compute_s: of matrix products; memory_s: of traffic to HBM; links_s: of what is sent
            within the slice; network_s: of what is sent to other slices.
        mfu: operations that the model needs, remat's left out, over what the device could do in
            `seconds`.
    """

    compute_s: float
    memory_s: float
    links_s: float
    network_s: float
    mfu: float

    @property
    def seconds(self) -> float:
        """The least time, if all parts overlap perfectly."""
        return max(self.compute_s, self.memory_s, self.links_s, self.network_s)

    @property
    def bound(self) -> str:
        """What that time is made of."""
        times = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "links": self.links_s,
            "network": self.network_s,
        }
        return max(times, key=times.__getitem__)


def make_roofline(
    chip: Chip,
    *,
    flops: float,
    model_flops: float,
    hbm_bytes: float,
    link_bytes: float,
    network_bytes: float = 0.0,
) -> Roofline:
    """The roofline of one device; all amounts are a device's.

    Raises:
        ConfigError: if bytes go to other slices and the chip's network is not specified.
    """
    if network_bytes and chip.network_bytes_per_s is None:
        raise ConfigError(
            f"the network of a {chip.name} between slices is not specified: use one slice."
        )
    times = Roofline(
        compute_s=flops / chip.flops_per_s,
        memory_s=hbm_bytes / chip.bytes_per_s,
        links_s=link_bytes / chip.link_bytes_per_s,
        network_s=network_bytes / (chip.network_bytes_per_s or 1.0),
        mfu=0.0,
    )
    possible = times.seconds * chip.flops_per_s
    return dataclasses.replace(times, mfu=model_flops / possible if possible else 0.0)
