"""The pictures of an evaluation."""

import json

import numpy as np
from PIL import Image

from meteor_jax.evaluation.visualize import caption, write_examples
from meteor_jax.inference.draw import read_stages
from tests.inference.test_draw import GRIDS, make_trace


def test_examples_are_a_picture_each_and_a_list(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    records = [
        {
            "plan": "meteor",
            "question": f"how many, {i}?",
            "answer": "2",
            "prediction": prediction,
            "score": score,
        }
        for i, (prediction, score) in enumerate([("2", 1.0), ("3", 0.0), ("2", 1.0)])
    ]
    stages = read_stages(make_trace(), grids=GRIDS)
    write_examples(tmp_path, images, records=records, stages=stages)
    listed = json.loads((tmp_path / "examples/examples.json").read_text())
    assert [one["picture"] for one in listed] == ["00.png", "01.png", "02.png"]
    assert listed[1] | records[1] == listed[1]
    # The second image kept fused tokens 1 (clip), 6 (convnext), 7, 12 and 13 (pix2struct).
    assert listed[1]["kept"]["LLM step 1"] == {"clip": 1, "convnext": 1, "pix2struct": 3}
    assert listed[2]["kept"]["fusion"] == {"clip": 5, "convnext": 2, "pix2struct": 7}
    pixels = [
        np.asarray(Image.open(tmp_path / "examples" / one["picture"]).convert("L"))
        for one in listed
    ]
    assert (pixels[0] != pixels[1]).any()
    with Image.open(tmp_path / "kept_tokens.png") as together:
        np.testing.assert_array_equal(np.asarray(together.convert("L")), np.concatenate(pixels))


def test_a_caption_has_question_prediction_reference_and_plan():
    record = {
        "question": "how many digits are there in the picture?",
        "prediction": "3",
        "answer": "2",
        "score": 0.0,
        "plan": "meteor",
    }
    assert caption(record).splitlines() == [
        "how many digits are there in the",
        "picture?",
        "predicted: 3 (incorrect)",
        "reference: 2",
        "plan: meteor",
    ]
