"""The released models by name: sizes from the checkpoints' key lists, shapes without arrays."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from configs.eagle import get_config
from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import load_experiment
from meteor_jax.models.eagle.cost import count_cost
from meteor_jax.models.eagle.family import Eagle
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.models.eagle.presets import MODELS, eagle_config
from meteor_jax.models.layers.attention import attention_kernel
from meteor_jax.models.layers.platform import compiling_for
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import parse_plan
from meteor_jax.types import IMAGE_TOKEN, Batch


def batch(model):
    tokens = jnp.asarray([[1, IMAGE_TOKEN, 2, 3]], jnp.int32)
    size = model.image_size
    return Batch(
        images=jnp.zeros((1, 1, size, size, 3), jnp.uint8),
        image_valid=jnp.ones((1, 1), bool),
        tokens=tokens,
        text_valid=jnp.ones(tokens.shape, bool),
        labels=tokens,
        example_id=jnp.zeros(1, jnp.int32),
    )


@functools.cache
def shapes(model):
    def init():
        return Meteor(model).init(jax.random.key(0), batch(model), plan=PrunePlan())["params"]

    with compiling_for("gpu"), attention_kernel("xla"):  # the forms of the fewest operations
        return jax.eval_shape(init)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("fusion", ["pre", "post"])
@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_has_shapes(name, fusion):
    model = eagle_config(name, fusion=fusion)
    params = shapes(model)
    projectors = {part for part in params if part.startswith("projector")}
    if fusion == "pre":
        assert projectors == {"projector"}
        assert params["projector"]["fc1"]["kernel"].shape == (
            {"x4": 6656, "x5": 7680}[name[:2]],
            model.llama.width,
        )
    else:
        assert projectors == {f"projector_{encoder}" for encoder in model.encoders}


def test_parameters_are_as_many_as_the_checkpoints_hold():
    params = shapes(eagle_config("x5_7b"))
    tables = count(params["eva02"]["tables"])
    assert tables == 2 * 64 * (256 + 4096)
    sizes = {part: count(tree) for part, tree in params.items()}
    sizes["eva02"] -= tables
    millions = {part: round(size / 1e6, 1) for part, size in sizes.items()}
    # ConvNeXt's head (3.1) and CLIP's last norm are in EAGLE's files but not in use.
    assert millions == {
        "clip": 303.5,
        "convnext": 843.4,
        "sam": 307.7,
        "eva02": 303.4,
        "pix2struct": 512.8,
        "projector": 48.2,
        "llama": 6738.4,
    }


@pytest.mark.parametrize("fusion", ["pre", "post"])
def test_nothing_of_size_lies_whole_on_every_device(fusion):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = shapes(eagle_config("x5_7b", fusion=fusion))
    for leaf, sharding in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(
            parameter_shardings(
                params, mesh, rules=Eagle(eagle_config("x5_7b", fusion=fusion)).sharding_rules
            )
        ),
        strict=True,
    ):
        one_layer = leaf.shape[1:] if len(leaf.shape) == 3 else leaf.shape
        if 4 * math.prod(one_layer) > 2**20:
            assert sharding.shard_shape(leaf.shape) != leaf.shape


@pytest.mark.parametrize("name", ["x4_7b", "meteor_x4_7b", "x5_13b", "meteor_x5_34b"])
def test_config_file(name):
    experiment = load_experiment(get_config(name))
    is_meteor = name.startswith("meteor_")
    assert experiment.model.fusion == ("post" if is_meteor else "pre")
    plan = parse_plan("meteor", library=experiment.plans)
    assert plan.prunes_encoders == is_meteor
    one = dict.fromkeys(experiment.model.encoders, (1.0, 1.0, 1.0))
    cost = count_cost(experiment.model, plan.calibrated(Calibration(ranks={"energy 0.99": one})))
    assert cost.visual_tokens_fused == 576
    assert cost.visual_tokens_mean == 242  # the paper's


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"no EAGLE model 'x4_7B'.*x4_7b"):
        eagle_config("x4_7B")
