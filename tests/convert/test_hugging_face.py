"""Random tiny models of Hugging Face, saved, converted, and run side by side."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.checkpoint import restore_params
from meteor_jax.convert.exporting import export_checkpoint
from meteor_jax.convert.loading import convert_checkpoint
from meteor_jax.convert.sources import ConversionError, open_source
from meteor_jax.inference.generate import generate
from meteor_jax.models.decoders.llama.model import Llama
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.models.encoders.clip.model import Clip
from meteor_jax.models.encoders.convnext.model import ConvNext
from meteor_jax.models.encoders.pix2struct.model import Pix2Struct, preprocess
from meteor_jax.models.encoders.sam.model import Sam
from meteor_jax.models.layers.resize import patchify
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import VisualTokens
from tests.convert.test_formats import read_params
from tests.convert.test_round_trip import assert_identical, read_folder

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PART, WHOLE = 1e-5, 1e-4  # of the largest magnitude: one operation or a whole encoder


def randomise(model, scale=0.3):
    """Weights large enough that every part of the model matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            width = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(1 + 0.2 * noise if is_norm else noise * min(scale, width**-0.5))
    return model.eval()


def convert(model, tmp_path, *overrides):
    model.save_pretrained(tmp_path / "source")
    config = convert_checkpoint(tmp_path / "source", tmp_path / "out", overrides=overrides)
    return config, jax.tree.map(jnp.asarray, read_params(tmp_path / "out"))


def image(size, batch=2):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def to_torch(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2))


def assert_close(ours, theirs, tolerance=WHOLE):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def run(module, params, x):
    with jax.default_matmul_precision("highest"):
        return jax.jit(module.apply)({"params": params}, x)


@pytest.mark.parametrize("depth, tolerance", [(1, PART), (3, WHOLE)])
def test_clip(tmp_path, depth, tolerance):
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    )
    theirs = randomise(transformers.CLIPVisionModel(config))
    config, params = convert(theirs, tmp_path, "encoders.clip.keep_cls=True")
    assert config.encoders["clip"].num_heads == 4
    ours = run(Clip(config.encoders["clip"]), params["clip"], image(28)).x
    # Without the norm at the end, and without the CLS token, which the blocks did see.
    assert_close(ours, theirs(to_torch(image(28))).last_hidden_state[:, 1:], tolerance)


@pytest.mark.parametrize("depth, tolerance", [(1, PART), (3, WHOLE)])
def test_pix2struct(tmp_path, depth, tolerance):
    config = transformers.Pix2StructVisionConfig(
        hidden_size=32,
        d_ff=40,
        d_kv=8,
        num_hidden_layers=depth,
        num_attention_heads=4,
        seq_len=9,
        patch_embed_hidden_size=48,
    )
    theirs = randomise(transformers.Pix2StructVisionModel(config))
    config, params = convert(theirs, tmp_path, "encoders.pix2struct.grid_side=5")
    assert config.encoders["pix2struct"].patch_size == 4
    ours = run(Pix2Struct(config.encoders["pix2struct"]), params["pix2struct"], image(30)).x
    patches = np.asarray(patchify(preprocess(jnp.asarray(image(30)), size=20), patch=4))
    ids = np.broadcast_to(np.stack(np.mgrid[1:6, 1:6], axis=-1), (2, 5, 5, 2))
    flat = np.concatenate([ids, patches], axis=-1).reshape(2, 25, 50).astype(np.float32)
    x = theirs(flattened_patches=torch.from_numpy(flat)).last_hidden_state
    assert_close(ours, x, tolerance)


@pytest.mark.parametrize("depth, tolerance", [(1, PART), (4, WHOLE)])
def test_sam(tmp_path, depth, tolerance):
    """Up to the first norm of SAM's neck, where EAGLE ends; the grid does not divide by windows."""
    vision = transformers.SamVisionConfig(
        hidden_size=32,
        mlp_dim=48,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=80,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[2],
        output_channels=6,
    )
    whole = transformers.SamModel(transformers.SamConfig(vision_config=vision))
    theirs = randomise(whole).vision_encoder
    config, params = convert(
        whole, tmp_path, *(["encoders.sam.global_blocks=()"] if depth == 1 else [])
    )
    assert config.encoders["sam"].window == 4
    ours = run(Sam(config.encoders["sam"]), params["sam"], image(80)).x

    x = theirs.patch_embed(to_torch(image(80))) + theirs.pos_embed
    for layer in theirs.layers:
        out = layer(x)
        x = out[0] if isinstance(out, tuple) else out
    neck = theirs.neck
    x = neck.layer_norm1(neck.conv1(x.permute(0, 3, 1, 2)))
    x = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    assert_close(ours, x, tolerance)


def test_convnext(tmp_path):
    config = transformers.ConvNextConfig(depths=[1, 2], hidden_sizes=[8, 16], num_stages=2)
    theirs = randomise(transformers.ConvNextForImageClassification(config)).convnext
    config, params = convert(theirs, tmp_path, "encoders.convnext.image_size=64")
    ours = run(ConvNext(config.encoders["convnext"]), params["convnext"], image(64)).x
    for module in theirs.modules():  # XXLarge, which EAGLE uses, has 1e-5 everywhere
        if hasattr(module, "eps"):
            module.eps = 1e-5
    x = theirs.encoder(theirs.embeddings(to_torch(image(64)))).last_hidden_state
    assert_close(ours, x.flatten(2).transpose(1, 2))


