"""The model `meteor_jax` of the lmms-eval package (0.7), which finds it by its entry point.

    python -m lmms_eval --model meteor_jax --model_args checkpoint=runs/tiny,plan=meteor \\
        --tasks pope,mme --batch_size 16

Needs the extra `lmms`. Devices are JAX's; lmms-eval's own are not used, and it runs in one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from meteor_jax.config import ConfigError
from meteor_jax.data.sources.registry import square_image
from meteor_jax.inference.engine.loading import prefetch
from meteor_jax.inference.engine.request import Request
from meteor_jax.inference.load import load_engine
from meteor_jax.progress import progress_bar

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
        self.engine = load_engine(
            checkpoint,
            plans=str(plan).strip("'\""),
            config=config,
            step=step,
            template=template or "",
            batch_size=int(batch_size),
        )
        self.max_new_tokens_limit = max_new_tokens_limit

    @property
    def batch_size(self) -> int:
        return self.engine.sizes.batch

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers to `requests`, in their order.

        An answer ends at the first of a task's `until` texts.

        Raises:
            ConfigError: for a request that asks for sampling, or shows no image but something else.
        """
        texts: list[str] = []
        with progress_bar() as bar:
            task = bar.add_task("Model Responding", total=len(requests))
            windows = (requests[at : at + WINDOW] for at in range(0, len(requests), WINDOW))
            for window in prefetch((list(map(self._request, w)) for w in windows), depth=1):
                answers = [""] * len(window)
                for prediction in self.engine.predict(window):
                    answers[prediction.index] = prediction.text
                    bar.advance(task)
                texts += answers
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("meteor_jax answers by generating; choose a task that does.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("meteor_jax answers one round; choose a task of one.")

    def _request(self, instance: Instance) -> Request:
        context, options, doc_to_visual, doc_id, task, split = instance.args
        images = []
        for visual in doc_to_visual(self.task_dict[task][split][doc_id]) or ():
            if not isinstance(visual, Image.Image):
                raise ConfigError(
                    f"task {task} shows {type(visual).__name__}; meteor_jax takes images."
                )
            # At the model's size they take less memory while they wait.
            images.append(square_image(visual.convert("RGB"), size=self.engine.image_size))
        return Request(
            question=context,
            images=images,
            max_new_tokens=self._new_tokens(options, task=task),
            stop=options.get("until") or (),
        )

    def _new_tokens(self, options: Mapping[str, Any], *, task: str) -> int:
        sampled = options.get("do_sample", True) and (options.get("temperature") or 0) > 0
        if sampled or (options.get("num_beams") or 1) > 1:
            raise ConfigError(
                f"task {task} asks for sampling or beams, meteor_jax answers greedily; add "
                "--gen_kwargs temperature=0,do_sample=False,num_beams=1."
            )
        asked = int(options.get("max_new_tokens") or MAX_NEW_TOKENS)
        return min(asked, self.max_new_tokens_limit or asked)
