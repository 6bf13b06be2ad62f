"""The batches of a run's stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meteor_jax.checkpoint import TOKENIZER_FOLDER, parts_in
from meteor_jax.data import pipeline
from meteor_jax.data.sources.records import Records
from meteor_jax.data.tokenizers import Tokenizer, load_tokenizer
from meteor_jax.experiment.config import Experiment, Stage
from meteor_jax.models.family import build_model
from meteor_jax.parallel.distributed import DataShard, main_process_first
from meteor_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Records and tokenizer of an experiment, opened."""

    experiment: Experiment
    tokenizer: Tokenizer
    records: Sequence[Records]

    def batches(self, stage: Stage, *, first_batch: int, shard: DataShard) -> Iterator[Batch]:
        """A stage's endless batches of NumPy arrays from `first_batch` on, a shard's rows.

        Raises:
            ValueError: one line, for data that the stage cannot have.
        """
        rows = self._rows(stage, shard)
        # What is held out stays the same from seed to seed.
        seed = rows["config"].seed + self.experiment.seed
        rows["config"] = dataclasses.replace(rows["config"], seed=seed)
        return pipeline.make_train_iterator(start_batch=first_batch, **rows)

    def held_out(self, stage: Stage, *, shard: DataShard) -> Sequence[Batch]:
        """A shard's rows of the batches that the stage's held-out loss is measured on."""
        batches = pipeline.make_held_out_batches(**self._rows(stage, shard))
        return batches[: self.experiment.train.held_out_batches]

    def _rows(self, stage: Stage, shard: DataShard) -> dict[str, Any]:
        config, data = stage.config, self.experiment.data
        if config.text_length:
            data = dataclasses.replace(data, text_length=config.text_length)
        return {
            "config": data,
            "tokenizer": self.tokenizer,
            "task": config.task,
            "template": config.template,
            "records": self.records,
            "batch_size": config.batch_size // shard.count,
            "process_index": shard.index,
            "process_count": shard.count,
        }


def open_training_data(experiment: Experiment, *, workdir: Path) -> TrainingData:
    """Opens the data, and the tokenizer that is in `workdir`, is inherited or is trained.

    Raises:
        ConfigError: one line, where the model has no place for them.
    """
    model = build_model(experiment.model)
    inherit = [
        Path(source) / TOKENIZER_FOLDER
        for source in experiment.init_from
        if model.tokenizer_part in parts_in(source)
    ]
    with main_process_first("data and tokenizer"):
        records = pipeline.open_sources(experiment.data)
        tokenizer = load_tokenizer(
            experiment.data.tokenizer,
            folder=workdir / TOKENIZER_FOLDER,
            texts=lambda: pipeline.training_texts(records),
            inherit=inherit,
        )
    model.check_data(vocabulary=tokenizer.vocab_size, classes=experiment.data.classes)
    return TrainingData(experiment, tokenizer, records)
