"""The tables against the list of all tensors of the released checkpoints; shapes alone."""

import math
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest

from meteor_jax.convert.formats import rename
from meteor_jax.convert.loading import build_config
from meteor_jax.convert.matching import match
from meteor_jax.models.eagle.conversion import EagleConversion
from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.eagle.presets import eagle_config
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Batch
from tests.convert.eagle_tiny import GOLDEN

CONVERSION = EagleConversion()
# As config.json of the Vicuna-7B models has them; the towers' sizes are not in it.
CONFIG = {
    "model_type": "eagle_llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": 32000,
    "mm_projector_type": "mlp2x_gelu",
}
TOWERS = {
    "x4_7b": "clip-448;convnext-1024;det-1024;pix2struct-1024",
    "x5_7b": "clip-448;convnext-1024;sam-1024;det-1024;pix2struct-1024",
}
COUNTS = {"x4_7b": 1744, "x5_7b": 2086}
# Millions of numbers in all tensors of a part, without the rotary tables (fact sheet, meta device).
MILLIONS = {
    "clip": 303.51,
    "convnext": 846.47,
    "sam": 307.69,
    "eva02": 303.39,
    "pix2struct": 512.81,
    "llama": 131.07 + 6476.27 + 131.07,
}
PROJECTOR_MILLIONS = {"x4_7b": 44.05, "x5_7b": 48.24}


def listed(model: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model by name, from tests/golden/eagle_keys.txt."""
    section = re.search(
        rf"^\[{model} \d+\]\n(.*?)(?=^\[|\Z)", (GOLDEN / "eagle_keys.txt").read_text(), re.M | re.S
    )
    tensors = {}
    for line in section[1].splitlines():
        name, shape, *layers = line.split()
        shape = tuple(map(int, shape.split("x")))
        if not layers:
            tensors[name] = shape
        for span in layers and layers[0].split(","):
            first, _, last = span.partition("-")
            for i in range(int(first), int(last or first) + 1):
                tensors[name.replace("{i}", str(i))] = shape
    return tensors


@pytest.fixture(scope="module", params=list(COUNTS))
def full(request):
    """Name, tensors, config and parameter shapes of one model."""
    model = request.param
    tensors = listed(model)
    fields = CONVERSION.fields(
        "eagle", shapes=tensors, config=CONFIG | {"mm_vision_tower": TOWERS[model]}
    )
    config = build_config(MeteorConfig, fields, ["dtype=bfloat16"])
    return (
        model,
        tensors,
        config,
        CONVERSION.param_shapes(config, CONVERSION.parts(config, "eagle")),
    )


def test_the_list_is_whole(full):
    model, tensors, *_ = full
    assert len(tensors) == COUNTS[model]
    assert set(rename(tensors, CONVERSION.formats["eagle"]).names) == set(tensors)


def test_sizes_from_the_shapes_are_the_released_ones(full):
    model, _, config, _ = full
    assert config == eagle_config(model)


def test_every_tensor_has_its_place(full):
    _, tensors, config, shapes = full
    found = match(tensors, CONVERSION.table(config, CONVERSION.parts(config, "eagle")), shapes)
    assert not found.problems
    assert not found.computed
    loaded = [load.name for load in found.loads]
    assert len(loaded) == len(set(loaded))
    assert set(loaded) | set(found.kept) == set(tensors)
    assert not set(loaded) & set(found.kept)


def test_every_parameter_comes_from_tensors_of_its_size(full):
    _, tensors, config, shapes = full
    rules = CONVERSION.table(config, CONVERSION.parts(config, "eagle")).rules
    assert {rule.target for rule in rules} == set(shapes)
    assert len(rules) == len(shapes)
    for rule in rules:
        places = rule.expand()
        wanted = rule.source_shape(shapes[rule.target])
        assert {tensors[name] for name, _ in places} == {wanted}
        if rule.layers:
            assert [row for _, row in places] == list(range(shapes[rule.target][0]))


def test_the_shapes_are_those_of_the_whole_model(full):
    _, _, config, shapes = full
    size = config.image_size
    batch = Batch(
        images=jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.uint8),
        image_valid=jax.ShapeDtypeStruct((1, 1), jnp.bool_),
        tokens=jax.ShapeDtypeStruct((1, 2), jnp.int32),
        text_valid=jax.ShapeDtypeStruct((1, 2), jnp.bool_),
        labels=jax.ShapeDtypeStruct((1, 2), jnp.int32),
        example_id=jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    params = jax.eval_shape(
        lambda key, batch: Meteor(config).init(key, batch, plan=PrunePlan()),
        jax.random.key(0),
        batch,
    )["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == shapes


def test_numbers_a_part(full):
    model, tensors, config, _ = full
    expected = {name: MILLIONS[name] for name in (*config.encoders, "llama")}
    expected["projector"] = PROJECTOR_MILLIONS[model]
    counted = dict.fromkeys(expected, 0)
    for name, shape in tensors.items():
        tower = re.match(r"model\.vision_tower\.vision_towers\.(\d+)\.", name)
        part = config.encoder_order[int(tower[1])] if tower else "llama"
        part = "projector" if name.startswith("model.mm_projector.") else part
        if "freqs_" not in name:
            counted[part] += math.prod(shape)
    for part, millions in expected.items():
        assert counted[part] / 1e6 == pytest.approx(millions, abs=0.006), part
