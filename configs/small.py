"""The study: reading and easy-vqa together; three hours on two CPU cores, encoders included.

    meteor pretrain-encoders --config=configs/small.py \\
        --workdir=runs/small_encoders
    python train.py --config=configs/small.py --workdir=runs/small

Every plan then continues from there with itself, full too, same data, steps and schedule:

    python train.py --config=configs/small.py --workdir=runs/small_meteor \\
        --config.init_from="('runs/small',)" --config.train.pretrain.steps=0 \\
        --config.train.finetune.steps=300 --config.train.finetune.plans="('meteor',)" \\
        --config.eval.plans="('meteor',)"

Of 352 visual tokens a pruned plan lets at most 84 (24 %) into the decoder's layers, on average.
"""

import dataclasses

from ml_collections import ConfigDict

from meteor_jax.experiment.config import complete
from meteor_jax.experiment.eval_config import EvalConfig

REMAT = "nothing_saveable"
BUDGET = 84  # 24 % of the visual tokens


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = {
        "image_size": 96,
        "encoders": {
            "clip": {
                "image_size": 96,
                "patch_size": 12,
                "width": 128,
                "depth": 3,
                "num_heads": 4,
                "mlp_dim": 256,
                "remat": REMAT,
            },
            "convnext": {
                "image_size": 96,
                "depths": (1, 2),
                "widths": (32, 128),
                "layer_scale_init": 0.5,
                "remat": REMAT,
            },
            "pix2struct": {
                "grid_side": 12,
                "patch_size": 8,
                "width": 128,
                "depth": 4,
                "num_heads": 4,
                "mlp_dim": 256,
                "num_positions": 14,
                "remat": REMAT,
            },
        },
        "llama": {
            "depth": 6,
            "width": 128,
            "num_heads": 4,
            "num_kv_heads": 4,
            "mlp_dim": 352,
            "vocab_size": 384,
            "max_positions": 512,
            "tie_embeddings": True,
            "init_std": 0.09,
            "remat": REMAT,
        },
    }
    config.data = {
        "sources": ("reading", "easy-vqa"),
        "weights": (0.8, 0.2),
        "image_size": 96,
        "text_length": 112,
        "questions_per_image": 8,
        "tokenizer": "bpe:384",
    }
    stage = {
        "batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.03,
        "weight_decay": 0.01,
        "lr_multipliers": ((f"^({'|'.join(config.model.encoders)})/", 0.3),),
    }
    config.init_from = tuple(f"runs/small_encoders/{name}" for name in config.model.encoders)
    # Steps with the tokens of the best reader alone take less than half of the time, and what they
    # teach the decoder helps it with all encoders.
    plans = (*("convnext_alone",) * 5, "full")
    config.train = {
        "pretrain": stage
        | {
            "task": "captioning",
            "template": "plain_eos",
            "text_length": 64,
            "steps": 2400,
            "plans": plans,
            "trainable": ("^llama/", "^projector"),
        },
        "finetune": stage
        | {
            "task": "instruction",
            "template": "qa",
            "steps": 5000,
            "plans": plans,
            "calibrate_before": True,
        },
        "log_every": 20,
        "checkpoint_every": 250,
        "mesh": {"data": -1},
    }
    config.plans = {
        # Late in the decoder: before layer 2 the text's attention chooses worse than chance here,
        # from layer 4 on dropping half costs next to nothing (`meteor sweep-layers`).
        "meteor": "meteor(encode=(140, 110, 172), fuse=100, layers=(4, 5), keep=(64, 40), "
        "fuse.similarity=abs_cosine, decode.heads=0)",
        "meteor_uniform_ranks": "meteor(encode.assignment=uniform)",
        "meteor_inverse_ranks": "meteor(encode.assignment=inverse_rank)",
        "meteor_fixed": "meteor(decode.budget=fixed)",
        "meteor_one_head": "meteor(decode.heads=1)",
        "meteor_centered": "meteor(fuse.similarity=centered_cosine)",
        "meteor_early_cuts": "meteor(fuse.keep=138, decode.layers=(2, 3, 5), "
        "decode.keep=(86, 52, 34))",
        "meteor_no_decode": f"meteor(decode=None, fuse.keep={BUDGET})",
        "random": f"random(keep={BUDGET})",
        "uniform": f"uniform(keep={BUDGET})",
        "pool": f"pool(keep={BUDGET})",
        "independent": f"independent(keep={BUDGET})",
        "fastv": "fastv(layer=1, keep=30)",
        "pyramiddrop": "pyramiddrop(layers=(1, 2, 4), keep=(65, 26, 18))",
        "sparsevlm": "sparsevlm(layers=(1, 2, 4), keep=(65, 26, 18))",
        "visionzip": f"visionzip(keep={BUDGET})",
        "divprune": f"divprune(keep={BUDGET})",
        "dart": "dart(layer=1, keep=30)",
        "no_clip": "only(encoders=('convnext', 'pix2struct'))",
        "convnext_alone": "only(encoders=('convnext',))",
    }
    config.eval = dataclasses.asdict(
        EvalConfig(plans=("full",), max_new_tokens=16, encode_batch_size=32, batch_size=64)
    )
    return complete(config)
