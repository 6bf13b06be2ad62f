"""A model that needs no parameters: what it says depends on the images and the prompt alone.

As a program, `python -m tests.evaluation.fakes WORKDIR`, it evaluates that model; `--kill-at=N`
ends it with SIGKILL as the N-th batch is asked, `--port=P --process=I` makes it one of two.
"""

import argparse
import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.progress import Progress

from meteor_jax.data.sources.records import TaskSpec
from meteor_jax.data.templates import get_template
from meteor_jax.data.tokenizers import ByteTokenizer
from meteor_jax.evaluation.evaluator import Evaluation
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.inference.engine.data_shards import Lanes
from meteor_jax.inference.engine.predictor import Replies
from meteor_jax.inference.engine.prompts import Room, make_ask
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import VisualTokens

TOKENIZER = ByteTokenizer()
SIZE = 8
ROOM = Room(lengths=(16, 32, 64), positions=128, image_positions=2)
COUNT = TaskSpec("reading_count", "reading", "general", "exact_match")
YES = TaskSpec("reading_existence", "reading", "general", "yes_no")

SAID = np.full((1000, 6), TOKENIZER.eos_id, np.int32)  # by number, its text as token ids
LENGTHS = np.array([len(f" {number}") for number in range(1000)], np.int32)
for _number, _length in enumerate(LENGTHS):
    SAID[_number, :_length] = TOKENIZER.encode(f" {_number}")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def make_questions(num_images: int, *, corrupt: tuple[int, ...] = ()):
    """Image i is of one grey, 10 · i, which is what the model answers; image i has i % 3 + 1
    questions, the later ones longer. Returns sources and questions."""
    records = [{"image": png(10 * i)[: 20 if i in corrupt else None]} for i in range(num_images)]
    questions = tuple(
        Question(
            task=COUNT,
            record=i,
            image_id=i,
            question_id=100 * i + j,
            question=f"how grey? {j}" + 2 * j * " please",
            answer=str(10 * i),
        )
        for i in range(num_images)
        for j in range(i % 3 + 1)
    )
    return {"reading": records}, questions


def ask_of(question: str, *, images=(), max_new_tokens=6):
    return make_ask(
        question,
        images=images,
        max_new_tokens=max_new_tokens,
        template=get_template("qa"),
        tokenizer=TOKENIZER,
        room=ROOM,
    )


class FakeAnswerer:
    """Answers with the sum of its images' greys, and keeps a tenth of that at its first cut and as
    many tokens as the text has at its second; remembers what it was called with."""

    sees_images = True

    def __init__(self, *, kill_at: int | None = None):
        self.kill_at = kill_at
        self.encoded: list[int] = []
        self.shapes: set[tuple] = set()
        self.batches: list[tuple[int, ...]] = []

    def encode(self, images):
        self.shapes.add(("encode", images.shape))
        if images.is_fully_addressable:
            self.encoded += np.asarray(images[:, :, 0, 0, 0]).reshape(-1).tolist()
        return _encode(images)

    def answer(self, visual, rows, *, max_new_tokens):
        self.batches.append(rows.tokens.shape)
        self.shapes.add(("answer", visual.x.shape, rows.tokens.shape))
        if len(self.batches) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return _answer(visual, rows)

    def warm_up(self, visual, rows, *, max_new_tokens):
        self.shapes.add(("answer", visual.x.shape, rows.tokens.shape))
        return _answer(visual, rows)


@jax.jit
def _encode(images):
    x = images[:, :, 0, :2, :1].astype(jnp.float32)
    place = jnp.zeros(x.shape[:3], jnp.int32)
    return VisualTokens(x=x, encoder=place, patch_index=place, position=place, span=2)


@jax.jit
def _answer(visual, rows):
    grey = (visual.x[:, :, 0, 0] * rows.image_valid).sum(1).astype(int)
    return Replies(
        tokens=jnp.take(SAID, grey, axis=0),
        num_tokens=jnp.take(LENGTHS, grey),
        finite=grey >= 0,
        kept=(grey // 10, rows.text_valid.sum(1)),
        computed=(grey / 10, 1.0 * rows.text_valid.sum(1)),
    )


def make_evaluation(folder, *, num_images=20, params="none", mesh=None, say=print):
    sources, questions = make_questions(num_images, corrupt=(5,))
    return Evaluation(
        model=SimpleNamespace(config=SimpleNamespace(image_size=SIZE)),
        params=None,
        tokenizer=TOKENIZER,
        sources=sources,
        questions=questions,
        template="qa",
        config=EvalConfig(encode_batch_size=2, batch_size=4, visual_cache_images=4),
        room=ROOM,
        lanes=Lanes(mesh),
        depends_on={"params": params},
        folder=Path(folder),
        say=say,
    )


def run(evaluation: Evaluation, answerer: FakeAnswerer):
    """The plan "fake", asked; returns a `PlanRun`."""
    with Progress(disable=True) as progress:
        return evaluation.ask(
            answerer, evaluation.asks, plan=PrunePlan(name="fake"), progress=progress
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--process", type=int)
    arguments = parser.parse_args()
    mesh = None
    if arguments.port:
        jax.distributed.initialize(f"localhost:{arguments.port}", 2, arguments.process)
        mesh = make_mesh(MeshConfig())
    run(make_evaluation(arguments.workdir, mesh=mesh), FakeAnswerer(kill_at=arguments.kill_at))


if __name__ == "__main__":
    main()
