"""Every benchmark from its published schema to its score; see `benchmark_fixtures`."""

import dataclasses
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from meteor_jax.config import ConfigError
from meteor_jax.data.sources.records import TaskSpec
from meteor_jax.data.sources.registry import CorruptImage, decode_image
from meteor_jax.evaluation.results import PlanResult, make_rows, score_answer
from meteor_jax.evaluation.tasks.benchmarks.datasets import FOLDERS
from meteor_jax.evaluation.tasks.benchmarks.registry import BENCHMARKS, GROUPS, PAPER11
from meteor_jax.evaluation.tasks.benchmarks.submission import write_submissions
from meteor_jax.evaluation.tasks.registry import (
    REGISTRY,
    collect_questions,
    open_task_source,
    resolve_tasks,
)
from meteor_jax.evaluation.tasks.scoring.aggregate import AGGREGATIONS
from meteor_jax.evaluation.tasks.scoring.registry import SCORERS, SUBMISSION
from meteor_jax.inference.engine.request import Prediction
from tests.evaluation.tasks import benchmark_fixtures as fixtures

SCORED = [name for name, row in BENCHMARKS.items() if row.task.metric != SUBMISSION]
IN_FIXTURE = [name for name in SCORED if name != "mme_cognition"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in BENCHMARKS:
        fixtures.write_folder(name, folder)
    return folder


def ask(name, data_dir, **kwargs):
    task = REGISTRY[name]
    source = open_task_source(task, data_dir=data_dir)
    return source, collect_questions(source, tasks=[task], **kwargs)


def result_of(questions, predictions, plan="full"):
    return PlanResult(
        plan=plan,
        predictions=tuple(Prediction(text=text) for text in predictions),
        scores=tuple(map(score_answer, questions, predictions)),
    )


def in_file_order(questions):
    """Questions stand by image; answers of the fixtures by row."""
    return sorted(questions, key=lambda question: str(question.question_id))


def test_rows_name_what_there_is():
    for name, row in BENCHMARKS.items():
        assert row.task.name == name
        assert row.task.metric in SCORERS and row.task.aggregation in AGGREGATIONS
        assert row.task.split == FOLDERS[row.task.source].split
    for names in GROUPS.values():
        assert len(set(names)) == len(names) and set(names) <= set(BENCHMARKS)
    assert len(PAPER11) == 11
    assert {"knowledge", "general", "ocr", "grounding", "all", "paper11"} <= set(GROUPS)


@pytest.mark.parametrize("name", IN_FIXTURE)
def test_right_answers_score_one_and_wrong_ones_zero(name, data_dir):
    source, questions = ask(name, data_dir)
    right = fixtures.RIGHT[name]
    ordered = in_file_order(questions)
    assert len(ordered) == len(right)
    assert all(score_answer(*pair) == 1.0 for pair in zip(ordered, right, strict=True))
    assert not any(score_answer(question, "§") for question in questions)
    for question in questions:
        images = source[question.record]["images"]
        assert len(images) == question.num_images
        for encoded in images:
            assert decode_image(encoded, size=8).shape == (8, 8, 3)
    for text in (*right, "§"):
        row = make_rows(ordered, [result_of(ordered, [text] * len(ordered))], tflops={})[0]
        assert 0 <= row.low <= row.score <= row.high <= 1
    row = make_rows(ordered, [result_of(ordered, right)], tflops={})[0]
    assert row.score == 1.0 and row.n == len(right)
    json.dumps(dataclasses.asdict(row))


def prompts(name, data_dir):
    return [question.question for question in in_file_order(ask(name, data_dir)[1])]


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [
        ("scienceqa_img", 0, f"Which is 0?\nA. one\nB. two\nC. three{LETTER}"),
        ("scienceqa_img", 1, f"Context: Look.\nWhich is 1?\nA. one\nB. two\nC. three{LETTER}"),
        ("ai2d", 2, f"What is 2?\nA. w\nB. x\nC. y\nD. z{LETTER}"),
        ("mmmu_val", 0, "<image> Which?\nA. left\nB. right\n"
         "Answer with the option letter from the given choices directly."),
        ("mmmu_val", 1, f"In <image> and <image>, not image 2: how many?{SHORT}"),
        ("mmmu_val", 2, "Which?\nA. <image>\nB. <image>\nC. none\n"
         "Answer with the option letter from the given choices directly."),
        ("mathvista_testmini_rules", 0, f"Which?\nA. red\nB. blue{LETTER}"),
        ("mathvista_testmini_rules", 1,
         "How many? (Unit: $)\nAnswer the question using a single integer number."),
        ("mathvista_testmini_rules", 2,
         "How long?\nAnswer the question using a single floating-point number with one decimal "
         "place."),
        ("mme_perception", 0, f"Is it 0?{SHORT}"),
        ("mmbench_en_dev_rules_circular", 1,
         f"Which of 0? There are several options:\nA. cat\nB. dog\n{LETTER}"),
        ("mmbench_en_dev_rules_circular", 2, "A room. Which of 1? There are several options:\n"
         f"A. red\nB. blue\nC. green\nD. grey\n{LETTER}"),
        ("seedbench_image", 1, f"Which 2?\nA. w\nB. x\nC. y\nD. z{LETTER}"),
        ("gqa", 0, f"Is it 0?{SHORT}"),
        ("pope", 0, f"Is there a 0?{SHORT}"),
        ("vqav2_val", 0, f"What is 0?{SHORT}"),
        ("vqav2_test", 0, f"What is 0?{SHORT}"),
        ("vizwiz_vqa_val", 0, "What is 0?\nWhen the provided information is insufficient, respond "
         f"with 'Unanswerable'.{SHORT}"),
        ("textvqa_val", 0, f"What brand is 0?{SHORT}"),
        ("textvqa_val_ocr", 1, f"What brand is 1?\nReference OCR token: STOP, 1{SHORT}"),
        ("chartqa", 0, "How many 0?\nAnswer the question with a single word."),
        ("docvqa_val", 0, f"What is line 0?{SHORT}"),
        ("infovqa_val", 0, f"What is line 0?{SHORT}"),
        ("ocrbench", 0, "What is written in 0?"),
        ("realworldqa", 0, "Which way 0?\n\nAnswer in one word."),
        ("mmvp", 0, f"Is it open?\nA. Open\nB. Closed{LETTER}"),
        ("refcoco_val_boxes", 0, "Where is left man?\nAnswer with its box as [x1, y1, x2, y2], the "
         "left, top, right and bottom edges as shares of the image's width and height."),
    ],
)  # fmt: skip
def test_prompts(name, row, prompt, data_dir):
    assert prompts(name, data_dir)[row] == prompt


