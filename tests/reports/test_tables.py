import dataclasses
import io
import json
import re

import pytest
from PIL import Image
from rich.console import Console

from meteor_jax.evaluation.files import (
    file_name,
    prediction_line,
    read_line,
    write_eval,
    write_predictions,
)
from meteor_jax.evaluation.results import (
    PlanResult,
    averages,
    layer_average,
    majority,
    make_rows,
)
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.evaluation.visualize import choose_examples
from meteor_jax.inference.engine.request import Prediction
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import parse_plan
from meteor_jax.reports.tables import draw_curve, plan_points, print_table
from tests.evaluation.fakes import COUNT, YES

GOLDS = ["1", "2", "2", "3"]
YES_GOLDS = ["yes", "no", "no", "no"]
QUESTIONS = tuple(
    Question(task, record=i, image_id=i, question_id=10 * k + i, question="q?", answer=answer)
    for k, (task, references) in enumerate(((COUNT, GOLDS), (YES, YES_GOLDS)))
    for i, answer in enumerate(references)
)


def result(plan, right, **fields):
    kept, computed = fields.pop("kept", ()), fields.pop("computed", ())
    predictions = tuple(
        Prediction(
            text=question.answer if good else "?",
            kept=kept,
            computed=computed,
            prompt_tokens=8,
            prompt_length=9,
        )
        for question, good in zip(QUESTIONS, right, strict=True)
    )
    scores = tuple(map(float, right))
    return PlanResult(
        plan, predictions, scores, visual_tokens_fused=16, depth=4, seconds=0.5, **fields
    )


FULL = result("full", [1, 1, 1, 0, 1, 1, 1, 1])
METEOR = result("meteor", [1, 1, 0, 0, 1, 1, 1, 1], kept=(4, 2), computed=(6.0, 3.5), layers=(1, 3))


@pytest.fixture
def rows():
    cost = {"full": lambda text, *_: text, "meteor": lambda text, computed, *_: sum(computed)}
    return make_rows(QUESTIONS, [FULL, METEOR, majority(QUESTIONS)], tflops=cost)


def find(rows, task, plan):
    (row,) = [row for row in rows if (row.task, row.plan) == (task, plan)]
    return row


def test_questions_of_several_images_count_them_all():
    """Two questions about one image and two about three: two images on the mean."""
    answers = tuple(
        dataclasses.replace(found, num_images=1 if i % 2 else 3)
        for i, found in enumerate(METEOR.predictions)
    )
    result, seen = dataclasses.replace(METEOR, predictions=answers), []
    cost = {"meteor": lambda text, kept, images, rows: seen.append(images) or 1.0}
    row = find(make_rows(QUESTIONS, [result], tflops=cost), COUNT.name, "meteor")
    # A segment of one layer that 2 x 16 tokens enter, one of two with 4 and one of one with 2.
    assert row.visual_tokens_kept == (2 * 16 + 2 * 4 + 2) / 4
    assert seen[:2] == [3, 1]


def test_a_question_without_an_image_computes_the_places_of_one():
    answers = tuple(
        dataclasses.replace(found, num_images=0, kept=(0, 0)) for found in METEOR.predictions
    )
    result, seen = dataclasses.replace(METEOR, predictions=answers), []
    cost = {"meteor": lambda text, kept, images, rows: seen.append(images) or 1.0}
    row = find(make_rows(QUESTIONS, [result], tflops=cost), COUNT.name, "meteor")
    assert row.visual_tokens_kept == 0 and seen[0] == 1
    assert row.visual_tokens_computed == (1 * 16 + 2 * 6 + 1 * 3.5) / 4


def test_answers_of_another_batch_size_cost_what_they_did_there():
    answers = tuple(
        dataclasses.replace(
            found, batch_rows=1 if i < 2 else 32, computed=(4.0 if i < 2 else 6.0, 2.0)
        )
        for i, found in enumerate(METEOR.predictions)
    )
    cost = {"meteor": lambda text, computed, images, rows: 100 * rows + computed[0]}
    result = dataclasses.replace(METEOR, predictions=answers)
    row = find(make_rows(QUESTIONS, [result], tflops=cost), "reading_all", "meteor")
    assert row.tflops == pytest.approx((2 * 104 + 6 * 3206) / 8)
    line = json.loads(json.dumps(prediction_line(QUESTIONS[0], answers[0], 1.0)))
    assert read_line(line) == answers[0]


def test_rows_by_hand(rows):
    row = find(rows, "reading_count", "meteor")
    assert (row.score, row.n, row.metric, row.group) == (0.5, 4, "exact_match", "general")
    assert row.visual_tokens_kept == (1 * 16 + 2 * 4 + 1 * 2) / 4
    assert row.visual_tokens_computed == (1 * 16 + 2 * 6 + 1 * 3.5) / 4
    assert (row.visual_tokens_fused, row.tflops, row.seconds) == (16, 9.5, 0.5)
    assert row.delta == -0.25
    assert row.delta_low <= -0.25 <= row.delta_high
    full = find(rows, "reading_count", "full")
    assert (full.visual_tokens_kept, full.delta, full.f1, full.tflops) == (16, None, None, 9)
    assert find(rows, "reading_existence", "full").f1 == 1.0


def test_majority_answers_with_the_most_frequent_gold(rows):
    assert find(rows, "reading_count", "majority").score == 0.5
    row = find(rows, "reading_existence", "majority")
    assert (row.score, row.f1) == (0.75, 0.0)


