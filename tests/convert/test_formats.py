"""Each encoder alone in its public format gives the parameters that it gives inside an EAGLE."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from meteor_jax.checkpoint import restore_params
from meteor_jax.config import ConfigError, build
from meteor_jax.convert.exporting import export_checkpoint
from meteor_jax.convert.loading import convert_checkpoint
from meteor_jax.models.eagle.model import MeteorConfig
from meteor_jax.models.eagle.projector import Projector
from meteor_jax.models.encoders.eva02.model import rope_freqs
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from tests.convert import eagle_tiny
from tests.convert.test_round_trip import assert_identical, read_folder

PREFIX = "model.vision_tower.vision_towers.{n}.vision_tower."


def read_params(workdir):
    """The parameters in their own dtypes."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore((workdir / "checkpoints" / "0" / "params").absolute())


@pytest.fixture(scope="module")
def eagle(tmp_path_factory):
    """The parameters of the tiny EAGLE, and its workdir."""
    folder = tmp_path_factory.mktemp("eagle")
    source = eagle_tiny.write_eagle(folder / "source", eagle_tiny.weights())
    convert_checkpoint(source, folder / "out", overrides=eagle_tiny.OVERRIDES)
    return read_params(folder / "out"), folder / "out"


def tower(n):
    prefix = PREFIX.format(n=n)
    tensors = eagle_tiny.weights()
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def renamed(tensors, *patterns):
    def rename(name):
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def write(folder, tensors, config=None, file="model.safetensors"):
    folder.mkdir()
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / file)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def hf_convnext():
    return renamed(
        tower(1),
        (r"^stem\.0", "convnext.embeddings.patch_embeddings"),
        (r"^stem\.1", "convnext.embeddings.layernorm"),
        (r"^stages", "convnext.encoder.stages"),
        (r"downsample", "downsampling_layer"),
        (r"(blocks\.\d+)\.weight$", r"\1.layer_scale_parameter"),
        (r"blocks", "layers"),
        (r"conv_dw", "dwconv"),
        (r"(layers\.\d+)\.norm", r"\1.layernorm"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm", "convnext.layernorm"),
        (r"^head\.fc", "classifier"),
    )


CASES = {
    "clip": (
        lambda: (
            tower(0)
            | {
                "logit_scale": np.ones((), np.float32),
                "text_model.final_layer_norm.weight": np.ones(3, np.float32),
                "visual_projection.weight": np.ones((3, 32), np.float32),
            }
        ),
        {"model_type": "clip", "vision_config": {"num_attention_heads": 2}},
    ),
    # As transformers 5 writes a vision model without a text model.
    "clip_vision": (
        lambda: renamed(tower(0), (r"^vision_model\.", "")),
        {"model_type": "clip_vision_model", "num_attention_heads": 2},
    ),
    "convnext_timm": (
        lambda: renamed(tower(1), (r"(blocks\.\d+)\.weight$", r"\1.gamma")),
        {"architecture": "convnext_xxlarge"},
    ),
    "convnext_hf": (hf_convnext, {"model_type": "convnext"}),
    "eva02": (
        lambda: (
            renamed(tower(2), (r"^", "model.backbone.net."))
            | {"model.backbone.simfp_2.0.weight": np.ones(3, np.float32)}
        ),
        None,
    ),
    "pix2struct": (
        lambda: (
            renamed(tower(3), (r"^", "encoder."))
            | {"decoder.embed_tokens.weight": np.ones((3, 32), np.float32)}
        ),
        {"model_type": "pix2struct", "vision_config": {"num_attention_heads": 2}},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_encoder_alone(tmp_path, eagle, case):
    tensors, config = CASES[case]
    part = case.split("_")[0]
    source = write(tmp_path / "source", tensors(), config)
    model = convert_checkpoint(source, tmp_path / "out")
    params = read_params(tmp_path / "out")
    assert list(params) == [part]
    expected = dict(eagle[0][part])
    if part == "eva02":  # whose table for the whole grid is computed
        for ours, theirs in zip(
            *(tree.pop("tables").values() for tree in (params[part], expected)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, params[part], expected)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["model"]
    assert set(written) == {"family", "encoders", "encoder_order"}
    assert build(MeteorConfig, written) == model
    whole = json.loads((eagle[1] / "config.json").read_text())["model"]
    assert written["encoders"][part] == whole["encoders"][part]


def test_an_encoder_alone_may_have_another_name(tmp_path):
    source = write(tmp_path / "source", hf_convnext())
    config = convert_checkpoint(source, tmp_path / "out", name="fine")
    assert [(name, encoder.type) for name, encoder in config.encoders.items()] == [
        ("fine", "convnext")
    ]
    assert list(read_params(tmp_path / "out")) == ["fine"]
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    prefix = PREFIX.format(n=0)
    assert_identical(
        read_folder(tmp_path / "back"), {prefix + name: t for name, t in tower(1).items()}
    )
    whole = eagle_tiny.write_eagle(tmp_path / "eagle", eagle_tiny.weights())
    with pytest.raises(ConfigError, match="'eagle' is not an encoder alone"):
        convert_checkpoint(whole, tmp_path / "no", name="fine")


def test_encoder_alone_goes_back_under_eagles_names(tmp_path):
    source = write(tmp_path / "source", hf_convnext())
    convert_checkpoint(source, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    prefix = PREFIX.format(n=0)
    assert_identical(
        read_folder(tmp_path / "back"), {prefix + name: t for name, t in tower(1).items()}
    )


def test_eva02_of_a_detector_with_larger_images(tmp_path, eagle):
    """Its rotary tables are for another grid; ours are computed."""
    tensors = renamed(tower(2), (r"^", "backbone.net."))
    for wave in ("cos", "sin"):
        tensors[f"backbone.net.rope_glb.freqs_{wave}"] = np.zeros((96 * 96, 16), np.float32)
    source = write(tmp_path / "source", tensors)
    config = convert_checkpoint(source, tmp_path / "out")
    assert config.encoders["eva02"].grid == 64
    tables = read_params(tmp_path / "out")["eva02"]["tables"]
    for name, table in rope_freqs(config.encoders["eva02"]).items():
        np.testing.assert_allclose(tables[name], table, atol=2e-6)
        np.testing.assert_allclose(tables[name], eagle[0]["eva02"]["tables"][name], atol=2e-6)


def without_tables(tensors, *, blocks_too):
    dropped = ("freqs_",) if blocks_too else ("rope_win", "rope_glb")
    return {name: t for name, t in tensors.items() if not any(word in name for word in dropped)}


@pytest.mark.parametrize("blocks_too", [False, True])
def test_any_part_of_the_rotary_tables_will_do(tmp_path, eagle, blocks_too):
    """Those of the blocks are as good; without any they are computed, rounded as at training."""
    tensors = without_tables(eagle_tiny.weights(), blocks_too=blocks_too)
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    source = eagle_tiny.write_eagle(tmp_path / "source", tensors)
    overrides = [*eagle_tiny.OVERRIDES, *(["encoders.eva02.num_heads=2"] if blocks_too else [])]
    convert_checkpoint(source, tmp_path / "out", overrides=overrides)
    tables = read_params(tmp_path / "out")["eva02"]["tables"]
    for name, table in eagle[0]["eva02"]["tables"].items():
        assert tables[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(tables[name].astype(np.float32), table, atol=4e-3)
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_identical(read_folder(tmp_path / "back"), tensors)


def test_stage_one_projector(tmp_path, eagle):
    tensors = {n: t for n, t in eagle_tiny.weights().items() if "mm_projector" in n}
    source = write(tmp_path / "source", tensors, eagle_tiny.config())
    sizes = [
        "encoders.clip.width=32",
        "encoders.clip.num_heads=2",
        "encoders.convnext.widths=(8,16,32,64)",
        "encoders.eva02.width=32",
        "encoders.eva02.num_heads=2",
        "encoders.pix2struct.width=32",
        "encoders.pix2struct.num_heads=2",
    ]
    convert_checkpoint(source / "model.safetensors", tmp_path / "out", overrides=sizes)
    params = read_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, {"projector": eagle[0]["projector"]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_projector(tmp_path, dtype):
    """The first layers of METEOR's projectors sum to EAGLE's; the second layers are its own."""
    tensors = {n: tensor.astype(jnp.dtype(dtype)) for n, tensor in eagle_tiny.weights().items()}
    source = eagle_tiny.write_eagle(tmp_path / "source", tensors)
    config = convert_checkpoint(
        source, tmp_path / "out", overrides=eagle_tiny.OVERRIDES, split_projector=True
    )
    assert config.fusion == "post"
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), read_params(tmp_path / "out"))
    weight, bias = (
        tensors[f"model.mm_projector.0.{name}"].astype(np.float32) for name in ("weight", "bias")
    )
    x = np.random.default_rng(0).normal(size=(7, weight.shape[1])).astype(np.float32)
    total, start = 0.0, 0
    for name in config.encoders:
        own = params[f"projector_{name}"]
        part = x[:, start : start + config.encoder(name).width]
        start += config.encoder(name).width
        out, state = Projector(config.llama.width).apply(
            {"params": own},
            part,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "fc1",
        )
        assert out.shape == (7, config.llama.width)
        total = total + state["intermediates"]["fc1"]["__call__"][0]
        np.testing.assert_array_equal(
            own["fc2"]["kernel"], tensors["model.mm_projector.2.weight"].astype(np.float32).T
        )
    expected = x @ weight.T + bias
    assert np.abs(total - expected).max() <= 1e-6 * np.abs(expected).max()
    shares = sum(np.float64(params[f"projector_{n}"]["fc1"]["bias"]) for n in config.encoders)
    np.testing.assert_array_equal(shares, np.float64(bias))


def test_restores_into_shards(eagle):
    """Each device gets its part of an array, as from a checkpoint of training."""
    mesh = make_mesh(MeshConfig(1, 4, 2), devices=jax.devices()[:8])
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), eagle[0])
    gate = like["llama"]["blocks"]["stack"]["gate"]
    gate["kernel"] = jax.ShapeDtypeStruct(gate["kernel"].shape, jnp.float32, sharding=sharding)
    restored = restore_params(eagle[1], like)["llama"]["blocks"]["stack"]["gate"]["kernel"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, eagle[0]["llama"]["blocks"]["stack"]["gate"]["kernel"])
