"""The README and the pages of docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
PROGRAMS = ("python", "meteor", "pip", "export", "for", "bash", "sky", "gcloud")


def commands(*pages: Path) -> list[list[str]]:
    """Every `python` and `meteor` command of the pages, as words, in their order."""
    found = []
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        fenced = [block for language, block in blocks if language in ("", "bash")]
        indented = re.findall(r"^(?: {4}| {7})(\S.*)$", text, flags=re.MULTILINE)
        for line in [line for block in fenced for line in block.splitlines()] + indented:
            for part in line.split(" && "):
                if part.startswith(("python ", "meteor ")):
                    found.append(shlex.split(part.split(" #")[0]))
    return found


def values(words: list[str], *names: str) -> list[str]:
    """The values of the flags `names` of a command."""
    return [
        word.partition("=")[2] for word in words if word.startswith(tuple(f"--{n}=" for n in names))
    ]