def test_an_image_that_rows_share_is_one_record(data_dir):
    records = {
        name: [question.record for question in in_file_order(ask(name, data_dir)[1])]
        for name in ("vqav2_val", "textvqa_val", "docvqa_val", "infovqa_val", "chartqa", "ai2d")
    }
    assert set(map(tuple, records.values())) == {(0, 0, 2)}
    assert [q.record for q in ask("pope", data_dir)[1]] == [0, 0, 0]
    assert [q.record for q in ask("mmbench_en_dev_static", data_dir)[1]] == [0, 0, 2]
    source, questions = ask("gqa", data_dir)  # images have rows of their own
    assert len(source) == 2
    assert [(q.question_id, q.record) for q in questions] == [("22", 0), ("20", 1), ("21", 1)]


def test_images_stand_in_the_order_in_which_they_are_mentioned(data_dir):
    source, questions = ask("mmmu_val", data_dir)
    assert [question.num_images for question in questions] == [1, 2, 2]
    first, second = fixtures.IMAGES[0]["bytes"], fixtures.IMAGES[1]["bytes"]
    assert [source[i]["images"] for i in range(3)] == [[first], [second, first], [first, second]]
    assert [question.detail["subset"] for question in questions] == ["Art", "Art_Theory", "Math"]


def test_a_missing_image_is_a_corrupt_one(tmp_path):
    rows = [row | {"image": broken} for row, broken in zip(
        fixtures.ROWS["refcoco_val"],
        [{"bytes": b"no image", "path": ""}, None, fixtures.IMAGES[0]], strict=True,
    )]  # fmt: skip
    fixtures.write_rows(tmp_path / "RefCOCO" / "val-0.parquet", rows)
    source, questions = ask("refcoco_val_boxes", tmp_path)
    assert [question.references == ("",) for question in questions] == [True, True, True, False]
    for record in (0, 1):
        with pytest.raises(CorruptImage):
            decode_image(source[record]["images"][0], size=8)


def test_a_missing_folder_names_the_command(tmp_path):
    command = (
        f"hf download lmms-lab/DocVQA --repo-type dataset --include '*InfographicVQA/validation-*' "
        f"--local-dir {tmp_path}/DocVQA"
    )
    with pytest.raises(ConfigError, match=re.escape(command)) as error:
        open_task_source(REGISTRY["infovqa_val"], data_dir=tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"--include '\*testdev_balanced_images/testdev-\*'"):
        open_task_source(REGISTRY["gqa"], data_dir=tmp_path)


