"""A model that needs no parameters: what it says depends on the image and the question alone."""

import io

import jax.numpy as jnp
import numpy as np
from PIL import Image

from meteor_jax.data.records import TaskSpec
from meteor_jax.data.tokenizers import ByteTokenizer
from meteor_jax.evaluation.answering import Replies
from meteor_jax.evaluation.tasks import Question
from meteor_jax.types import VisualTokens

TOKENIZER = ByteTokenizer()
SIZE = 8
COUNT = TaskSpec("reading_count", "reading", "general", "exact_match")
YES = TaskSpec("reading_existence", "reading", "general", "yes_no")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def make_questions(num_images: int, *, corrupt: tuple[int, ...] = ()):
    """Image i is of one grey, 10 · i, which is what the model answers; image i has i % 3 + 1
    questions. Returns sources and questions."""
    records = [{"image": png(10 * i)[: 20 if i in corrupt else None]} for i in range(num_images)]
    questions = tuple(
        Question(
            task=COUNT, record=i, image_id=i, question_id=100 * i + j, question=f"how grey? {j}",
            answer=str(10 * i),
        )
        for i in range(num_images)
        for j in range(i % 3 + 1)
    )
    return {"reading": records}, questions


class FakeAnswerer:
    """Answers with the image's grey and keeps grey / 10 tokens at its one cut; counts its calls."""

    sees_images = True

    def __init__(self):
        self.encoded: list[int] = []
        self.shapes: set[tuple] = set()
        self.prompts: list[bytes] = []

    def encode(self, images):
        self.shapes.add(("encode", images.shape))
        self.encoded += images[:, 0, 0, 0].tolist()
        x = jnp.asarray(images[:, 0, :2, :1], jnp.float32)
        place = jnp.zeros(x.shape[:2], jnp.int32)
        return VisualTokens(x=x, encoder=place, raster=place, position=place, span=2)

    def answer(self, visual, tokens, text_valid):
        self.shapes.add(("answer", visual.x.shape, tokens.shape))
        grey = np.asarray(visual.x[:, 0, 0, 0]).astype(int)
        said = [TOKENIZER.encode(f" {value}") for value in grey]
        out = np.full((len(said), 6), TOKENIZER.eos_id, np.int32)
        for row, ids in enumerate(said):
            out[row, : len(ids)] = ids
        for row, valid in zip(tokens, text_valid, strict=True):
            self.prompts.append(bytes(row[valid & (row >= 0) & (row < 256)].tolist()))
        return Replies(
            tokens=jnp.asarray(out),
            num_tokens=jnp.asarray([len(ids) for ids in said]),
            kept=(jnp.asarray(grey // 10),),
        )
