"""Charts: names that can be read."""

import itertools

import pytest

from meteor_jax.reports.plots import LABEL_HEIGHT, Point, score_figure, shorten


@pytest.mark.parametrize("scores", [[50.0] * 8, [50.0, 50.1, 50.2, 99.0, 99.1, 99.2]])
def test_names_of_points_do_not_meet_and_stay_inside(scores):
    points = {f"plan{i}": Point(20.0, score, 40.0, 100.0) for i, score in enumerate(scores)}
    points["full"] = Point(100.0, 50.0, 45.0, 55.0)
    (axes,) = score_figure(points, x_label="tokens").axes
    places = {label.get_text(): label.xyann for label in axes.texts}
    assert places.keys() == points.keys()
    heights = sorted(y for name, (_, y) in places.items() if name != "full")
    assert all(b - a > LABEL_HEIGHT - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[0] >= 0 and heights[-1] <= 1
    assert places["full"][0] > places["plan0"][0]


def test_a_long_name_keeps_its_ends():
    assert shorten("fastv(layer=2,keep=8)") == "fastv(layer=2,keep=8)"
    name = shorten("run_of_a_long_name/fastv(layer=2,keep=192)")
    assert len(name) == 30 and name.startswith("run_of") and name.endswith("keep=192)")
