"""Markdown as one HTML page that needs nothing but itself: pictures are inside it."""

from __future__ import annotations

import base64
import html
import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt

from meteor_jax.reports.plots import INK, LINE, MUTED, PAPER, SERIES

# Colours of the charts become the page's, which differ by day and by night.
THEME = {INK: "ink", MUTED: "muted", PAPER: "paper", LINE: "line"} | {
    color: f"series-{index}" for index, color in enumerate(SERIES)
}
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
ABSENT = "–"  # in a table's cell


def render_page(markdown: str, *, title: str, folder: Path) -> str:
    """The HTML of CommonMark with tables. HTML in the text is shown, not obeyed.

    Args:
        folder: where the pictures that the text names lie. SVG goes into the page as elements.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(self: Any, tokens: Any, index: int, *_: Any) -> str:
        path = folder / tokens[index].attrGet("src")
        return _embed(path, text=tokens[index].content)

    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    template = Template(files("meteor_jax.reports").joinpath("page.html").read_text("utf-8"))
    return template.substitute(title=html.escape(title), body=parser.render(markdown))


def escape(text: object) -> str:
    """`text` as Markdown that shows it as it is, also in a table's cell."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|&~#!])", r"\\\1", line)


def table(header: list[str], rows: list[list[str]], *, text_columns: int = 1) -> str:
    """A Markdown table; the first columns are text, the others numbers."""
    rule = ["---" if i < text_columns else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def _embed(path: Path, *, text: str) -> str:
    if path.suffix == ".svg":
        svg = path.read_text(encoding="utf-8")
        for color, name in THEME.items():
            svg = svg.replace(color, f"var(--{name})")
        label = f'<svg role="img" aria-label="{html.escape(text)}"'
        return f'<span class="figure scroll">{svg.replace("<svg", label, 1)}</span>'
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{MEDIA_TYPES[path.suffix]};base64,{data}"
    return f'<span class="picture scroll"><img src="{source}" alt="{html.escape(text)}"></span>'
