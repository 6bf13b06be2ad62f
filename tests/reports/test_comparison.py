"""Differences between plans of runs that were trained apart."""

import dataclasses

import pytest

from meteor_jax.reports.comparison import mean_difference, paired_comparison, seed_variance
from meteor_jax.reports.runs import read_runs
from tests.reports.test_html import write_run


def test_the_mean_difference_by_hand():
    base = {"a": {"1": 1.0, "2": 1.0, "3": 0.0}, "b": {"7": 0.5, "8": 0.0}}
    scores = {"a": {"1": 1.0, "2": 0.0, "9": 1.0}, "b": {"7": 1.0, "8": 0.5}}
    difference, asked = mean_difference(scores, base)
    assert asked == 4  # questions 3 and 9 were asked on one side only
    assert difference.mean == pytest.approx((-0.5 + 0.5) / 2)
    # Task a's bootstrap reaches from -1 to 0, task b's is a point: half of a's width on each side.
    assert (difference.low, difference.high) == pytest.approx((-0.25, 0.25))


@pytest.mark.parametrize("scores", [{}, {"a": {"1": 1.0}}, {"a": {"9": 1.0}, "b": {"7": 1.0}}])
def test_no_difference_where_the_questions_are_not_the_same(scores):
    assert mean_difference(scores, {"a": {"1": 1.0}, "b": {"7": 0.5}}) == (None, 0)


def table(section):
    """By plan, the cells of the section's table."""
    return {row[0]: list(row[1:]) for row in section.blocks[-1].rows}


def test_every_plan_of_every_run_stands_against_the_first_full(tmp_path):
    runs = read_runs([write_run(tmp_path / name, examples=False) for name in ("a", "b")])
    section = paired_comparison(runs)
    assert section.title == "Paired comparison with a/full"
    rows = table(section)
    assert rows["a/full"] == ["16.0", "16.0", "75.0", "75.0", "–", "–", "–"]
    assert rows["b/meteor"][-3] == "+0.0" and rows["b/meteor"][-1] == "8"
    assert list(rows) == ["a/full", "a/meteor", "b/full", "b/meteor"]  # no baselines


def test_without_predictions_or_a_second_run_there_is_nothing_to_say(tmp_path):
    bare, whole = (
        write_run(tmp_path / name, examples=False, predictions=name == "whole")
        for name in ("bare", "whole")
    )
    assert paired_comparison(read_runs([whole])) is None
    assert paired_comparison(read_runs([bare, whole])) is None
    rows = table(paired_comparison(read_runs([whole, bare])))
    assert rows["bare/full"] == ["16.0", "16.0", "75.0", "75.0", "–", "–", "–"]


def test_a_plan_of_several_runs_has_a_mean_and_a_spread(tmp_path):
    runs = read_runs([write_run(tmp_path / name, examples=False) for name in ("a", "b")])
    better = tuple(
        dataclasses.replace(row, score=row.score + 0.1) if row.plan == "meteor" else row
        for row in runs[1].rows
    )
    section = seed_variance([runs[0], dataclasses.replace(runs[1], rows=better)])
    # 75 and 85: the deviation of a sample of two is 10 / √2. No baselines.
    assert table(section) == {
        "full": ["2", "75.0 ± 0.0", "75.0 ± 0.0", "–"],
        "meteor": ["2", "80.0 ± 7.1", "80.0 ± 7.1", "+5.0"],
    }


def test_one_training_evaluated_twice_is_no_repetition(tmp_path):
    runs = read_runs([write_run(tmp_path / name, examples=False) for name in ("a", "b")])
    same = [dataclasses.replace(run, content=run.content | {"params": "abc"}) for run in runs]
    assert seed_variance(same) is None


def test_runs_of_one_training_each_or_of_other_tasks_are_no_repetition(tmp_path):
    runs = read_runs([write_run(tmp_path / name, examples=False) for name in ("a", "b")])
    fewer = tuple(row for row in runs[1].rows if row.task == runs[1].tasks[0])
    assert seed_variance(runs[:1]) is None
    assert seed_variance([runs[0], dataclasses.replace(runs[1], rows=fewer)]) is None


def test_a_run_of_the_baselines_alone_is_reported(tmp_path):
    runs = read_runs([write_run(tmp_path / name, examples=False) for name in ("a", "b", "c")])
    majority = tuple(row for row in runs[0].rows if row.plan == "majority")
    alone = dataclasses.replace(runs[0], rows=majority)
    assert paired_comparison([alone]) is None
    assert paired_comparison([alone, runs[1]]).title == "Paired comparison with a/majority"
    assert seed_variance([alone, *runs[1:]]) is None