def test_other_files_are_told_from_a_missing_split(tmp_path, data_dir):
    fixtures.write_rows(tmp_path / "POPE" / "data" / "train-0.parquet", fixtures.ROWS["pope"])
    with pytest.raises(ConfigError, match="no test-"):
        open_task_source(REGISTRY["pope"], data_dir=tmp_path)
    (tmp_path / "POPE" / "data" / "test-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="download it anew"):
        open_task_source(REGISTRY["pope"], data_dir=tmp_path)
    rows = [{"image": fixtures.IMAGES[0], "question": "?"}]
    fixtures.write_rows(tmp_path / "RealWorldQA" / "test.parquet", rows)
    with pytest.raises(ConfigError, match=r"no column 'answer'; it has image, question"):
        ask("realworldqa", tmp_path)


def test_files_and_row_groups_make_one_sequence(tmp_path):
    rows = [fixtures.ROWS["realworldqa"][i % 3] | {"answer": str(i)} for i in range(9)]
    for part in range(3):
        path = tmp_path / "RealWorldQA" / f"test-0000{part}-of-00003.parquet"
        fixtures.write_rows(path, rows[3 * part : 3 * part + 3])
        assert pq.ParquetFile(path).metadata.num_row_groups == 2
    source, questions = ask("realworldqa", tmp_path)
    assert [question.answer for question in questions] == [str(i) for i in range(9)]
    assert [question.record for question in questions] == list(range(9))
    for i in np.random.default_rng(0).permutation(9).tolist():
        assert source[i]["images"] == [fixtures.IMAGES[i % 3]["bytes"]]
    with pytest.raises(IndexError):
        source[9]
    few = open_task_source(REGISTRY["realworldqa"], data_dir=tmp_path, num_images=4)
    assert len(few) == len(collect_questions(few, tasks=[REGISTRY["realworldqa"]])) == 4


def test_units_are_drawn_as_wholes(tmp_path):
    rows = [fixtures.ROWS["mme"][i % 2] | {"question_id": f"OCR/{i // 2}.png"} for i in range(40)]
    fixtures.write_rows(tmp_path / "MME" / "test-0.parquet", rows)
    _, questions = ask("mme_perception", tmp_path, num_questions=11, seed=1)
    assert len(questions) == 10
    assert len({question.detail["group_id"] for question in questions}) == 5
    assert questions == ask("mme_perception", tmp_path, num_questions=11, seed=1)[1]
    assert questions != ask("mme_perception", tmp_path, num_questions=11, seed=2)[1]
    row = make_rows(questions, [result_of(questions, ["yes"] * 10)], tflops={})[0]
    assert row.score == pytest.approx(0.25)  # half of the answers, no pair


def test_tasks_of_one_source_are_asked_together(data_dir):
    tasks = resolve_tasks(["textvqa_val", "textvqa_val_ocr"], sources=())
    source = open_task_source(tasks[0], data_dir=data_dir)
    questions = collect_questions(source, tasks=tasks)
    assert [question.record for question in questions] == [0, 0, 0, 0, 2, 2]
    rows = make_rows(questions, [result_of(questions, ["net"] * 6)], tflops={})
    assert [row.task for row in rows] == ["textvqa_val", "textvqa_val_ocr"]  # and none for both


def test_a_task_without_rows_is_an_error(data_dir):
    with pytest.raises(ValueError, match="no test question of mme_cognition"):
        ask("mme_cognition", data_dir)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("vqav2_test", [{"question_id": 50 + i, "answer": "2 dogs"} for i in range(3)]),
        ("vizwiz_vqa_test",
         [{"image": f"VizWiz_val_0000000{i}.jpg", "answer": "2 dogs"} for i in range(3)]),
        ("docvqa_test", [{"questionId": 100 + i, "answer": "The two dogs"} for i in range(3)]),
        ("infovqa_test", [{"questionId": 100 + i, "answer": "The two dogs"} for i in range(3)]),
    ],
)  # fmt: skip
def test_submissions(name, entries, data_dir, tmp_path):
    _, questions = ask(name, data_dir)
    predictions = ["The two dogs"] * 3
    (path,) = write_submissions(tmp_path, questions, predictions)
    assert path.name == f"{name}.json"
    assert json.loads(path.read_text()) == entries
    assert make_rows(questions, [result_of(questions, predictions)], tflops={}) == []
    assert write_submissions(tmp_path, ask("pope", data_dir)[1], predictions) == []


def test_groups_mean_benchmarks_where_the_sources_have_no_tasks():
    def names(*asked, sources=("llava:mix",)):
        return {task.name for task in resolve_tasks(asked, sources=sources)}

    assert names("paper11") == set(PAPER11)
    assert names("all") == names("benchmarks") == set(GROUPS["all"])
    assert names("knowledge") == set(GROUPS["knowledge"])
    assert names("ocr", sources=("reading",)) == set(GROUPS["ocr"])
    assert names("general", sources=("easy-vqa",)) == {"easyvqa_yesno"}
    assert names("benchmarks", sources=("easy-vqa",)) == set(GROUPS["all"])
    assert not {"vqav2_test", "pope_random", "textvqa_val_ocr"} & names("all")
    with pytest.raises(ConfigError, match="Did you mean 'textvqa_val'"):
        names("textvqa_vl")


def test_a_task_is_a_plain_value():
    task = REGISTRY["gqa"]
    assert isinstance(hash(task), int)
    assert dataclasses.replace(TaskSpec("a", "b", "ocr", "vqa")).max_new_tokens is None
