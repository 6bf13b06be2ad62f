"""EAGLE-X4-7B with every width divided by 8, for measuring speed where the whole does not fit.

Depths and token counts are X4's: CLIP at 336 pixels (576 tokens), ConvNeXt-XXL and EVA-02 at 1,024
(1,024 and 4,096), Pix2Struct's 45 × 45 patches (2,025), a decoder of 32 layers over 1,024 visual
tokens, or METEOR's 1,193 → 576 → 242. A head keeps its width and there are fewer of them, because
the shape of a head sets how fast attention is. `--config=configs/bench_x4_eighth.py:1` is X4-7B
itself, in bfloat16; 2 and 4 will do too. Weights start from nothing.
"""

import dataclasses

from ml_collections import ConfigDict

from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import complete
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.models.eagle.presets import eagle_config
from meteor_jax.pruning.methods.fastv import fastv
from meteor_jax.pruning.methods.meteor import meteor
from meteor_jax.pruning.methods.random import random
from meteor_jax.pruning.text import override

BUDGET = 242


def get_config(divisor: str = "8") -> ConfigDict:
    if divisor not in ("1", "2", "4", "8"):
        raise ConfigError(f"bench_x4_eighth: expected a divisor of 1, 2, 4 or 8, got '{divisor}'.")
    by = int(divisor)
    whole = eagle_config("x4_7b", dtype="bfloat16" if by == 1 else "float32")

    def divide(part, *names):
        sizes = {name: getattr(part, name) // by for name in names}
        return dataclasses.replace(part, **sizes)

    transformer = ("width", "num_heads", "mlp_dim")
    encoders = {
        name: divide(encoder, *transformer)
        for name, encoder in whole.encoders.items()
        if name != "convnext"
    }
    convnext = whole.encoders["convnext"]
    widths = tuple(width // by for width in convnext.widths)
    encoders["convnext"] = dataclasses.replace(convnext, widths=widths)
    llama = divide(whole.llama, *transformer, "num_kv_heads")
    model = dataclasses.replace(whole, encoders=encoders, llama=llama)
    # Given, not measured: the largest that an encoder's width allows. In proportion they are the
    # same at every divisor, so an eighth of the model shares its tokens as the whole does.
    ranks = tuple((name, float(encoder.width)) for name, encoder in model.encoders.items())
    quarter = model.llama.depth // 4

    config = ConfigDict()
    config.model = dataclasses.asdict(model)
    config.data = {
        "sources": ("easy-vqa",),
        "image_size": model.image_size,
        "text_length": 64,
        "tokenizer": "byte",
    }
    config.train = {
        "finetune": {
            "template": "vicuna_v1",
            "steps": 1,
            "batch_size": 1,
            "plans": ("full", "meteor"),
        },
    }
    # `meteor` runs in METEOR's form, a projector an encoder; the others in EAGLE's, one projector.
    plan = meteor(
        encode=(4000, 2000, 1193),
        fuse=576,
        layers=(quarter, 2 * quarter, 3 * quarter),
        keep=(256, 104, 32),
    )
    fields = {"encode.ranks": ranks, "decode.heads": max(1, 8 // by), "positions": "contiguous"}
    config.plans = {
        "meteor": override(plan, **fields),
        "random": random(keep=BUDGET),
        # Two layers of all 1,024 tokens, then 190: on average 242.
        "fastv": fastv(layer=2, keep=190),
    }
    config.eval = dataclasses.asdict(EvalConfig(plans=("full", "meteor"), max_new_tokens=16))
    return complete(config)
