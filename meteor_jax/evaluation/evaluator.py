"""All questions of an evaluation, asked under one plan at a time and kept as they are answered."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from meteor_jax.data.sources.registry import decode_image
from meteor_jax.data.templates import get_template, stop_id
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.evaluation.files import prediction_line
from meteor_jax.evaluation.predictions import Fingerprint, Journal, digest
from meteor_jax.evaluation.results import Answer, PlanResult, score_answer
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.experiment.plans import BLIND
from meteor_jax.inference.engine.batching import Ask, BatchSizes, make_schedule
from meteor_jax.inference.engine.data_shards import Lanes, broadcast
from meteor_jax.inference.engine.predictor import BlindAnswerer, ModelAnswerer, fused_shape
from meteor_jax.inference.engine.prompts import Room, make_ask
from meteor_jax.inference.engine.run import Answered, Timings, answer_prompts
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.parallel.distributed import is_main_process
from meteor_jax.pruning.plan import PrunePlan

NEEDED = {"kept", "computed", "rows"}  # a line of another version may lack some: it is asked again


@dataclasses.dataclass(frozen=True)
class PlanRun:
    """One plan's answers, and how they came about.

    Attributes:
        seconds: of the parts of the work, and how many questions were "asked" in them: now, and
            in earlier starts that came to their end.
        path: of the predictions, on the main process.
    """

    result: PlanResult
    seconds: dict[str, float]
    path: Path


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that the plans of one evaluation share.

    Attributes:
        sources: by name, the records of a split.
        questions: about one image side by side.
        template: name of the prompts' template.
        depends_on: what every answer depends on, beside its plan; see `Fingerprint`.
        folder: where predictions are kept.
        say: shows a line.
    """

    model: Meteor
    params: Any
    tokenizer: Tokenizer
    sources: Mapping[str, Sequence[Mapping[str, Any]]]
    questions: tuple[Question, ...]
    template: str
    config: EvalConfig
    room: Room
    lanes: Lanes
    depends_on: Mapping[str, Any]
    folder: Path
    say: Callable[[str], None] = lambda line: None

    @cached_property
    def asks(self) -> tuple[Ask, ...]:
        """One prompt a question."""
        return self._make_asks(blind=False)

    @property
    def images_left_out(self) -> int:
        """Images for which the decoder has no positions."""
        asked = sum(len(ask.images) for ask in self.asks)
        return sum(question.num_images for question in self.questions) - asked

    def run(self, plan: PrunePlan, *, progress: Progress) -> PlanRun:
        """Asks every question under `plan`; what was answered before is not asked again."""
        run = self.ask(self._answerer(plan), self.asks, plan=plan, progress=progress)
        result = dataclasses.replace(
            run.result,
            visual_tokens_fused=fused_shape(self.model, self.params, plan=plan).num_tokens,
            layers=plan.decoder_layers,
            depth=self.model.config.llama.depth,
        )
        return dataclasses.replace(run, result=result)

    def run_blind(self, *, corrupt: Collection[int] = (), progress: Progress) -> PlanRun:
        """Asks every question without its images, of the same model.

        Args:
            corrupt: questions that are scored wrong, as they are under the plans.
        """
        plan = PrunePlan(name=BLIND)
        return self.ask(
            self._answerer(plan, cls=BlindAnswerer),
            self._make_asks(blind=True),
            plan=plan,
            progress=progress,
            corrupt=corrupt,
        )

    @cached_property
    def _sizes(self) -> BatchSizes:
        return BatchSizes.of(self.config, lanes=self.lanes.count)

    def read_image(self, key: tuple[str, int, int]) -> bytes:
        """The encoded image of an `Ask`'s key."""
        source, record, place = key
        found = self.sources[source][record]
        return found["images"][place] if "images" in found else found["image"]

    def decode_image(self, encoded: bytes) -> np.ndarray:
        """uint8[H, W, 3] as the model takes it; raises `CorruptImage`."""
        return decode_image(encoded, size=self.model.config.image_size)

    def _make_asks(self, *, blind: bool) -> tuple[Ask, ...]:
        template = get_template(self.template)
        return tuple(
            make_ask(
                question.question,
                images=[(*question.image, i) for i in range(0 if blind else question.num_images)],
                max_new_tokens=self.config.new_tokens(question.task),
                template=template,
                tokenizer=self.tokenizer,
                room=self.room,
            )
            for question in self.questions
        )

    def _answerer(
        self, plan: PrunePlan, *, cls: type[ModelAnswerer] = ModelAnswerer
    ) -> ModelAnswerer:
        eos_id = stop_id(get_template(self.template), self.tokenizer)
        return cls(model=self.model, params=self.params, plan=plan, eos_id=eos_id)

    def ask(
        self,
        answerer: ModelAnswerer,
        asks: Sequence[Ask],
        *,
        plan: PrunePlan,
        progress: Progress,
        corrupt: Collection[int] = (),
    ) -> PlanRun:
        """Asks of `asks`, one a question, those that have no answer yet.

        Args:
            plan: its name names the file of predictions.
            corrupt: questions that are not asked and scored wrong.
        """
        parts = {"plan": json.loads(plan.to_json())} | dict(self.depends_on)
        journal = Journal(self.folder, plan.name, fingerprint=Fingerprint(parts))
        keys = question_keys(self.questions, asks)
        lines = broadcast(journal.start() if is_main_process() else None)
        if journal.note:
            self.say(journal.note)
        known = {
            index: lines[key]
            for index, key in enumerate(keys)
            if lines.get(key, {}).keys() >= NEEDED
        }
        if known:
            self.say(f"{plan.name}: {len(known)} of {len(keys)} questions were answered before.")
        answers = {
            index: answer_of(line, question=self.questions[index]) for index, line in known.items()
        }
        answers |= dict.fromkeys(corrupt, Answer(prediction="", score=0.0, corrupt=True))
        spent = dict.fromkeys(range(len(asks)), 0.0)
        spent |= {index: line["seconds"] for index, line in known.items()}

        def line(index: int) -> dict[str, Any]:
            of_question = prediction_line(self.questions[index], answers[index])
            return {"key": keys[index]} | of_question | {"seconds": spent[index]}

        left = [index for index in range(len(asks)) if index not in answers]
        bar = progress.add_task(plan.name, total=len(asks), completed=len(answers))
        seconds, before = Timings(), 0.0
        to_ask = [asks[index] for index in left]
        for answered in answer_prompts(
            to_ask,
            answerer,
            schedule=make_schedule(to_ask, sizes=self._sizes, lanes=self.lanes.count),
            read_image=self.read_image,
            decode_image=self.decode_image,
            image_size=self.model.config.image_size,
            seconds=seconds,
            lanes=self.lanes,
        ):
            batch = [left[place] for place in answered.index.tolist()]
            for row, index in enumerate(batch):
                answers[index] = self._answer(index, answered, row=row, ask=asks[index])
                spent[index] = (seconds.wall - before) / len(batch)
            before = seconds.wall
            if is_main_process():
                journal.append(map(line, batch))
            progress.advance(bar, len(batch))
        times = {"asked": len(left)} | seconds.as_dict()
        if is_main_process():
            times = journal.finish(map(line, range(len(asks))), seconds=times)
        return PlanRun(
            result=PlanResult(
                plan=plan.name,
                answers=tuple(answers[index] for index in range(len(asks))),
                seconds=sum(spent.values()) / len(asks),
            ),
            seconds=times,
            path=journal.path,
        )

    def _answer(self, index: int, answered: Answered, *, row: int, ask: Ask) -> Answer:
        if answered.unreadable[row]:
            return Answer(prediction="", score=0.0, corrupt=True)
        tokens = answered.tokens[row, : answered.num_tokens[row]].tolist()
        prediction = self.tokenizer.decode(tokens).strip()
        return Answer(
            prediction=prediction,
            score=score_answer(self.questions[index], prediction),
            kept=tuple(int(cut[row]) for cut in answered.kept),
            computed=tuple(float(cut[row]) for cut in answered.computed),
            prompt_tokens=len(ask.tokens),
            prompt_length=ask.shape.prompt_length,
            num_images=len(ask.images),
            rows=self._sizes.questions // self.lanes.count,
            non_finite=not answered.finite[row],
        )


def answer_of(line: Mapping[str, Any], *, question: Question) -> Answer:
    """The answer that a line of predictions holds, scored anew."""
    if line["corrupt"]:
        return Answer(prediction="", score=0.0, corrupt=True)
    return Answer(
        prediction=line["prediction"],
        score=score_answer(question, line["prediction"]),
        kept=tuple(line["kept"]),
        computed=tuple(line["computed"]),
        prompt_tokens=line["prompt_tokens"],
        prompt_length=line["prompt_length"],
        num_images=line["num_images"],
        rows=line["rows"],
        non_finite=line["non_finite"],
    )


def question_keys(questions: Sequence[Question], asks: Sequence[Ask]) -> list[str]:
    """A name for each question that stays the same whatever else is asked beside it.

    It stands for the task, the record, the ids of the prompt (and so tokenizer, template and
    text) and the shape that it is asked in. A question that is there twice is counted.
    """
    seen: Counter[str] = Counter()
    keys = []
    for question, ask in zip(questions, asks, strict=True):
        task = question.task
        asked = (ask.tokens, len(ask.images), dataclasses.astuple(ask.shape))
        key = digest(repr((task.source, task.name, question.record, question.question_id, asked)))
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return keys
