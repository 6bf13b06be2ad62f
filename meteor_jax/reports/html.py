"""A report of one or more evaluations, for reading and for sending on:

    meteor report runs/tiny/eval.json --output=runs/tiny/report

`report.md` with its pictures beside it, and `report.html`, one file that needs no other. What a
run lacks (predictions, examples, several plans) makes the report shorter.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from meteor_jax.config import ConfigError
from meteor_jax.evaluation.results import COMBINED, Row
from meteor_jax.evaluation.visualize import choose_examples
from meteor_jax.experiment.plans import BLIND, MAJORITY
from meteor_jax.reports import paper
from meteor_jax.reports.page import ABSENT, escape, render_page, table
from meteor_jax.reports.paired_comparison import paired_comparison, seed_variance
from meteor_jax.reports.plots import (
    TOKENS_LABEL,
    Point,
    score_figure,
    share_figure,
    spread_figure,
    to_svg,
)
from meteor_jax.reports.runs import Run, read_runs
from meteor_jax.reports.tables import plan_points

FIGURES, EXAMPLES = "figures", "examples"
SHOWN_ANSWERS = 12  # of one plan: questions with their answers, right and wrong
SHOWN_SPREADS = 24  # lines of the chart of kept tokens


def write_report(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Writes report.md and report.html into `output`; returns the path of the latter.

    Raises:
        ConfigError: if a path is no eval.json.
    """
    runs, output = read_runs(paths), Path(output)
    (output / FIGURES).mkdir(parents=True, exist_ok=True)
    sections = [
        _summary(runs),
        _scores(runs),
        paired_comparison(runs),
        seed_variance(runs),
        _beside_the_paper(runs),
        _charts(runs, output),
        _kept_tokens(runs, output),
        _shares(runs, output),
        _examples(runs, output),
        _answers(runs),
        _how(runs),
    ]
    markdown = "\n".join(section for section in sections if section)
    (output / "report.md").write_text(markdown, encoding="utf-8")
    title = "Evaluation: " + ", ".join(run.name for run in runs)
    page = output / "report.html"
    page.write_text(render_page(markdown, title=title, folder=output), encoding="utf-8")
    return page


def _summary(runs: Sequence[Run]) -> str:
    """What was evaluated, and the sentence that most readers come for."""
    lines = [f"# {escape('Evaluation: ' + ', '.join(run.name for run in runs))}", ""]
    for run in runs:
        full = run.mean_score("full")
        said = [f"{len(run.tasks)} tasks, {run.num_questions:,} questions"]
        if run.step is not None:
            said.append(f"step {run.step:,}")
        for plan in run.pruned:
            score = run.mean_score(plan)
            text = f"{escape(plan)} scores {score:.1f} %"
            if full is not None:
                kept = _share(run.tokens_kept(plan), run.tokens_kept("full"))
                computed = _share(run.tokens_computed(plan), run.tokens_computed("full"))
                text += (
                    f" ({score - full:+.1f} against full), keeping {kept} of the visual tokens and "
                    f"computing {computed}"
                )
            said.append(text)
        lines.append(f"- **{escape(run.name)}**: " + "; ".join(said) + ".")
    return "\n".join(lines) + "\n"


