import itertools

import pytest

from meteor_jax.config import ConfigError
from meteor_jax.data.sources.records import TaskSpec
from meteor_jax.evaluation.tasks.registry import collect_questions, resolve_tasks

REGISTRY = {
    task.name: task
    for task in (
        TaskSpec("easyvqa_attribute", "easy-vqa", "knowledge", "exact_match"),
        TaskSpec("easyvqa_yesno", "easy-vqa", "general", "yes_no"),
        TaskSpec("reading_count", "reading", "general", "exact_match"),
        TaskSpec("reading_word", "reading", "reading", "anls"),
    )
}
BOTH = ("easy-vqa", "reading")


def names(*asked, sources=BOTH):
    return [task.name for task in resolve_tasks(asked, sources=sources, registry=REGISTRY)]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (["all"], list(REGISTRY)),
        (["general"], ["easyvqa_yesno", "reading_count"]),
        (["reading"], ["reading_word"]),  # the group
        (["reading_all"], ["reading_count", "reading_word"]),  # the source
        (["easy_vqa"], ["easyvqa_attribute", "easyvqa_yesno"]),
        (["easy-vqa"], ["easyvqa_attribute", "easyvqa_yesno"]),
        (["easyvqa_all"], ["easyvqa_attribute", "easyvqa_yesno"]),
        (["reading_word", "knowledge", "reading_word"], ["easyvqa_attribute", "reading_word"]),
    ],
)
def test_names(asked, found):
    assert names(*asked) == found


def test_all_and_groups_mean_the_configs_sources():
    assert names("all", sources=("reading",)) == ["reading_count", "reading_word"]
    assert names("easyvqa_yesno", sources=("reading",)) == ["easyvqa_yesno"]
    with pytest.raises(ConfigError, match="no task of 'reading' in the config's sources"):
        names("reading", sources=("easy-vqa",))


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match=r"no task, group or source 'readingword'.*reading_word"):
        names("readingword")
    with pytest.raises(ConfigError, match="write --tasks=all"):
        names()


def records(num_images=10):
    return [
        {
            "image": b"",
            "image_id": 100 + i,
            "qa": [
                {
                    "task": "reading_count",
                    "question": f"q{i}{j}",
                    "answer": "1",
                    "question_id": 10 * i + j,
                }
                for j in range(3)
            ]
            + [{"task": "reading_word", "question": f"w{i}", "answer": "a", "question_id": 90 + i}],
        }
        for i in range(num_images)
    ]


def test_collects_every_question_of_the_tasks_once():
    found = collect_questions(records(), tasks=[REGISTRY["reading_count"]])
    assert [question.question_id for question in found] == [
        10 * i + j for i in range(10) for j in range(3)
    ]
    assert {question.image_id for question in found} == set(range(100, 110))


def test_a_limit_holds_for_each_task_and_the_choice_is_repeatable():
    tasks = [REGISTRY["reading_count"], REGISTRY["reading_word"]]
    found = collect_questions(records(), tasks=tasks, num_questions=7, seed=3)
    for task in tasks:
        of_task = [question for question in found if question.task == task]
        assert len({question.question_id for question in of_task}) == 7
    assert found == collect_questions(records(), tasks=tasks, num_questions=7, seed=3)
    assert found != collect_questions(records(), tasks=tasks, num_questions=7, seed=4)
    places = [question.image for question in found]
    changes = sum(before != after for before, after in itertools.pairwise(places))
    assert changes == len(set(places)) - 1  # those about one image stand side by side


def test_a_task_without_questions_is_an_error():
    with pytest.raises(ValueError, match="no test question of easyvqa_yesno"):
        collect_questions(records(), tasks=[REGISTRY["easyvqa_yesno"]])
