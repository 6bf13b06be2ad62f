"""EAGLE → Orbax → EAGLE gives back every tensor, bit for bit."""

import dataclasses
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open

from meteor_jax.checkpoint import (
    CheckpointError,
    open_checkpoints,
    restore_params,
    write_config,
)
from meteor_jax.config import ConfigError
from meteor_jax.convert.exporting import export_checkpoint
from meteor_jax.convert.loading import convert_checkpoint
from meteor_jax.models.eagle.presets import eagle_config
from tests.convert import eagle_tiny
from tests.convert.test_full_size import CONFIG, CONVERSION, COUNTS, TOWERS, listed


def read_folder(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert ours[name].tobytes() == tensor.tobytes(), name


def fixture_weights(dtype):
    return {name: tensor.astype(dtype) for name, tensor in eagle_tiny.weights().items()}


@pytest.mark.parametrize(
    "source, stored", [("float32", "as-is"), ("bfloat16", "as-is"), ("bfloat16", "float32")]
)
def test_fixture(tmp_path, source, stored):
    tensors = fixture_weights(jnp.dtype(source))
    eagle = eagle_tiny.write_eagle(tmp_path / "eagle", tensors)
    (eagle / "tokenizer_config.json").write_text("{}")
    convert_checkpoint(eagle, tmp_path / "out", dtype=stored, overrides=eagle_tiny.OVERRIDES)
    export_checkpoint(tmp_path / "out", tmp_path / "back", shard_bytes=10**6)
    assert_identical(read_folder(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == eagle_tiny.config()
    assert (tmp_path / "out" / "tokenizer" / "tokenizer_config.json").is_file()
    assert (tmp_path / "back" / "tokenizer_config.json").is_file()

    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) >= 2
    assert all(file.stat().st_size < 1.1e6 for file in files)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == {file.name for file in files}


def tiny(model):
    """A released model's depths with narrow layers."""
    full = eagle_config(model, dtype="float32")
    widths = {
        "clip": {"image_size": 56, "width": 16, "num_heads": 2, "mlp_dim": 24},
        "convnext": {"widths": (4, 4, 8, 8)},
        "sam": {
            "image_size": 256,
            "block_width": 16,
            "num_heads": 2,
            "mlp_dim": 24,
            "window": 6,
            "neck_width": 4,
        },
        "eva02": {"image_size": 512, "width": 16, "num_heads": 2, "mlp_dim": 10},
        "pix2struct": {"width": 16, "num_heads": 2, "mlp_dim": 24, "num_positions": 50},
        "llama": {"width": 16, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 24, "vocab_size": 30},
    }
    encoders = {
        name: dataclasses.replace(encoder, **widths[name])
        for name, encoder in full.encoders.items()
    }
    llama = dataclasses.replace(full.llama, **widths["llama"])
    return dataclasses.replace(full, encoders=encoders, llama=llama)


def tiny_tensors(config, names):
    """bfloat16 tensors of all these names, in the sizes of a config."""
    parts = CONVERSION.parts(config, "eagle")
    shapes = CONVERSION.param_shapes(config, parts)
    sizes = {}
    for rule in CONVERSION.table(config, parts).rules:
        shape = rule.source_shape(shapes[rule.target])
        sizes |= {name: shape for name, _ in rule.expand()}
        sizes |= dict.fromkeys(rule.fallbacks, shape)
    random = np.random.default_rng(0)
    return {name: random.normal(size=sizes.get(name, (5,))).astype(jnp.bfloat16) for name in names}


@pytest.mark.parametrize("model", list(COUNTS))
def test_all_tensors_of_a_released_model(tmp_path, model):
    config = tiny(model)
    tensors = tiny_tensors(config, listed(model))
    assert len(tensors) == COUNTS[model]
    eagle_tiny.write_shards(tmp_path / "eagle", tensors, num_shards=4)
    values = CONFIG | {
        "mm_vision_tower": TOWERS[model],
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 24,
        "vocab_size": 30,
    }
    (tmp_path / "eagle" / "config.json").write_text(json.dumps(values))
    converted = convert_checkpoint(
        tmp_path / "eagle",
        tmp_path / "out",
        overrides=eagle_tiny.OVERRIDES,
    )
    assert converted == config
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_identical(read_folder(tmp_path / "back"), tensors)


def like_of(config):
    """What `restore_params` asks for."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = flax.traverse_util.unflatten_dict(
        CONVERSION.param_shapes(config, CONVERSION.parts(config, "eagle")), sep="/"
    )
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def test_neither_conversion_nor_export_sees_a_padded_vocabulary(tmp_path):
    tensors = fixture_weights(jnp.float32)
    eagle = eagle_tiny.write_eagle(tmp_path / "eagle", tensors)
    plain = convert_checkpoint(eagle, tmp_path / "plain", overrides=eagle_tiny.OVERRIDES)
    padding = "llama.pad_vocab_to_multiple_of=64"
    padded = convert_checkpoint(
        eagle, tmp_path / "padded", overrides=[*eagle_tiny.OVERRIDES, padding]
    )
    export_checkpoint(tmp_path / "padded", tmp_path / "back")
    assert_identical(read_folder(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == eagle_tiny.config()

    whole = restore_params(tmp_path / "padded", like_of(padded))
    assert whole["llama"]["head"]["kernel"].shape == (64, 128)
    for rows in (whole["llama"]["head"]["kernel"].T, whole["llama"]["embedding"]["embedding"]):
        assert rows[:100].any() and not rows[100:].any()
    # A checkpoint without padding fits a model with it, where the model says so.
    unpadded = padded.llama.unpadded_shapes
    filled = restore_params(tmp_path / "plain", like_of(padded), unpadded=unpadded)
    jax.tree.map(np.testing.assert_array_equal, filled, whole)
    assert plain.llama.unpadded_shapes == {}
    with pytest.raises(CheckpointError, match=r"checkpoint \(100, 64\), config \(128, 64\)"):
        restore_params(tmp_path / "plain", like_of(padded))


def test_split_projectors_have_no_way_back(tmp_path):
    eagle = eagle_tiny.write_eagle(tmp_path / "eagle", eagle_tiny.weights())
    convert_checkpoint(
        eagle, tmp_path / "out", overrides=eagle_tiny.OVERRIDES, split_projector=True
    )
    with pytest.raises(ConfigError, match="slices of one tensor"):
        export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_trained_checkpoint_goes_back_as_it_was_trained(tmp_path):
    """It no longer knows what the model has no parameter for: a class token, dropped positions."""
    tensors = fixture_weights(jnp.float32)
    eagle = eagle_tiny.write_eagle(tmp_path / "eagle", tensors)
    config = convert_checkpoint(eagle, tmp_path / "start", overrides=eagle_tiny.OVERRIDES)
    trained = jax.tree.map(
        lambda leaf: 2 * leaf, restore_params(tmp_path / "start", like_of(config))
    )
    written = json.loads((tmp_path / "start" / "config.json").read_text())
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", written)
    with open_checkpoints(tmp_path / "run") as checkpoints:
        args = {"params": ocp.args.StandardSave(trained), "config": ocp.args.JsonSave(written)}
        checkpoints.save(7, args=ocp.args.Composite(**args))
    export_checkpoint(tmp_path / "run", tmp_path / "back")

    back = read_folder(tmp_path / "back")
    assert back.keys() <= tensors.keys()
    for name, tensor in back.items():
        same = tensor == 2 * tensors[name]
        if not same.all():  # rows that the model drops come back as zeros
            assert "position_embedding" in name and same[1:].all() and not tensor[0].any(), name
    never_read = ("class_embedding", "post_layernorm.", "head.", "attn.rope.")
    lost = tensors.keys() - back.keys()
    assert lost and all(any(part in name for part in never_read) for name in lost)
