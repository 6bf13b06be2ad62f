"""EAGLE and its METEOR form at full size, with the released two-stage recipe.

    --config=configs/eagle.py:x4_7b             EAGLE: channels joined, one projector
    --config=configs/eagle.py:meteor_x4_7b      METEOR: a projector an encoder, tokens joined

x4 or x5 encoders; 7b and 13b (Vicuna), 8b (Llama 3), 34b (Yi). Start from converted weights with
--config.init_from=FOLDER, and set data.tokenizer to the tokenizer's folder.
"""

import dataclasses

from ml_collections import ConfigDict

from meteor_jax.evaluation.config import EvalConfig
from meteor_jax.models.eagle import eagle_config, template_of
from meteor_jax.training.experiment import complete

METEOR = "meteor_"
REMAT = "nothing_saveable"
# Tokens that pass the boundaries inside the encoders, of 6,697 (X4) or 7,721 (X5), ConvNeXt's
# 1,024 joining at the last: 1,193 in the end is the paper's number, the other two are ours. 576
# enter the LLM, whose layers see 242 on average.
KEEP_IN_ENCODERS = {"x4": (4000, 2000, 1193), "x5": (4600, 2300, 1193)}
KEEP_IN_LLM = (256, 104, 32)


def get_config(name: str = "x4_7b") -> ConfigDict:
    model_name = name.removeprefix(METEOR)
    is_meteor = model_name != name
    model = eagle_config(model_name, fusion="post" if is_meteor else "pre", remat=REMAT)
    quarter = model.llama.depth // 4
    stages = (
        f"fuse=576, layers=({quarter}, {2 * quarter}, {3 * quarter}), keep={KEEP_IN_LLM}"
    )
    if is_meteor:
        # All tokens together have more places than the decoder has rotary positions, so those
        # that stay are numbered through; "full" does not fit this form.
        encode = KEEP_IN_ENCODERS[model_name.partition("_")[0]]
        stages = f"encode={encode}, {stages}, positions=compact"

    config = ConfigDict()
    config.model = dataclasses.asdict(model)
    config.data = {
        "sources": ("easy-vqa",), "image_size": model.image_size, "text_length": 1024,
        "tokenizer": "byte",
    }
    stage = {"warmup": 0.03, "adam_b2": 0.999, "plans": ("meteor",) if is_meteor else ("full",)}
    config.train = {
        "pretrain": stage
        | {
            "kind": "caption", "template": "plain", "trainable": ("projector",), "steps": 2180,
            "batch_size": 256, "learning_rate": 1e-3,
            "before": "calibrate_ranks" if is_meteor else "nothing",
        },
        "finetune": stage
        | {
            "kind": "questions", "template": template_of(model_name), "steps": 14100,
            "batch_size": 128, "learning_rate": 2e-5,
        },
        "checkpoint_every": 500,
        "mesh": {"fsdp": -1},
    }
    config.plans = {"meteor": f"meteor({stages})"}
    plans = ("meteor",) if is_meteor else ("full", "meteor")
    config.eval = dataclasses.asdict(EvalConfig(plans=plans, max_new_tokens=16))
    return complete(config)
