import numpy as np
import pytest

from meteor_jax.inference.draw import draw_kept_tokens, read_stages, shade
from meteor_jax.types import EncodeTrace, PruneStepTrace, PruneTrace

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
    fused_patch_index = np.concatenate([draw(16, 5), draw(4, 2), draw(36, 7)], axis=1)
    visual = np.array([[0, 3, 5, 8, -1], [1, 6, 7, 12, 13], [2, -1, -1, -1, -1]], np.int32)
    step = PruneStepTrace(
        visual=visual[:num_images],
        num_kept=(visual[:num_images] >= 0).sum(1),
        num_computed=np.full(num_images, 5.0, np.float32),
        budget_signal=np.zeros(num_images, np.float32),
    )
    return PruneTrace(
        encode=encode,
        fused_encoder=fused_encoder,
        fused_patch_index=fused_patch_index,
        prune_steps=(step,),
    )


def kept(stage):
    """By encoder, the numbers of the kept cells."""
    return {name: np.flatnonzero(cells).tolist() for name, cells in stage.kept.items()}


def test_stages_follow_an_image_through_the_model():
    trace = make_trace()
    images = read_stages(trace, grids=GRIDS)
    assert len(images) == 3
    stages = images[1]
    titles = [stage.title for stage in stages]
    assert titles == ["segment 1", "segment 2", "segment 3", "fusion", "LLM step 1"]
    # ConvNeXt is not pruned inside.
    assert kept(stages[0]) == {
        name: trace.encode[name].kept[0][1].tolist() for name in ("clip", "pix2struct")
    }
    assert {name: len(cells) for name, cells in kept(stages[3]).items()} == {
        "clip": 5,
        "convnext": 2,
        "pix2struct": 7,
    }
    # The second image kept fused tokens 1 (clip), 6 (convnext), 7, 12 and 13 (pix2struct).
    cells = trace.fused_patch_index[1]
    last = {"clip": [cells[1]], "convnext": [cells[6]], "pix2struct": cells[[7, 12, 13]].tolist()}
    assert kept(stages[4]) == last
    assert [len(kept(images[2][4])[name]) for name in GRIDS] == [1, 0, 0]
    assert {name: cells.shape for name, cells in stages[3].kept.items()} == {
        name: (side, side) for name, side in GRIDS.items()
    }


def test_shade_leaves_kept_cells_alone_and_fades_the_others():
    image = np.full((8, 8, 3), (200, 40, 10), np.uint8)
    shaded = shade(image, np.array([[True, False], [False, True]]))
    np.testing.assert_array_equal(shaded[:4, :4], image[:4, :4])
    np.testing.assert_array_equal(shaded[4:, 4:], image[4:, 4:])
    assert (shaded[:4, 4:].max(-1) < 110).all()
    np.testing.assert_array_equal(shade(image, np.ones((2, 2), bool)), image)


@pytest.mark.parametrize("staged", [True, False])
def test_a_picture_differs_by_what_was_kept(staged):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    first, second, _ = read_stages(make_trace(staged=staged), grids=GRIDS)
    pictures = [
        draw_kept_tokens(image, stages, caption="$5 or $x_{?") for stages in (first, second)
    ]
    assert pictures[0].mode == "RGB" and min(pictures[0].size) > 200
    assert pictures[0].size == pictures[1].size
    assert (np.asarray(pictures[0]) != np.asarray(pictures[1])).any()
