"""Reports of evaluations: whole from what a whole run leaves, shorter from less, never a crash."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from markdown_it import MarkdownIt

from meteor_jax.config import ConfigError
from meteor_jax.evaluation.files import write_eval, write_predictions
from meteor_jax.evaluation.results import PlanResult, majority, make_rows
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.evaluation.token_stats import kept_tokens
from meteor_jax.evaluation.visualize import write_examples
from meteor_jax.inference.draw import read_stages
from meteor_jax.inference.engine.request import Prediction
from meteor_jax.pruning.text import parse_plan
from meteor_jax.reports import paper
from meteor_jax.reports.html import write_report
from meteor_jax.reports.page import Section, Table, write_page
from meteor_jax.reports.runs import read_runs
from tests.evaluation.fakes import COUNT, YES
from tests.inference.test_draw import GRIDS, make_trace

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-headless-shell"))), None
)
NASTY = "how many <script>alert(1)</script> | or `x` _y_?"
QUESTIONS = tuple(
    Question(task, record=i, image_id=i, question_id=100 * k + i, question=question, answer="yes")
    for k, task in enumerate((COUNT, YES))
    for i, question in enumerate([NASTY, "is it?", "is it not?", "any text?"])
)
PLAN = parse_plan("meteor(fuse=8, layers=(1, 3), keep=(6, 4))")


def result(plan, right, **fields):
    predictions = tuple(
        Prediction(
            text="yes" if good else "no",
            kept=(4 + i, 2 + i) if fields else (),
            computed=(10.0, 8.0) if fields else (),
            prompt_tokens=9,
            prompt_length=16,
        )
        for i, good in enumerate(right)
    )
    scores = tuple(map(float, right))
    return PlanResult(
        plan, predictions, scores, visual_tokens_fused=16, depth=4, seconds=0.002, **fields
    )


def write_run(folder, *, examples=True, predictions=True, only_full=False):
    """What an evaluation leaves in its workdir."""
    folder.mkdir(parents=True)
    results = [result("full", [1, 1, 1, 0, 1, 1, 0, 1])]
    if not only_full:
        results += [result("meteor", [1, 0, 1, 0, 1, 1, 1, 1], layers=(1, 3)), majority(QUESTIONS)]
    rows = make_rows(QUESTIONS, results, tflops={r.plan: lambda *_: 2e-4 for r in results[:2]})
    details = {"kept_tokens": kept_tokens(QUESTIONS, results) if not only_full else {}}
    if predictions:
        paths = [write_predictions(folder / "predictions/step_7", QUESTIONS, r) for r in results]
        details["predictions"] = {
            each.plan: str(path.relative_to(folder))
            for each, path in zip(results, paths, strict=True)
        }
    write_eval(
        folder / "eval.json",
        rows,
        plans=[PLAN],
        step=7,
        details=details,
        config={},
    )
    if examples:
        images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
        records = [
            {
                "plan": "meteor",
                "task": "reading_count",
                "question": NASTY,
                "answer": "2",
                "prediction": prediction,
                "score": score,
            }
            for prediction, score in (("2", 1.0), ("3", 0.0))
        ]
        stages = read_stages(make_trace(2), grids=GRIDS)
        write_examples(folder, images, records=records, stages=stages)
    return folder / "eval.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder / "runs/tiny")
    return write_report([run], folder / "out")


def test_a_whole_run_gives_every_section(whole):
    text = whole.with_suffix(".md").read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [
        "Summary",
        "Scores",
        "Comparison with the paper",
        "Accuracy versus cost",
        "Kept tokens",
        "Tokens by encoder",
        "Examples",
        "Correct and incorrect answers",
        "Method",
    ]
    lines = text.splitlines()
    assert any(line.startswith("| meteor | 9.1 | 11.0 | 0.2 | 2.00 | 75.0 |") for line in lines)
    assert "'blind' is the text-only baseline" in text and "is the majority class" in text
    paper = "| METEOR (paper) | 242 | – | 24 % | 13.42 | 51 % |"
    assert any(line.startswith(paper) for line in lines)
    assert "1 are correct with full only and 1 with meteor only" in text
    assert "### Correct: how many" in text and "### Incorrect: how many" in text
    assert (
        "- **meteor**: 75.0 % (+0.0 points versus full), with 57 % of the visual tokens kept"
        in text
    )
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (whole.parent / name).stat().st_size > 1000


def test_the_page_stands_alone_and_shows_text_as_it_is(whole):
    page = whole.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "url(http" not in page and "@import" not in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == 4 and page.count("data:image/png;base64,") == 2
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert "#1b1f24" not in page.split("</style>")[1]  # charts take the page's colours
    assert len(set(ids := re.findall(r'\bid="([^"]+)"', page))) == len(ids)


@pytest.mark.parametrize(
    ("less", "gone"),
    [
        ({"examples": False}, {"Examples", "Tokens by encoder"}),
        ({"predictions": False}, {"Correct and incorrect answers"}),
        (
            {"predictions": False, "examples": False, "only_full": True},
            {"Examples", "Tokens by encoder", "Correct and incorrect answers", "Kept tokens"},
        ),
    ],
)
def test_what_a_run_lacks_makes_the_report_shorter(tmp_path, whole, less, gone):
    page = write_report([write_run(tmp_path / "run", **less)], tmp_path / "out")
    sections = [
        set(re.findall(r"^## (.*)$", path.with_suffix(".md").read_text(), flags=re.MULTILINE))
        for path in (whole, page)
    ]
    assert sections[0] - sections[1] == gone


def test_shares_come_from_training_and_else_from_the_examples(tmp_path):
    path = write_run(tmp_path / "run")
    run = read_runs([path])[0]
    assert run.shares == {"meteor": {"clip": 5 / 14, "convnext": 2 / 14, "pix2struct": 7 / 14}}
    assert run.shares_from == "over the 2 examples drawn below"
    lines = [
        {"step": step, "plan": "meteor", "fused_share/clip": share, "fused_share/sam": 1 - share}
        for step, share in enumerate([0.9] * 5 + [0.25] * 20)
    ]
    (path.parent / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_runs([path])[0]
    assert run.shares == {"meteor": {"clip": 0.25, "sam": 0.75}}
    assert "training" in run.shares_from


def test_an_evaluation_that_was_kept_stands_beside_the_newest(tmp_path):
    newest = write_run(tmp_path / "tiny")
    kept = newest.with_name("eval_step_7.json")
    kept.write_text(newest.read_text())
    runs = read_runs([newest.parent, kept])
    assert [run.name for run in runs] == ["tiny/eval", "tiny/eval_step_7"]
    assert runs[0].predictions("meteor") == runs[1].predictions("meteor") != []
    assert runs[0].examples and not runs[1].examples  # pictures are of the newest


def test_several_runs_stand_side_by_side(tmp_path):
    paths = [write_run(tmp_path / name / "run", examples=False) for name in ("a", "b")]
    content = json.loads(paths[1].read_text())
    content["rows"].reverse()  # the same tasks in another order
    paths[1].write_text(json.dumps(content))
    text = write_report(paths, tmp_path / "out").with_suffix(".md").read_text()
    for name in ("a/run/full", "b/run/meteor"):
        assert name in text
    assert "not comparable" not in text
    assert re.search(r"\| mean \| reading_count \| reading_existence \|", text.replace("\\", ""))
    different = write_run(tmp_path / "c", examples=False)
    content = json.loads(different.read_text())
    content["rows"] = [row for row in content["rows"] if row["task"] == "reading_count"]
    different.write_text(json.dumps(content))
    text = write_report([paths[0], different], tmp_path / "out2").with_suffix(".md").read_text()
    assert "not comparable" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "got no JSON"),
        ("[1]", "got JSON without 'rows'"),
        ('{"rows": []}', "none has a score"),
        ('{"rows": [3]}', r"rows\[0\]"),
        ('{"rows": [{"task": "a"}]}', r"rows\[0\]: missing plan"),
    ],
)
def test_what_is_no_eval_json_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "eval.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        write_report([path], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_points_stand_beside_the_score(tmp_path):
    path = write_run(tmp_path / "run")
    content = json.loads(path.read_text())
    content["rows"][0]["parts"] = {"points": 1514.6}
    path.write_text(json.dumps(content))
    text = write_report([path], tmp_path / "out").with_suffix(".md").read_text()
    assert text.count("(1,515 points)") == 1


def test_our_tasks_are_found_in_the_papers_columns():
    tasks = ["scienceqa_img", "pope", "pope_random", "docvqa_val", "easyvqa_yesno"]
    assert paper.task_of("SQA", tasks) == "scienceqa_img"
    assert paper.task_of("POPE", tasks) == "pope"
    assert paper.task_of("GQA", tasks) is None
    assert all(len(row) == len(paper.COLUMNS) for row in paper.ROWS)


def test_text_with_markup_is_shown_as_it_is(tmp_path):
    text = "a | b * c_d [e](f) <g> ~h~ &amp; \\i `j`"
    sections = [Section(text, [text, {text: text}, Table(["x"], [[text]]), Section("y", [text])])]
    page = write_page(tmp_path, sections, title=text)
    shown = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert page.read_text().count(shown) == 8
    cells = MarkdownIt("commonmark").enable("table").render((tmp_path / "report.md").read_text())
    assert cells.count(shown) == 7 and f"<td>{shown}</td>" in cells
    assert f"<h2>{shown}</h2>" in cells and f"<li><strong>{shown}</strong>: {shown}</li>" in cells


def test_columns_of_numbers_are_aligned_right(tmp_path):
    sections = [Section("s", [Table(["plan", "task", "ms"], [["a", "b", "1"]], text_columns=2)])]
    page = write_page(tmp_path, sections, title="t").read_text()
    assert '<tr><td>a</td><td>b</td><td class="number">1</td></tr>' in page
    assert "|---|---|--:|" in (tmp_path / "report.md").read_text()


def browse(page, folder):
    """The page as a browser of a phone's size has it, what it said, and its picture."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--screenshot={folder / 'page.png'}",
        "--dump-dom",
        "--window-size=390,844",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr, folder / "page.png"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_opens_the_page_without_a_complaint(whole, tmp_path):
    content, said, picture = browse(whole, tmp_path)
    assert "CONSOLE" not in said, said
    assert "Comparison with the paper" in content and picture.stat().st_size > 20_000
    broken = tmp_path / "broken.html"
    broken.write_text("<script>console.error('no')</script>")
    assert "CONSOLE" in browse(broken, tmp_path)[1]