def _scores(runs: Sequence[Run]) -> str:
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    header = ["plan", "kept", "computed", "GFLOPs", "ms", "mean", *map(escape, tasks)]
    rows = []
    for run in runs:
        for plan in run.plan_names:
            by_task = {row.task: row for row in run.rows if row.plan == plan}
            first = next(iter(by_task.values()))
            scores = [by_task.get(task) for task in tasks]
            cost = [ABSENT] * 4
            if plan != MAJORITY:
                cost = [
                    f"{run.tokens_kept(plan):.1f}",
                    f"{run.tokens_computed(plan):.1f}",
                    f"{1e3 * run.mean(plan, 'tflops'):,.4g}",
                    f"{1e3 * first.seconds:.2f}",
                ]
            rows.append(
                [
                    escape(_label(runs, run, plan)),
                    *cost,
                    f"**{run.mean_score(plan):.1f}**",
                    *(ABSENT if row is None else _score_cell(row) for row in scores),
                ]
            )
    text = [
        "## Scores",
        "",
        "Percent, and half the width of a 95 % interval. Visual tokens of a question that are "
        "kept, and that are computed, are means over the LLM's layers; GFLOPs are those computed; "
        "ms is measured wall time a question, images shared; "
        f"{BLIND} sees no image, {MAJORITY} gives each task's most frequent answer.",
        "",
        table(header, rows),
    ]
    if len({tuple(run.tasks) for run in runs}) > 1:
        text.append("The runs have different tasks, so their means are not comparable.\n")
    changes = _changes(runs)
    return "\n".join(text) + (f"\n{changes}" if changes else "")


def _changes(runs: Sequence[Run]) -> str:
    """What each plan costs against the reference, question by question."""
    rows = [
        [
            escape(_label(runs, run, row.plan)),
            escape(row.task),
            f"{100 * row.delta:+.1f}",
            f"{100 * row.delta_low:+.1f} … {100 * row.delta_high:+.1f}",
        ]
        for run in runs
        for row in run.rows
        if row.delta is not None and row.plan in run.pruned and row.group != COMBINED
    ]
    if not rows:
        return ""
    header = ["plan", "task", "difference", "95 % interval"]
    return (
        "### Against the unpruned plan\n\nThe same questions compared one by one, in points.\n\n"
        + table(header, rows, text_columns=2)
    )


def _beside_the_paper(runs: Sequence[Run]) -> str:
    full = paper.ROWS[0]
    rows = [
        [
            f"{name} (paper)",
            f"{tokens}",
            ABSENT,
            f"{100 * tokens / full[1]:.0f} %",
            f"{tflops:.2f}",
            f"{100 * tflops / full[2]:.0f} %",
            f"{mean:.1f}",
            ABSENT if name == full[0] else f"{mean - full[-1]:+.1f}",
            *map(str, scores),
        ]
        for name, tokens, tflops, *scores, mean in paper.ROWS
    ]
    for run in runs:
        named = [paper.task_of(benchmark, run.task_names) for benchmark in paper.BENCHMARKS]
        whole = run.mean_score("full")
        for plan in run.model_plans:
            by_task = {row.task: row for row in run.rows if row.plan == plan}
            score, tflops = run.mean_score(plan), run.mean(plan, "tflops")
            rows.append(
                [
                    escape(_label(runs, run, plan)),
                    f"{run.tokens_kept(plan):.1f}",
                    f"{run.tokens_computed(plan):.1f}",
                    _share(run.tokens_computed(plan), run.tokens_computed("full")),
                    np.format_float_positional(tflops, precision=3, fractional=False),
                    _share(tflops, run.mean("full", "tflops")),
                    f"{score:.1f}",
                    ABSENT if whole is None or plan == "full" else f"{score - whole:+.1f}",
                    *(
                        f"{100 * by_task[task].score:.1f}" if task in by_task else ABSENT
                        for task in named
                    ),
                ]
            )
    header = [
        "method",
        "kept",
        "computed",
        "of full",
        "TFLOPs",
        "of full",
        "mean",
        "against full",
        *paper.BENCHMARKS,
    ]
    return (
        "## Beside the paper\n\nThe rows marked (paper) are a reference, not measured here: paper, "
        "full-size, other data (Vicuna-7B, 1.8M examples of fine-tuning; its mean is over 11 "
        "benchmarks, OCRBench is out of 1000). Ours are percent, their mean is over the tasks "
        "above. What compares is the share of tokens and TFLOPs, and the change against full.\n\n"
        + table(header, rows)
    )


