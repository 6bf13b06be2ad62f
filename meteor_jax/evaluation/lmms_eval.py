"""The model `meteor_jax` of the lmms-eval package (0.7), which finds it by its entry point.

    python -m lmms_eval --model meteor_jax --model_args checkpoint=runs/tiny,plan=meteor \\
        --tasks pope,mme --batch_size 16

Needs the extra `lmms`. Devices are JAX's; lmms-eval's own are not used, and it runs in one process.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from meteor_jax.checkpoint import CALIBRATION_FILE, TOKENIZER_FOLDER
from meteor_jax.config import ConfigError
from meteor_jax.data.sources.registry import square_image
from meteor_jax.data.templates import get_template, stop_id
from meteor_jax.data.tokenizers import load_tokenizer
from meteor_jax.experiment.eval_config import prompt_template
from meteor_jax.inference.engine.batching import Ask, BatchSizes, make_schedule
from meteor_jax.inference.engine.data_shards import Lanes
from meteor_jax.inference.engine.predictor import ModelAnswerer, fused_shape
from meteor_jax.inference.engine.prompts import Room, make_ask
from meteor_jax.inference.engine.run import Timings, answer_prompts, prefetch
from meteor_jax.inference.layout import inference_mesh
from meteor_jax.inference.load import load_params, read_experiment
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import parse_plan

NAME = "meteor_jax"
WINDOW = 256  # requests whose images are in memory at once
MAX_NEW_TOKENS = 1024  # where a task says nothing, as lmms-eval's other models have it


def manifest() -> ModelManifest:
    """What the entry point in the group `lmms_eval.models` names."""
    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.MeteorJax")


class MeteorJax(lmms):
    """A checkpoint under one plan, answering greedily.

    Prompts, images and batches are those of `evaluate.py`: an `<image>` in the text is an image's
    place, images without one come first; answers are stripped.

    Args:
        checkpoint: folder of a run, or of converted weights.
        plan: a name or text as `evaluate.py --plans` takes it; quote one with commas in it.
        config: a config file, as `configs/eagle.py:x4_7b`; the run's own where None.
        step: of the checkpoint; None takes the newest.
        template: of the prompts; the config's where None.
        batch_size: prompts asked together, over all devices (rounded up to a multiple of their
            number); images are encoded as many at a time.
        max_new_tokens_limit: cuts every task's answers off there, to save memory.

    Raises:
        ConfigError: one line, for an argument that is wrong.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        plan: str = "full",
        config: str | None = None,
        step: int | None = None,
        template: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens_limit: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        del device, max_batch_size  # lmms-eval passes them to every model
        if unknown:
            raise ConfigError(f"model_args: no such argument {', '.join(unknown)}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size: expected a positive number, got {batch_size!r}.")
        experiment, folder = read_experiment(checkpoint, config=config), Path(checkpoint)
        eval_fields = experiment.eval
        calibration = Calibration.load(folder / CALIBRATION_FILE)
        plan = parse_plan(str(plan).strip("'\""), library=experiment.plans).calibrated(calibration)
        self.template = get_template(
            prompt_template(template or eval_fields.template or experiment.train.finetune.template)
        )
        self.tokenizer = load_tokenizer(experiment.data.tokenizer, folder=folder / TOKENIZER_FOLDER)
        self.mesh = inference_mesh(experiment)
        with jax.set_mesh(self.mesh):
            params, _ = load_params(experiment, folder, mesh=self.mesh, step=step)
        model = Meteor(experiment.model)
        self.answerer = ModelAnswerer(
            model=model, params=params, plan=plan, eos_id=stop_id(self.template, self.tokenizer)
        )
        self.room = Room(
            lengths=eval_fields.prompt_lengths,
            positions=experiment.model.llama.max_positions,
            image_positions=fused_shape(model, params, plan=plan).span,
        )
        self.lanes = Lanes(self.mesh)
        batch = -(-int(batch_size) // self.lanes.count) * self.lanes.count
        self.sizes = BatchSizes(images=batch, questions=batch, group=max(batch, 64))
        self.max_new_tokens_limit = max_new_tokens_limit
        self.seconds = Timings()

    @property
    def batch_size(self) -> int:
        return self.sizes.questions

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers to `requests`, in their order.

        An answer ends at the first of a task's `until` texts.

        Raises:
            ConfigError: for a request that asks for sampling, or shows no image but something else.
        """
        texts: list[str] = []
        with tqdm(total=len(requests), desc="Model Responding") as bar, jax.set_mesh(self.mesh):
            for window in prefetch(map(self._prepare, _windows(requests)), depth=1):
                texts += self._answer(window, bar=bar)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("meteor_jax answers by generating; choose a task that does.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("meteor_jax answers one round; choose a task of one.")

    def _prepare(self, requests: Sequence[Instance]) -> _Window:
        """Prompts and images; equal images, as of several questions about one, are kept once."""
        images: dict[str, np.ndarray] = {}
        asks, stops = [], []
        for request in requests:
            context, options, doc_to_visual, doc_id, task, split = request.args
            keys = []
            for visual in doc_to_visual(self.task_dict[task][split][doc_id]) or ():
                if not isinstance(visual, Image.Image):
                    raise ConfigError(
                        f"task {task} shows {type(visual).__name__}; meteor_jax takes images."
                    )
                image = square_image(
                    visual.convert("RGB"), size=self.answerer.model.config.image_size
                )
                keys.append(hashlib.sha256(image.tobytes()).hexdigest())
                images[keys[-1]] = image
            asks.append(
                make_ask(
                    context,
                    images=keys,
                    max_new_tokens=self._new_tokens(options, task=task),
                    template=self.template,
                    tokenizer=self.tokenizer,
                    room=self.room,
                )
            )
            until = options.get("until") or ()
            stops.append((until,) if isinstance(until, str) else tuple(until))
        return _Window(asks, images, stops)

    def _new_tokens(self, options: Mapping[str, Any], *, task: str) -> int:
        sampled = options.get("do_sample", True) and (options.get("temperature") or 0) > 0
        if sampled or (options.get("num_beams") or 1) > 1:
            raise ConfigError(
                f"task {task} asks for sampling or beams, meteor_jax answers greedily; add "
                "--gen_kwargs temperature=0,do_sample=False,num_beams=1."
            )
        asked = int(options.get("max_new_tokens") or MAX_NEW_TOKENS)
        return min(asked, self.max_new_tokens_limit or asked)

    def _answer(self, window: _Window, *, bar: tqdm) -> list[str]:
        texts = [""] * len(window.asks)
        for answered in answer_prompts(
            window.asks,
            self.answerer,
            schedule=make_schedule(window.asks, sizes=self.sizes, lanes=self.lanes.count),
            read_image=window.images.__getitem__,
            decode_image=lambda image: image,
            image_size=self.answerer.model.config.image_size,
            seconds=self.seconds,
            lanes=self.lanes,
            warm_up=False,
        ):
            for row, index in enumerate(answered.index.tolist()):
                tokens = answered.tokens[row, : answered.num_tokens[row]].tolist()
                text = self.tokenizer.decode(tokens)
                for stop in filter(None, window.stops[index]):
                    text = text.split(stop)[0]
                texts[index] = text.strip()
            bar.update(len(answered.index))
        return texts


@dataclasses.dataclass(frozen=True)
class _Window:
    """Some requests: their prompts, uint8[H, W, 3] by key, and what ends each answer."""

    asks: list[Ask]
    images: dict[str, np.ndarray]
    stops: list[tuple[str, ...]]


def _windows(requests: Sequence[Instance]) -> Iterator[Sequence[Instance]]:
    return (requests[start : start + WINDOW] for start in range(0, len(requests), WINDOW))
