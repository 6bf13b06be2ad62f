"""A model that needs no parameters: its outputs depend on the images and the prompt alone."""

import io
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from meteor_jax.data.templates import get_template
from meteor_jax.data.tokenizers import ByteTokenizer
from meteor_jax.inference.engine.batching import BatchSizes
from meteor_jax.inference.engine.data_shards import DataShards
from meteor_jax.inference.engine.engine import Engine
from meteor_jax.inference.engine.prompts import PromptLimits

TOKENIZER = ByteTokenizer()
SIZE = 8
LIMITS = PromptLimits(lengths=(16, 32, 64), positions=128, image_positions=2)


def png(value: int) -> bytes:
    """An image of one grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


class GreyPredictor:
    """Answers with the sum of its images' greys, keeps a tenth of that at its first cut and as
    many tokens as the text has at its second; remembers what it was called with.

    It gives no token ids: an engine takes whatever a predictor reads out of its outputs.
    """

    image_size = SIZE

    def __init__(self, *, kill_at: int | None = None):
        self.kill_at = kill_at
        self.encoded: list[int] = []
        self.shapes: set[tuple] = set()
        self.num_batches = 0

    def encode(self, images):
        self.shapes.add(("encode", images.shape))
        if images.is_fully_addressable:
            self.encoded += np.asarray(images[:, :, 0, 0, 0]).reshape(-1).tolist()
        return _encode(images)

    encode_nothing = encode

    def predict(self, visual, prompts, *, bucket):
        self.num_batches += 1
        if self.num_batches == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.warm_up(visual, prompts, bucket=bucket)

    def warm_up(self, visual, prompts, *, bucket):
        assert prompts.tokens.shape[1] == bucket.prompt_length
        self.shapes.add(("predict", visual.shape, prompts.tokens.shape, bucket.max_new_tokens))
        return _predict(visual, prompts)

    def stream(self, visual, prompts, *, bucket):
        text = str(int(_predict(visual, prompts)["grey"][0]))
        yield from (text[:count] for count in range(1, len(text) + 1))

    def read(self, outputs, row, *, bucket):
        grey, length = int(outputs["grey"][row]), int(outputs["length"][row])
        return {"text": str(grey), "kept": (grey // 10, length), "computed": (grey / 10, length)}


@jax.jit
def _encode(images):
    return images[:, :, 0, 0, 0].astype(jnp.float32)


@jax.jit
def _predict(visual, prompts):
    grey = (visual * prompts.image_valid).sum(1).astype(int)
    return {"grey": grey, "length": prompts.text_valid.sum(1)}


def make_engine(predictors=None, *, encode=4, batch=4, cache=8, mesh=None) -> Engine:
    return Engine(
        predictors=predictors or {"fake": GreyPredictor()},
        tokenizer=TOKENIZER,
        template=get_template("qa"),
        limits=LIMITS,
        sizes=BatchSizes(encode=encode, batch=batch, cache=cache),
        shards=DataShards(mesh),
    )
