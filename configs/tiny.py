"""easy-vqa on two CPU cores in a quarter of an hour: captions first, then questions.

The three encoders have the architectures of the large ones and start from nothing, so everything
trains in both stages. The captions are for the encoders: the questions begin with a decoder and
projectors that have learnt nothing, because those that captions taught to name what an image shows
often do not learn in these steps to compare it with what a question asks for. Of 116 visual tokens
METEOR lets 40 into the decoder, whose layers see 28 on average.
"""

import dataclasses

from ml_collections import ConfigDict

from meteor_jax.experiment.config import complete
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.pruning.methods.meteor import meteor
from meteor_jax.pruning.methods.random import random
from meteor_jax.pruning.text import override


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = {
        "image_size": 64,
        "encoders": {
            "clip": {
                "image_size": 48,
                "patch_size": 8,
                "width": 96,
                "depth": 3,
                "num_heads": 4,
                "mlp_dim": 192,
                "remat": "nothing_saveable",
            },
            "convnext": {
                "image_size": 64,
                "depths": (1, 1, 1),
                "widths": (24, 48, 96),
                "layer_scale_init": 0.5,
                "remat": "nothing_saveable",
            },
            "pix2struct": {
                "grid_side": 8,
                "patch_size": 8,
                "width": 96,
                "depth": 3,
                "num_heads": 4,
                "mlp_dim": 192,
                "num_positions": 10,
                "remat": "nothing_saveable",
            },
        },
        "llama": {
            "depth": 4,
            "width": 96,
            "num_heads": 4,
            "num_kv_heads": 4,
            "mlp_dim": 256,
            "vocab_size": 384,
            "max_positions": 512,
            "tie_embeddings": True,
            "init_std": 0.1,
            "remat": "nothing_saveable",
        },
    }
    config.data = {
        "sources": ("easy-vqa",),
        "image_size": 64,
        "text_length": 104,
        "questions_per_image": 8,
        "tokenizer": "bpe:384",
        "attention": "independent_qa",
    }
    stage = {"batch_size": 16, "learning_rate": 1e-3, "warmup_ratio": 0.05, "weight_decay": 0.01}
    config.train = {
        "pretrain": stage
        | {"task": "captioning", "template": "plain_eos", "text_length": 16, "steps": 400},
        "finetune": stage
        | {
            "task": "instruction",
            "template": "qa",
            "steps": 650,
            "plans": ("full", "meteor"),
            "reinit": ("^llama/", "^projector"),
            "calibrate_before": True,
        },
        "log_every": 10,
        "checkpoint_every": 500,
        "mesh": {"data": -1},
    }
    config.plans = {
        "meteor": override(
            meteor(encode=(66, 48, 56), fuse=40, layers=(1, 2, 3), keep=(30, 24, 18)),
            **{"decode.heads": 1},
        ),
        "random": random(keep=28),
    }
    config.eval = dataclasses.asdict(
        EvalConfig(plans=("full", "meteor", "random"), max_new_tokens=8)
    )
    return complete(config)
