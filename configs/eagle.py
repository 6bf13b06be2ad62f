"""EAGLE and its METEOR form at full size, with the released two-stage recipe.

    --config=configs/eagle.py:x4_7b             EAGLE: channels joined, one projector
    --config=configs/eagle.py:meteor_x4_7b      METEOR: a projector an encoder, tokens joined

x4 or x5 encoders; 7b and 13b (Vicuna), 8b (Llama 3), 34b (Yi). The first stage trains projectors
on 558K captions, the second everything on 1.8M conversations, one epoch each; docs/data.md says how
the two are prepared, docs/convert.md how the folders in `converted` are made, docs/launch.md how a
run is started. (EAGLE itself trained the 34b on other data, with batches of 1,024.)
"""

import dataclasses

from ml_collections import ConfigDict

from meteor_jax.experiment.config import complete
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.models.eagle.presets import eagle_config, template_of
from meteor_jax.pruning.methods.meteor import meteor
from meteor_jax.pruning.text import override

METEOR = "meteor_"
REMAT = "nothing_saveable"
# Tokens that pass the boundaries inside the encoders, of 6,697 (X4) or 7,721 (X5), ConvNeXt's
# 1,024 joining at the last: 1,193 in the end is the paper's number, the other two are ours. 576
# enter the LLM, whose layers see 242 on average.
KEEP_IN_ENCODERS = {"x4": (4000, 2000, 1193), "x5": (4600, 2300, 1193)}
KEEP_IN_LLM = (256, 104, 32)

CAPTIONS, CONVERSATIONS = "llava:llava_pretrain_558k", "llava:eagle_sft_1m8"
EXAMPLES = {CAPTIONS: 558_128, CONVERSATIONS: 1_800_000}
HELD_OUT = 256  # of each
BATCH_SIZE = {CAPTIONS: 256, CONVERSATIONS: 128}
# Converted checkpoints that a run starts from, the decoder's with its tokenizer.
CONVERTED = "converted"
DECODERS = {"7b": "vicuna_7b", "13b": "vicuna_13b", "8b": "llama3_8b", "34b": "yi_34b"}


def get_config(name: str = "x4_7b") -> ConfigDict:
    model_name = name.removeprefix(METEOR)
    is_meteor = model_name != name
    model = eagle_config(model_name, fusion="post" if is_meteor else "pre", remat=REMAT)
    vision, _, size = model_name.partition("_")
    quarter = model.llama.depth // 4
    plan = meteor(
        encode=KEEP_IN_ENCODERS[vision] if is_meteor else None,
        fuse=576,
        layers=(quarter, 2 * quarter, 3 * quarter),
        keep=KEEP_IN_LLM,
    )
    if is_meteor:
        # All tokens together have more places than the decoder has rotary positions, so those
        # that stay are numbered through; "full" does not fit this form.
        plan = override(plan, positions="contiguous")

    config = ConfigDict()
    config.model = dataclasses.asdict(model)
    decoder = f"{CONVERTED}/{DECODERS[size]}"
    config.init_from = (*(f"{CONVERTED}/{encoder}" for encoder in model.encoders), decoder)
    config.data = {
        "sources": (CAPTIONS, CONVERSATIONS),
        "tasks": ("captioning", "instruction"),
        "held_out": HELD_OUT,
        "image_size": model.image_size,
        "text_length": 1024,
        "tokenizer": f"{decoder}/tokenizer",
        "num_workers": 4,
        "prefetch": 2,
        "record_cache_size": 0,
    }
    stage = {
        "warmup_ratio": 0.03,
        "adam_b2": 0.999,
        "plans": ("meteor",) if is_meteor else ("full",),
    }
    config.train = {
        "pretrain": stage
        | _one_epoch(CAPTIONS)
        | {
            "task": "captioning",
            "template": "plain",
            "trainable": ("projector",),
            "learning_rate": 1e-3,
            "text_length": 256,
            "calibrate_before": is_meteor,
        },
        # EAGLE's 2,048 places hold the 1,024 tokens of an image too. Here they are all text, so
        # nothing is cut that EAGLE keeps; 1025 leaves rows with an image exactly EAGLE's.
        "finetune": stage
        | _one_epoch(CONVERSATIONS)
        | {
            "task": "instruction",
            "template": template_of(model_name),
            "learning_rate": 2e-5,
            "text_length": 2048,
        },
        "checkpoint_every": 500,
        "held_out_every": 500,
        "mesh": {"data": 1, "fsdp": -1},
    }
    config.plans = {"meteor": plan}
    config.eval = dataclasses.asdict(
        EvalConfig(
            tasks=("easyvqa_all", "reading_all"),
            num_questions=200,
            max_new_tokens=16,
            plans=("meteor",) if is_meteor else ("full", "meteor"),
        )
    )
    return complete(config)


def _one_epoch(source: str) -> dict[str, int]:
    batch_size = BATCH_SIZE[source]
    return {"batch_size": batch_size, "steps": (EXAMPLES[source] - HELD_OUT) // batch_size}
