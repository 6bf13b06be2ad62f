import json

import numpy as np
import pytest
from PIL import Image

from meteor_jax.inference.draw import draw_examples, draw_kept_tokens, read_stages, shade
from meteor_jax.types import CutTrace, EncodeTrace, PruneTrace

GRIDS = {"clip": 4, "convnext": 2, "pix2struct": 6}


def make_trace(num_images=3, *, seed=0, staged=True):
    rng = np.random.default_rng(seed)

    def draw(total, keep):
        rows = [np.sort(rng.choice(total, keep, replace=False)) for _ in range(num_images)]
        return np.stack(rows).astype(np.int32)

    encode = {
        "clip": EncodeTrace(kept=(draw(16, 12), draw(16, 10), draw(16, 8)) if staged else ()),
        "convnext": EncodeTrace(kept=()),
        "pix2struct": EncodeTrace(
            kept=(draw(36, 30), draw(36, 20), draw(36, 12)) if staged else ()
        ),
    }
    encoder = np.repeat([0, 1, 2], [5, 2, 7])
    fused_encoder = np.broadcast_to(encoder, (num_images, 14)).astype(np.int32)
    fused_raster = np.concatenate([draw(16, 5), draw(4, 2), draw(36, 7)], axis=1)
    visual = np.array([[0, 3, 5, 8, -1], [1, 6, 7, 12, 13], [2, -1, -1, -1, -1]], np.int32)
    cut = CutTrace(
        visual=visual[:num_images],
        num_kept=(visual[:num_images] >= 0).sum(1),
        num_computed=np.full(num_images, 5.0, np.float32),
        visual_attention_value=np.zeros((num_images, 2), np.float32),
    )
    return PruneTrace(
        encode=encode, fused_encoder=fused_encoder, fused_raster=fused_raster, cuts=(cut,)
    )


def test_stages_follow_an_image_through_the_model():
    trace = make_trace()
    stages = read_stages(trace, encoders=tuple(GRIDS))
    titles = [stage.title for stage in stages]
    assert titles == ["segment 1", "segment 2", "segment 3", "fusion", "LLM cut 1"]
    assert set(stages[0].kept) == {"clip", "pix2struct"}  # ConvNeXt was not cut there
    assert {name: len(kept[0]) for name, kept in stages[3].kept.items()} == {
        "clip": 5,
        "convnext": 2,
        "pix2struct": 7,
    }
    last = stages[4].kept
    # The second image kept fused tokens 1 (clip), 6 (convnext), 7, 12 and 13 (pix2struct).
    np.testing.assert_array_equal(last["clip"][1], trace.fused_raster[1, [1]])
    np.testing.assert_array_equal(last["convnext"][1], trace.fused_raster[1, [6]])
    np.testing.assert_array_equal(last["pix2struct"][1], trace.fused_raster[1, [7, 12, 13]])
    assert [len(last[name][2]) for name in GRIDS] == [1, 0, 0]


def test_shade_leaves_kept_cells_alone_and_fades_the_others():
    image = np.full((8, 8, 3), (200, 40, 10), np.uint8)
    shaded = shade(image, np.array([0, 3]), grid=2)
    np.testing.assert_array_equal(shaded[:4, :4], image[:4, :4])
    np.testing.assert_array_equal(shaded[4:, 4:], image[4:, 4:])
    assert (shaded[:4, 4:].max(-1) < 110).all()
    np.testing.assert_array_equal(shade(image, np.arange(4), grid=2), image)


@pytest.mark.parametrize("staged", [True, False])
def test_draws_a_png(tmp_path, staged):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    path = tmp_path / "kept.png"
    draw_kept_tokens(images, ["a?", "b?", "c?"], make_trace(staged=staged), grids=GRIDS, path=path)
    with Image.open(path) as picture:
        assert min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 5


def test_questions_must_match_the_images(tmp_path):
    images = np.zeros((3, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="3 images, 1 questions"):
        draw_kept_tokens(images, ["a?"], make_trace(), grids=GRIDS, path=tmp_path / "kept.png")


def test_examples_are_a_picture_each_and_a_list(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    records = [
        {
            "task": "count",
            "question": f"how many, {i}?",
            "answer": "2",
            "prediction": said,
            "score": score,
        }
        for i, (said, score) in enumerate([("2", 1.0), ("3", 0.0), ("2", 1.0)])
    ]
    path = draw_examples(tmp_path / "examples", images, records, make_trace(), grids=GRIDS)
    listed = json.loads(path.read_text())
    assert [one["picture"] for one in listed] == ["00.png", "01.png", "02.png"]
    assert listed[1] | records[1] == listed[1]
    # The second image kept fused tokens 1 (clip), 6 (convnext), 7, 12 and 13 (pix2struct).
    assert listed[1]["kept"]["LLM cut 1"] == {"clip": 1, "convnext": 1, "pix2struct": 3}
    assert listed[2]["kept"]["fusion"] == {"clip": 5, "convnext": 2, "pix2struct": 7}
    pixels = []
    for one in listed:
        with Image.open(path.parent / one["picture"]) as picture:
            assert min(picture.size) > 200
            pixels.append(np.asarray(picture.convert("L")))
    assert (pixels[0] != pixels[1]).any()
