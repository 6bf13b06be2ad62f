"""The study: reading and easy-vqa together, one plan a run, every plan trained with itself.

    python train.py --config=configs/small.py --workdir=runs/small_meteor \\
        --config.train.finetune.plans="('meteor',)"

Of 484 visual tokens a pruned plan lets at most 116 (24 %) into the decoder's layers, on average.
"""

import dataclasses

from ml_collections import ConfigDict

from meteor_jax.evaluation.config import EvalConfig
from meteor_jax.training.experiment import complete

REMAT = "nothing_saveable"
BUDGET = 116  # 24 % of the visual tokens


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = {
        "encoders": ("clip", "convnext", "pix2struct"),
        "image_size": 96,
        "clip": {
            "image_size": 96, "patch_size": 8, "width": 128, "depth": 3, "num_heads": 2,
            "mlp_dim": 256, "remat": REMAT,
        },
        "convnext": {
            "image_size": 96, "depths": (1, 2), "widths": (64, 128), "layer_scale_init": 0.5,
            "remat": REMAT,
        },
        "pix2struct": {
            "grid_side": 14, "patch_size": 7, "width": 128, "depth": 3, "num_heads": 2,
            "mlp_dim": 256, "num_positions": 16, "remat": REMAT,
        },
        "llama": {
            "depth": 8, "width": 192, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 512,
            "vocab_size": 512, "max_positions": 1024, "tie_embeddings": True, "init_std": 0.07,
            "remat": REMAT,
        },
    }
    config.data = {
        "sources": ("reading", "easy-vqa"), "weights": (0.8, 0.2), "image_size": 96,
        "text_length": 128, "questions_per_image": 8, "tokenizer": "bpe:512",
    }
    stage = {"batch_size": 32, "learning_rate": 1e-3, "warmup": 0.03, "weight_decay": 0.01}
    config.train = {
        "pretrain": stage | {"kind": "caption", "template": "plain_eos", "text_length": 64,
                             "steps": 2000},
        "finetune": stage
        | {
            "kind": "questions", "template": "qa", "steps": 4000, "plans": ("full",),
            "before": "calibrate_ranks",
        },
        "log_every": 20,
        "checkpoint_every": 250,
        "mesh": {"data": -1},
    }
    cuts = "layers=(2, 4, 6), keep=(120, 88, 64), decode.heads=1"
    stages = f"encode=(220, 180, 240), fuse=192, {cuts}"
    config.plans = {
        "meteor": f"meteor({stages})",
        "meteor_uniform_ranks": f"meteor({stages}, encode.assignment=uniform)",
        "meteor_inverse_ranks": f"meteor({stages}, encode.assignment=inverse_rank)",
        "meteor_fixed": f"meteor({stages}, decode.budget=fixed)",
        "meteor_all_heads": f"meteor({stages}, decode.heads=0)",
        "meteor_no_decode": f"meteor(encode=(220, 180, 240), fuse={BUDGET})",
        "random": f"random(keep={BUDGET})",
        "uniform": f"uniform(keep={BUDGET})",
        "pool": f"pool(keep={BUDGET})",
        "independent": f"independent(keep={BUDGET})",
        "fastv": "fastv(layer=1, keep=63)",
        "pyramiddrop": "pyramiddrop(layers=(1, 2, 4), keep=(120, 60, 25))",
        "no_clip": "only(encoders=('convnext', 'pix2struct'))",
    }
    config.eval = dataclasses.asdict(
        EvalConfig(plans=("full",), max_new_tokens=16, images_per_batch=32, questions_per_batch=64)
    )
    return complete(config)