def _charts(runs: Sequence[Run], output: Path) -> str:
    def points(field: str, scale: float) -> dict[str, Point]:
        return {
            _label(runs, run, plan): point
            for index, run in enumerate(runs)
            for plan, point in plan_points(
                run.rows, cost=lambda row: scale * getattr(row, field), series=index
            ).items()
            if plan in run.model_plans  # far below all others, the rest would look the same
        }

    reference = runs[0].mean_score("full") if len(runs) == 1 else None
    tokens = score_figure(
        points("visual_tokens_computed", 1), x_label=TOKENS_LABEL, reference=reference
    )
    seconds = score_figure(
        points("seconds", 1e3), x_label="milliseconds a question, measured", reference=reference
    )
    return "\n".join(
        [
            "## Accuracy against cost",
            "",
            _picture(
                output,
                "accuracy_tokens",
                to_svg(tokens, name="tokens"),
                "score against visual tokens",
            ),
            _picture(
                output,
                "accuracy_seconds",
                to_svg(seconds, name="seconds"),
                "score against measured time",
            ),
        ]
    )


def _kept_tokens(runs: Sequence[Run], output: Path) -> str:
    rows, charted = [], {}
    for run in runs:
        for plan, by_task in run.kept.items():
            for task, kept in by_task.items():
                spread = kept["mean_over_layers"]
                values = [
                    spread["mean"],
                    spread["min"],
                    *spread["percentiles"].values(),
                    spread["max"],
                ]
                cuts = " → ".join(f"{cut['mean']:.1f}" for cut in kept["cuts"])
                label = _label(runs, run, plan)
                rows.append(
                    [
                        escape(label),
                        escape(task),
                        *(f"{value:.1f}" for value in values),
                        cuts or ABSENT,
                    ]
                )
                if spread["min"] < spread["max"]:
                    charted[f"{label} · {task}"] = spread
    if not rows:
        return ""
    header = [
        "plan",
        "task",
        "mean",
        "least",
        "5 %",
        "25 %",
        "50 %",
        "75 %",
        "95 %",
        "most",
        "after each cut",
    ]
    text = [
        "## Kept tokens",
        "",
        "Visual tokens of a question, mean over the LLM's layers: over the questions of a task, "
        "their mean and percentiles, and the mean that each cut in the LLM leaves.",
        "",
        table(header, rows, text_columns=2),
    ]
    if charted:
        figure = spread_figure(dict(list(charted.items())[:SHOWN_SPREADS]))
        text.append(
            _picture(
                output, "kept_tokens", to_svg(figure, name="kept"), "spread of the kept tokens"
            )
        )
    return "\n".join(text)


def _shares(runs: Sequence[Run], output: Path) -> str:
    shares = {_label(runs, run, plan): share for run in runs for plan, share in run.shares.items()}
    if not shares:
        return ""
    encoders = list(dict.fromkeys(name for share in shares.values() for name in share))
    rows = [
        [escape(label), *(f"{100 * share[e]:.0f}" if e in share else ABSENT for e in encoders)]
        for label, share in shares.items()
    ]
    sources = "; ".join(dict.fromkeys(run.shares_from for run in runs if run.shares))
    return "\n".join(
        [
            "## Which encoder the tokens come from",
            "",
            f"Percent of the tokens that enter the LLM ({sources}).",
            "",
            table(["plan", *map(escape, encoders)], rows),
            _picture(
                output,
                "shares",
                to_svg(share_figure(shares), name="shares"),
                "share of each encoder",
            ),
        ]
    )


def _examples(runs: Sequence[Run], output: Path) -> str:
    """Pictures that the evaluation drew; of the first images where it drew no more."""
    text = []
    for index, run in enumerate(runs):
        folder = output / EXAMPLES / str(index)
        if run.examples:
            for example in run.examples:
                verdict = "right" if example["score"] >= 0.5 else "wrong"
                plan = f", {escape(example['plan'])}" if "plan" in example else ""
                text += [
                    f"### {verdict.capitalize()}: {escape(example['question'])}",
                    "",
                    f"{escape(example['task'])}{plan}: said “{escape(example['prediction'])}”, "
                    f"the answer is “{escape(example['answer'])}”.",
                    "",
                    _copy(run.examples_folder / example["picture"], folder, output),
                    "",
                ]
        elif run.kept_picture:
            text += [_copy(run.kept_picture, folder, output), ""]
    if not text:
        return ""
    return "\n".join(
        [
            "## Examples",
            "",
            "Bright cells are the tokens that stayed, after each step of a plan.",
            "",
            *text,
        ]
    )