def test_a_sources_tasks_are_joined_over_questions_but_not_averaged_again(rows):
    row = find(rows, "reading_all", "meteor")
    assert (row.score, row.n, row.group, row.metric) == (6 / 8, 8, "combined", "mean")
    assert averages(rows)["meteor"] == {"general": 0.75, "all": 0.75}


def test_corrupt_questions_count_as_wrong_and_are_named():
    answers = (Prediction(unreadable=True), *FULL.predictions[1:])
    broken = dataclasses.replace(FULL, predictions=answers, scores=(0.0, *FULL.scores[1:]))
    row = find(make_rows(QUESTIONS, [broken], tflops={}), "reading_count", "full")
    assert (row.score, row.n, row.corrupt, row.visual_tokens_kept) == (0.5, 4, 1, 16)


def test_answers_from_logits_that_are_not_finite_are_counted():
    answers = (dataclasses.replace(FULL.predictions[0], finite=False), *FULL.predictions[1:])
    result = dataclasses.replace(FULL, predictions=answers)
    rows = make_rows(QUESTIONS, [result], tflops={})
    assert find(rows, "reading_count", "full").non_finite == 1
    assert prediction_line(QUESTIONS[0], answers[0], 1.0)["non_finite"]
    console = Console(record=True, width=100)
    print_table(rows, console=console)
    assert "1 answers come from logits that are NaN or infinite" in console.export_text()


def test_layer_average_without_steps():
    assert layer_average((), result=FULL) == 16


def test_files(tmp_path, rows):
    plan = parse_plan("meteor(fuse=6, layers=(1, 3), keep=(4, 2))")
    write_eval(tmp_path / "eval.json", rows, config={"seed": 0}, plans=[plan], step=7)
    content = json.loads((tmp_path / "eval.json").read_text())
    assert content["step"] == 7
    assert PrunePlan.from_json(json.dumps(content["plans"]["meteor"])) == plan
    assert content["versions"].keys() >= {"meteor_jax", "jax"}
    assert len(content["rows"]) == len(rows)
    wanted = {
        "task",
        "plan",
        "metric",
        "score",
        "n",
        "visual_tokens_kept",
        "visual_tokens_computed",
        "non_finite",
        "tflops",
        "seconds",
    }
    assert wanted <= content["rows"][0].keys()
    path = write_predictions(tmp_path / "predictions", QUESTIONS, METEOR)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [q.question_id for q in QUESTIONS]
    assert lines[0]["kept"] == [4, 2]
    draw_curve(tmp_path / "curve.png", rows)
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 300
    assert not list(tmp_path.glob("*.partial*"))


def test_a_point_is_the_mean_over_tasks_with_their_intervals_combined(rows):
    points = plan_points(rows, cost=lambda row: 1e3 * row.seconds, series=2)
    tasks = [find(rows, task, "meteor") for task in ("reading_count", "reading_existence")]
    point = points["meteor"]
    assert (point.x, point.score, point.series) == (500, 75, 2)
    below = sum((row.score - row.low) ** 2 for row in tasks) ** 0.5 / 2
    assert point.low == pytest.approx(100 * (0.75 - below))
    assert points["majority"].series == -1


@pytest.mark.parametrize(
    ("scores", "images", "chosen"),
    [
        ([1, 1, 1, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 3, 5]),
        ([1, 1, 1, 0, 0, 0], [0, 0, 1, 2, 2, 3], [0, 2, 3, 5]),  # an image is shown once
        ([1, 1, 1, 1, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 5]),  # right ones fill in
        ([0.4, 0.6], [0, 1], [0, 1]),
        ([], [], []),
    ],
)
def test_examples_are_half_wrong_and_half_right(scores, images, chosen):
    assert choose_examples(scores, images, count=4) == chosen


def test_file_names_are_harmless():
    assert file_name("fastv(layer=2,keep=8)") == "fastv_layer=2_keep=8"
    assert file_name("full") == "full"
    assert "/" not in file_name("a/b")


def test_the_table_shows_every_plan_and_average(rows):
    console = Console(width=140, record=True, file=io.StringIO())
    print_table(rows, console=console)
    text = console.export_text()
    words = ("reading_count", "reading_all", "meteor", "majority", "mean % over tasks", "-25.0")
    for word in words:
        assert word in text


def test_brackets_in_a_plan_s_name_are_shown_as_they_are(rows):
    console = Console(width=140, record=True, file=io.StringIO())
    print_table([dataclasses.replace(row, plan="plan[b]") for row in rows], console=console)
    first, means = console.export_text().split("mean % over tasks")
    assert "plan[b]" in first and "plan[b]" in means


def test_the_table_is_whole_at_80_columns(rows):
    long = "fastv(layer=2,keep=192)"
    big = [
        dataclasses.replace(
            row,
            task="reading_existence_of_objects",
            plan=long if row.plan == "meteor" else row.plan,
            n=12_345,
            visual_tokens_kept=576.25,
            visual_tokens_computed=1024.0,
            tflops=26.21,
            seconds=1.2345,
            f1=0.8251,
            delta=-0.1234,
            delta_low=-0.1834,
            delta_high=-0.0634,
        )
        for row in rows
        if row.task == "reading_existence"
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    print_table(big, console=console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    (full,) = [line for line in lines if "-12.3" in line and "full" in line]
    assert full.split()[3:] == ["-12.3", "±6.0", "82.5", "576", "1,024", "26,210", "1,234"]
    first = [re.sub(r"  .*", "", line.strip()) for line in lines]
    for name in ("reading_existence_of_objects", long):  # they fold, nothing of them is lost
        assert name in "".join(first)
