"""Measures preparing data and the pipeline alone; docs/data.md has the numbers.

python docs/measure_data.py write FOLDER       2,000 JPEGs of 448 px, two turns each
python docs/measure_data.py read FOLDER        examples a second with 0 and 2 workers
"""

import json
import random
import sys
import time
from pathlib import Path

from absl import app
from PIL import Image
from sklearn.datasets import load_sample_images

from meteor_jax.data.pipeline import DataConfig, make_train_iterator, open_sources
from meteor_jax.data.tokenizers import ByteTokenizer

NUM_IMAGES, SIDE, BATCH_SIZE, BATCHES = 2000, 448, 8, 25
NAME = "measured"


def write(folder: Path) -> None:
    """Crops of two photographs that scikit-learn brings, enlarged to 640 pixels in height."""
    (folder / "images").mkdir(parents=True)
    photographs = [
        image.resize((round(image.width * 640 / image.height), 640))
        for image in map(Image.fromarray, load_sample_images().images)
    ]
    rng, entries = random.Random(0), []
    for index in range(NUM_IMAGES):
        image = rng.choice(photographs)
        left, top = (rng.randint(0, side - SIDE) for side in image.size)
        path = f"{index:04d}.jpg"
        crop = image.crop((left, top, left + SIDE, top + SIDE))
        crop.save(folder / "images" / path, quality=90)
        said = ("<image>\nWhat is in the picture?", "A photograph. " * 10, "Which?", "A crop.")
        turns = [
            {"from": speaker, "value": value}
            for speaker, value in zip(("human", "gpt") * 2, said, strict=True)
        ]
        entries.append({"id": str(index), "image": path, "conversations": turns})
    (folder / f"{NAME}.json").write_text(json.dumps(entries))


def read(folder: Path) -> None:
    for workers in (0, 2):
        config = DataConfig(
            sources=(f"llava:{NAME}",),
            image_size=1024,
            text_length=2048,
            num_workers=workers,
            prefetch=2,
            record_cache_size=0,
            template="vicuna_v1",
            data_dir=str(folder / "data"),
        )
        batches = make_train_iterator(
            config,
            tokenizer=ByteTokenizer(),
            task="instruction",
            batch_size=BATCH_SIZE,
            records=open_sources(config),
        )
        for _ in range(8):  # what is prepared ahead counts for nothing
            next(batches)
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(BATCHES):
            next(batches)
        rate = BATCHES * BATCH_SIZE / (time.perf_counter() - start)
        cpu = (time.process_time() - busy) / (BATCHES * BATCH_SIZE) * 1e3
        print(f"{workers} workers: {rate:.1f} examples/s; {cpu:.1f} ms of this process's CPU each")
        batches.close()


def main(argv: list[str]) -> None:
    {"write": write, "read": read}[argv[1]](Path(argv[2]))


if __name__ == "__main__":
    sys.exit(app.run(main))
