"""Writes one HTML page, and the same in Markdown, about one evaluation or several.

    meteor report runs/tiny/eval.json --output=runs/tiny/report
    meteor report runs/seed_0 runs/seed_1 --output=runs/seeds

What a run lacks (predictions, examples, several plans) makes the report shorter.
"""

from __future__ import annotations

from absl import flags

from meteor_jax.cli.flags import define_output
from meteor_jax.config import ConfigError
from meteor_jax.reports.html import write_report

POSITIONAL = "RUN …"


def define_flags() -> None:
    define_output("Folder for report.md, report.html and pictures.", default="report")


def main(options: flags.FlagValues, *paths: str) -> None:
    """Reports on `paths`: eval.json files, or the folders that hold them."""
    if not paths:
        raise ConfigError("expected the paths of one or more eval.json files, got none.")
    page = write_report(paths, options.output)
    print(f"{page} and {page.with_suffix('.md').name}")