def _answers(runs: Sequence[Run]) -> str:
    """Right and wrong answers of each run's first pruned plan, with what full said to the same."""
    text = []
    for run in runs:
        plan = next(iter([*run.pruned, *run.model_plans]), None)
        said = run.predictions(plan) if plan else []
        if not said:
            continue
        full = {_key(record): record for record in run.predictions("full")}
        images = [record.get("image_id", i) for i, record in enumerate(said)]
        chosen = choose_examples([record["score"] for record in said], images, count=SHOWN_ANSWERS)
        rows = []
        for record in sorted((said[i] for i in chosen), key=lambda record: record["score"]):
            other = full.get(_key(record))
            rows.append(
                [
                    _mark(record),
                    escape(record["task"]),
                    escape(record["question"]),
                    escape(record["answer"]),
                    escape(record["prediction"]),
                    ABSENT if other is None else f"{escape(other['prediction'])} {_mark(other)}",
                    " → ".join(map(str, record.get("kept", []))) or ABSENT,
                ]
            )
        lost, won = (
            sum(
                (record["score"] >= 0.5) == gained
                and (full[_key(record)]["score"] >= 0.5) != gained
                for record in said
                if _key(record) in full
            )
            for gained in (False, True)
        )
        header = ["", "task", "question", "answer", escape(plan), "full", "tokens kept"]
        text += [
            f"### {escape(_label(runs, run, plan))}",
            "",
            table(header, rows, text_columns=len(header)),
        ]
        if full and plan != "full":
            text += [
                f"Of {len(said):,} answers {lost:,} were right with full only, "
                f"{won:,} with {escape(plan)} only.",
                "",
            ]
    if not text:
        return ""
    return "\n".join(
        ["## Right and wrong answers", "", "The first there are of each kind.", "", *text]
    )


def _how(runs: Sequence[Run]) -> str:
    lines = ["## How this was measured", ""]
    for run in runs:
        facts = [f"`{run.path}`"]
        facts += [f"{name} {version}" for name, version in run.versions.items()]
        if run.device:
            facts.append(run.device)
        lines.append(f"- **{escape(run.name)}**: " + ", ".join(facts))
    return "\n".join(lines) + "\n"


def _picture(output: Path, name: str, svg: str, text: str) -> str:
    (output / FIGURES / f"{name}.svg").write_text(svg, encoding="utf-8")
    return f"![{text}]({FIGURES}/{name}.svg)\n"


def _copy(source: Path, folder: Path, output: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / source.name)
    return f"![kept tokens]({(folder / source.name).relative_to(output).as_posix()})"


def _label(runs: Sequence[Run], run: Run, plan: str) -> str:
    return plan if len(runs) == 1 else f"{run.name}/{plan}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ABSENT


def _score_cell(row: Row) -> str:
    points = f" ({row.parts['points']:,.0f} points)" if "points" in row.parts else ""
    return f"{100 * row.score:.1f} ±{50 * (row.high - row.low):.1f}{points}"


def _key(record: Mapping) -> tuple:
    return record["task"], record["question_id"]


def _mark(record: Mapping) -> str:
    return "✓" if record["score"] >= 0.5 else "✗"


def main(argv: list[str]) -> None:
    """Reads the paths on the command line and writes the report."""
    try:
        if len(argv) < 2:
            raise ConfigError("expected the paths of one or more eval.json files, got none.")
        page = write_report(argv[1:], flags.FLAGS.output)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{page} and {page.with_suffix('.md').name}")


if __name__ == "__main__":
    flags.DEFINE_string("output", "report", "Folder for report.md, report.html and pictures.")
    app.run(main)
