"""What does not fit is said all at once, and nothing is left behind."""

import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from meteor_jax.cli.__main__ import main
from meteor_jax.config import ConfigError
from meteor_jax.convert.loading import convert_checkpoint
from meteor_jax.convert.sources import ConversionError
from tests.convert.eagle_tiny import write_shards
from tests.convert.test_round_trip import assert_identical, read_folder

SIZES = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}
UP = "model.layers.1.mlp.up_proj.weight"


def llama_tensors(sizes=SIZES):
    width, hidden, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    key = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes = {
        "model.embed_tokens": (vocab, width),
        "model.norm": (width,),
        "lm_head": (vocab, width),
    }
    for i in range(sizes["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    return {
        f"{name}.weight": random.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(folder, tensors, *, config=SIZES, num_shards=2):
    write_shards(folder, tensors, num_shards=num_shards)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def left_behind(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "source")


def test_everything_wrong_is_listed(tmp_path):
    tensors = llama_tensors()
    del tensors["model.layers.0.mlp.gate_proj.weight"]
    for layer in range(3):
        del tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
    tensors[UP] = tensors[UP][:-1]
    tensors["model.layers.1.mlp.bonus.weight"] = np.zeros(3, np.float32)
    source = write(tmp_path / "source", tensors)
    cut = source / "model-00002-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(source, tmp_path / "deep" / "out")
    assert error.value.problems == [
        "missing: model.layers.0.mlp.gate_proj.weight (12, 8)",
        "missing: model.layers.{i}.self_attn.o_proj.weight of all layers (8, 8)",
        "truncated: model-00002-of-00002.safetensors ends before its tensors do; fetch it again",
        "unknown: model.layers.1.mlp.bonus.weight (3,)",
        f"wrong shape: {UP}: expected (12, 8), got (11, 8)",
    ]
    assert all(problem in str(error.value) for problem in error.value.problems)
    assert left_behind(tmp_path) == []


def test_the_command_says_it_in_the_end(tmp_path, capsys):
    tensors = llama_tensors()
    del tensors[UP]
    source = write(tmp_path / "source", tensors)
    code = main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"])
    assert code == 2
    assert capsys.readouterr().err == (f"error: missing: {UP} (12, 8)\n")
    assert left_behind(tmp_path) == []


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    tensors = llama_tensors()
    tensors[UP][0, 0] = 1e6
    source = write(tmp_path / "source", tensors)
    with pytest.raises(ConfigError, match=rf"{re.escape(UP)} holds numbers too large for float16"):
        convert_checkpoint(source, tmp_path / "out", dtype="float16")
    assert left_behind(tmp_path) == []


def test_a_lost_shard_and_an_index_that_lies(tmp_path):
    source = write(tmp_path / "source", llama_tensors(), num_shards=3)
    (source / "model-00003-of-00003.safetensors").unlink()
    (source / "model-00002-of-00003.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(source, tmp_path / "out")
    lost, gone = error.value.problems
    assert lost.startswith("model-00002-of-00003.safetensors: cannot be read")
    assert gone == "model-00003-of-00003.safetensors: the index names it, but it is not there."

    source = write(tmp_path / "other", llama_tensors(), num_shards=1)
    index_path = source / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00001.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"missing: model\.ghost: the index places it in"):
        convert_checkpoint(source, tmp_path / "out")


def test_output_is_never_overwritten(tmp_path):
    source = write(tmp_path / "source", llama_tensors())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        convert_checkpoint(source, tmp_path / "out")
    assert left_behind(tmp_path) == ["out"]
    assert left_behind(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rotary scaling .* not supported"),
        ({"hidden_act": "gelu"}, "expected hidden_act='silu'"),
        ({"head_dim": 5}, "expected head_dim=hidden_size/num_attention_heads"),
    ],
)
def test_what_the_model_cannot_do(tmp_path, change, message):
    source = write(tmp_path / "source", llama_tensors(), config=SIZES | change)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--set=llama.widht=8", "no such field. Did you mean 'width'?"),
        ("--set=llama.width", "expected FIELD=VALUE"),
        ("--set=llama.width=wide", "expected int, got 'wide'"),
        ("--set=llama.width.x=1", "'width' has no fields"),
        ("--split_projector", "holds no EAGLE projector"),
        ("--format=clip", "missing: "),
    ],
)
def test_arguments(tmp_path, capsys, argument, message):
    source = write(tmp_path / "source", llama_tensors())
    assert main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}", argument]) == 2
    assert message in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ConversionError, match="does not exist"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "source").mkdir()
    with pytest.raises(ConversionError, match="no weights in"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    save_file({"a": np.zeros(2)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"no known format .* --format: eagle"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source" / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json: not JSON"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_torch_files_need_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "mm_projector.bin").touch()
    with pytest.raises(ConversionError, match=r"mm_projector\.bin needs PyTorch .* pip install"):
        convert_checkpoint(tmp_path / "mm_projector.bin", tmp_path / "out")


def test_bfloat16_and_float32_side_by_side(tmp_path):
    """A stack takes the wider dtype, so nothing is lost."""
    tensors = llama_tensors()
    tensors[UP] = tensors[UP].astype(jnp.bfloat16)
    source = write(tmp_path / "source", tensors)
    convert_checkpoint(source, tmp_path / "out")
    main(["convert", "--to_torch", f"--source={tmp_path / 'out'}", f"--output={tmp_path / 'back'}"])
    assert_identical(read_folder(tmp_path / "back"), tensors)