LLAMAS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


def make_llama(**options):
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 61,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **options,
        }
    )
    return randomise(transformers.LlamaForCausalLM(config), scale=1.0)


@pytest.mark.parametrize("case", list(LLAMAS))
def test_llama_logits(tmp_path, case):
    theirs = make_llama(**LLAMAS[case])
    config, params = convert(theirs, tmp_path)
    tokens = np.random.default_rng(1).integers(3, 61, (2, 20))

    def logits(llama, tokens):
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        out = llama.run(llama.embed(tokens), position, start=0, stop=llama.config.depth)
        return llama.logits(out.x)

    with jax.default_matmul_precision("highest"):
        ours = Llama(config.llama).apply({"params": params["llama"]}, tokens, method=logits)
    assert_close(ours, theirs(torch.from_numpy(tokens)).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["plain", "grouped", "tied"])
def test_llama_generates_the_same(tmp_path, case, side):
    """Prompts of unequal lengths in one batch; ours are padded on the right, theirs on either."""
    theirs = make_llama(**LLAMAS[case])
    config, params = convert(theirs, tmp_path)
    random = np.random.default_rng(2)
    prompts = [random.integers(3, 61, length) for length in (9, 4, 6)]
    tokens, valid = np.zeros((3, 9), np.int32), np.zeros((3, 9), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], valid[row, : len(prompt)] = prompt, True
    nothing = np.zeros((3, 1, 1), np.int32)
    absent = VisualTokens(
        x=np.zeros((3, 1, 1, 32), np.float32),
        encoder=nothing,
        patch_index=nothing,
        position=nothing,
        span=1,
    )
    ours = generate(
        Meteor(config),
        params,
        absent,
        image_valid=np.zeros((3, 1), bool),
        tokens=tokens,
        text_valid=valid,
        plan=PrunePlan(),
        max_new_tokens=32,
        eos_id=-1,
    ).tokens
    for row in range(len(prompts)):
        np.testing.assert_array_equal(ours[row], their_tokens(theirs, prompts, row, side=side))


def their_tokens(model, prompts, row, *, side):
    """Greedy ids for one row of a batch padded on one side."""
    longest = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        pad = [0] * (longest - len(prompt))
        rows.append(pad + list(prompt) if side == "left" else list(prompt) + pad)
        mask = [1] * len(prompt)
        masks.append(pad + mask if side == "left" else mask + pad)
    tokens, mask = torch.tensor(rows), torch.tensor(masks)
    out = []
    with torch.no_grad():
        for _ in range(32):
            position = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(tokens, attention_mask=mask, position_ids=position).logits
            last = (position * mask).argmax(-1)
            new = logits[torch.arange(len(rows)), last].argmax(-1)
            out.append(int(new[row]))
            if side == "left":
                tokens, mask = (
                    torch.cat([tokens, new[:, None]], 1),
                    torch.cat([mask, mask[:, :1] * 0 + 1], 1),
                )
            else:  # room for the new token behind each row's last one
                tokens = torch.cat([tokens, tokens[:, :1] * 0], 1)
                mask = torch.cat([mask, mask[:, :1] * 0], 1)
                tokens[torch.arange(len(rows)), last + 1] = new
                mask[torch.arange(len(rows)), last + 1] = 1
    return out


@pytest.mark.parametrize("shards", ["one", "many"])
def test_torch_files(tmp_path, shards):
    """pytorch_model.bin, and many of them with an index, give what safetensors give."""
    theirs = make_llama().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "source")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    state = theirs.state_dict()
    if shards == "one":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        places = {}
        for shard in range(2):
            file = f"pytorch_model-0000{shard + 1}-of-00002.bin"
            part = dict(list(state.items())[shard::2])
            torch.save(part, folder / file)
            places |= dict.fromkeys(part, file)
        index = {"weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert_checkpoint(folder, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_identical(read_folder(tmp_path / "back"), read_folder(tmp_path / "source"))


def test_nested_pth(tmp_path):
    """As a detector is saved: the weights inside a dict, beside other things."""
    theirs = {"model": {"backbone.net.pos_embed": torch.ones(1, 5, 4)}, "iteration": 3}
    torch.save(theirs, tmp_path / "det.pth")
    source = open_source(tmp_path / "det.pth")
    assert list(source.entries) == ["model.backbone.net.pos_embed"]
    np.testing.assert_array_equal(source.read("model.backbone.net.pos_embed"), np.ones((1, 5, 4)))


def test_truncated_torch_file(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match=r"a\.bin: cannot be read"):
        open_source(tmp_path / "a.bin")


def test_code_in_a_torch_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"a": torch.ones(1), "b": Evil()}, tmp_path / "a.bin")
    with pytest.raises(ConversionError, match=r"a\.bin: cannot be read"):
        open_source(tmp_path / "a.bin")


def test_restore_params_takes_it(tmp_path):
    """The workdir is one that the rest of the project can start from."""
    _, params = convert(make_llama(), tmp_path)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
    restored = restore_params(tmp_path / "out", like)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {jnp.dtype(jnp.bfloat16)}
