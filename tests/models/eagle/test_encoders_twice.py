"""Two encoders of one type and different sizes in one model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from meteor_jax.config import ConfigError, build
from meteor_jax.models.eagle.config import MeteorConfig
from meteor_jax.models.family import build_model
from meteor_jax.parallel.mesh import AXES
from meteor_jax.parallel.rules import parameter_shardings
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import parse_plan
from meteor_jax.types import IGNORE_LABEL
from tests import tiny_model as tiny

NEAR = tiny.CONFIG.encoders["clip"]
FAR = dataclasses.replace(NEAR, patch_size=16, width=24)
CONFIG = dataclasses.replace(
    tiny.CONFIG, encoders={"near": NEAR, "far": FAR}, encoder_order=("near", "far")
)
RANKS = Calibration(ranks={"energy 0.99": {"near": (4.0, 5.0, 6.0), "far": (2.0, 2.0, 2.0)}})


def test_both_are_run_pruned_and_counted():
    model, batch = build_model(CONFIG), tiny.make_batch()
    batch = batch.replace(labels=jnp.where(batch.text_valid, batch.labels, IGNORE_LABEL))
    batch = batch.replace(labels=jnp.where(batch.labels < 0, IGNORE_LABEL, batch.labels))
    plan = parse_plan("meteor(encode=(16, 14, 12), fuse=8, decode=None)").calibrated(RANKS)
    params = jax.jit(lambda: model.init_params(batch, seed=0))()
    widths = {name: params[name]["patch_embedding"]["kernel"].shape for name in ("near", "far")}
    assert widths == {"near": (192, 16), "far": (768, 24)}
    assert {"projector_near", "projector_far"} < params.keys()

    def loss(params):
        return model.loss(params, batch, plan=plan, rng=jax.random.key(0))

    sums = jax.jit(loss)(params)
    shares = {name: float(mean.total / mean.count) for name, mean in sums.means.items()}
    assert shares.keys() == {"fused_share/near", "fused_share/far"}
    assert sum(shares.values()) == pytest.approx(1)
    assert np.isfinite(sums.loss)
    cost = dict(model.count_cost(plan, text_tokens=12).rows)
    assert cost["near"] > cost["far"] > 0
    shardings = parameter_shardings(
        params, jax.sharding.AbstractMesh((1, 4, 2), AXES), rules=model.sharding_rules
    )
    assert shardings["far"]["patch_embedding"]["kernel"].spec == PartitionSpec(None, "fsdp")


def test_a_config_names_them_and_their_types():
    values = {
        "encoders": {"near": {"type": "clip", "width": 16, "num_heads": 2}, "sam": {}},
        "encoder_order": ("sam", "near"),
    }
    config = build(MeteorConfig, values)
    assert [(name, encoder.type) for name, encoder in config.encoders.items()] == [
        ("sam", "sam"),
        ("near", "clip"),
    ]
    assert build(MeteorConfig, dataclasses.asdict(config)) == config
    assert list(config.with_encoders("near").encoders) == ["near"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoders": {"near": {}}}, "encoders.near.type: no encoder 'near'"),
        ({"encoders": {"near": {"type": "clop"}}}, "Did you mean 'clip'?"),
        ({"encoders": {"clip": {"widht": 3}}}, "encoders.clip.widht: no such field"),
        ({"encoders": {"llama": {"type": "clip"}}}, "'llama' cannot be an encoder's name"),
        ({"encoder_order": ("clip", "clip")}, "encoder_order: expected names out of clip, "),
        ({"encoder_order": ("sam",)}, "each once, got ('sam',)"),
    ],
)
def test_errors_name_the_field(values, message):
    with pytest.raises(ConfigError) as error:
        build(MeteorConfig, values)
    assert message in str(error.value)
