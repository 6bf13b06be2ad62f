"""What a report consists of, and its two forms: a page that needs no other file, and Markdown."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from meteor_jax.reports.plots import INK, LINE, MUTED, PAPER, SERIES

# The colours of charts become CSS variables of the page, which has a light and a dark theme.
THEME = {INK: "ink", MUTED: "muted", PAPER: "paper", LINE: "line"} | {
    color: f"series-{index}" for index, color in enumerate(SERIES)
}
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
ABSENT = "–"  # in a table's cell


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first `text_columns` are aligned left, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file.

    Attributes:
        name: its path beside report.md; the suffix says what it is.
        text: for who cannot see it.
    """

    name: str
    text: str
    content: bytes

    @property
    def is_svg(self) -> bool:
        return self.name.endswith(".svg")


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what follows it: paragraphs, lists by name, tables, pictures, subsections."""

    title: str
    blocks: Sequence[str | Mapping[str, str] | Table | Picture | Section]


def write_page(folder: Path, sections: Sequence[Section], *, title: str) -> Path:
    """Writes report.html, and report.md with its pictures beside it; returns the former's path."""
    for picture in _pictures(sections):
        path = folder / picture.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.content)
    templates = Environment(
        loader=PackageLoader("meteor_jax.reports"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
    )
    templates.filters |= {"markdown": _markdown, "inline_svg": _inline_svg, "data_uri": _data_uri}
    for name in ("report.md", "report.html"):
        text = templates.get_template(name).render(title=title, sections=sections)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "report.html"


def _pictures(sections: Sequence[Section]) -> list[Picture]:
    found = []
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Section):
            found += _pictures([block])
    return found


def _markdown(text: str) -> str:
    """`text` as Markdown that shows it as it is, also in a table's cell."""
    return re.sub(r"([\\`*_\[\]<>|&~#!])", r"\\\1", " ".join(text.split()))


def _inline_svg(picture: Picture) -> Markup:
    svg = picture.content.decode()
    for color, name in THEME.items():
        svg = svg.replace(color, f"var(--{name})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(picture.text)}"', 1))


def _data_uri(picture: Picture) -> str:
    data = base64.b64encode(picture.content).decode()
    return f"data:{MEDIA_TYPES[Path(picture.name).suffix]};base64,{data}"
