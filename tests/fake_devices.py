"""TPUs that a mesh can be built of, and nothing else."""

import dataclasses

CHIPS_A_HOST = 4


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """What meshes ask of a `jax.Device`."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    client: None = None


def fake_slices(count, *, side=8, **fields):
    """`count` slices v5e:`side`x`side`."""
    return [
        FakeTpu(
            id=index,
            process_index=index // CHIPS_A_HOST,
            slice_index=index // side**2,
            coords=(index % side, index % side**2 // side, 0),
            **fields,
        )
        for index in range(count * side**2)
    ]
