"""The decoder's head: how logits are summed up, and a vocabulary that a mesh cannot divide."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meteor_jax.models.decoders.llama.model import Llama, LlamaConfig
from meteor_jax.models.eagle.presets import LLAMA3_8B
from meteor_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings
from tests.compiled import collectives

SMALL = {
    "depth": 1,
    "width": 64,
    "num_heads": 8,
    "num_kv_heads": 8,
    "mlp_dim": 64,
    "max_positions": 32,
    "init_std": 0.2,
}
VOCABULARY = 257
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 6)).astype(np.int32)


def forward(llama, tokens):
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return llama.logits(llama.run(llama.embed(tokens), position, start=0, stop=1).x)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_logits_are_summed_up_in_float32(tie_embeddings):
    config = LlamaConfig(vocab_size=300, tie_embeddings=tie_embeddings, **SMALL)
    llama = Llama(config, jnp.bfloat16)
    params = init(config)["llama"]

    @jax.jit
    def run(params):
        x = jax.random.normal(jax.random.key(1), (64, config.width), jnp.bfloat16)
        return llama.apply({"params": params}, x, method=lambda m, x: (m.logits(x), m.norm(x)))

    logits, normed = run(params)
    kernel = params["embedding"]["embedding"].T if tie_embeddings else params["head"]["kernel"]
    kernel = np.asarray(kernel).astype(jnp.bfloat16)
    expected = np.asarray(normed, np.float32) @ kernel.astype(np.float32)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def llama3(vocabulary=VOCABULARY, **fields):
    """Llama 3's decoder with a small vocabulary, as odd as its own."""
    return dataclasses.replace(LLAMA3_8B, **SMALL, vocab_size=vocabulary, **fields)


@functools.partial(jax.jit, static_argnames="config")
def log_likelihood(params, tokens, *, config):
    logits = Llama(config).apply({"params": params["llama"]}, tokens, method=forward)
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return right.mean(), logits


@functools.partial(jax.jit, static_argnums=0)
def init(config):
    return {"llama": Llama(config).init(jax.random.key(0), TOKENS, method=forward)["params"]}


@pytest.mark.parametrize("sizes", [(1, 1, 8), (1, 4, 2)])
def test_an_odd_vocabulary_is_split_and_never_gathered(sizes):
    config, mesh = llama3(), make_mesh(MeshConfig(*sizes))
    shapes = jax.eval_shape(lambda: init(config))
    shardings = parameter_shardings(shapes, mesh)
    head, embedding = (
        shardings["llama"][part][name].spec
        for part, name in (("head", "kernel"), ("embedding", "embedding"))
    )
    assert head == PartitionSpec("fsdp", "tensor")
    assert embedding == PartitionSpec("tensor", "fsdp")

    params = init(config)
    step = jax.value_and_grad(log_likelihood, has_aux=True)
    expected = jax.jit(lambda params, tokens: step(params, tokens, config=config))(params, TOKENS)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(lambda params, tokens: step(params, tokens, config=config))
            .lower(jax.device_put(params, shardings), jax.device_put(TOKENS, rows))
            .compile()
        )
        found = compiled(jax.device_put(params, shardings), jax.device_put(TOKENS, rows))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    # The head's columns never come together: gathered over `fsdp` alone they are a `tensor` part.
    columns = shapes["llama"]["head"]["kernel"].shape[1]
    gathered = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert not [
        line
        for line in gathered
        if f"f32[64,{columns}]" in line.split(" all-gather(")[0]
        or f"f32[{columns},64]" in line.split(" all-gather(")[0]
    ]
    assert collectives(compiled.as_text())


def test_padded_columns_are_no_tokens():
    config = llama3()
    params = init(config)
    _, logits = log_likelihood(params, TOKENS, config=config)
    assert logits.shape[-1] > VOCABULARY
    # Whatever these columns hold, nothing but they can see it.
    junk = jax.tree.map(np.array, params)
    junk["llama"]["head"]["kernel"][:, VOCABULARY:] = 1e9
    value, again = log_likelihood(junk, TOKENS, config=config)
    np.testing.assert_array_equal(again, logits)
    plain = dataclasses.replace(config, pad_vocab_to_multiple_of=1)
    cut = jax.tree.map(np.asarray, params)
    cut["llama"]["head"]["kernel"] = cut["llama"]["head"]["kernel"][:, :VOCABULARY]
    cut["llama"]["embedding"]["embedding"] = cut["llama"]["embedding"]["embedding"][:VOCABULARY]
    expected, unpadded = log_likelihood(cut, TOKENS, config=plain)
    logits = np.asarray(logits)
    np.testing.assert_allclose(logits[..., :VOCABULARY], unpadded, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(logits).all() and (logits.argmax(-1) < VOCABULARY).all()
    draw = jax.jit(functools.partial(jax.random.categorical, shape=(100, *logits.shape[:2])))
    assert np.asarray(draw(jax.random.key(2), logits / 10)).max() < VOCABULARY
    loss = functools.partial(log_likelihood, config=config)
    gradient, _ = jax.jit(jax.grad(loss, has_aux=True))(junk, TOKENS)
    assert not np.asarray(gradient["llama"]["head"]["kernel"])[:, VOCABULARY:].any()


def test_padding_to_no_multiple_is_one_line():
    with pytest.raises(ValueError, match="pad_vocab_to_multiple_of: expected at least 1"):
        LlamaConfig(pad_vocab_to_multiple_of=0)
