"""The commands, plans, fields and links of README.md, CONTRIBUTING.md and docs/ are real."""

import importlib
import itertools
import re

import pytest
import yaml

from meteor_jax import __version__
from meteor_jax.cli.__main__ import COMMANDS, main
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import parse_plan, split_plans
from tests.documents import PAGES, README, ROOT, commands, values

WITH_CONFIG = [words for words in commands(*PAGES) if values(words, "config") not in ([], ["…"])]


def config_of(words):
    path, _, argument = values(words, "config")[0].partition(":")
    name = re.fullmatch(r"(?:.*/)?configs/(\w+)\.py", path)
    module = importlib.import_module(f"configs.{name[1]}")
    return module.get_config(*[argument] if argument else [])


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def command_of(words):
    """What `meteor` would be given: train.py and evaluate.py are commands too."""
    if words[0] == "meteor":
        return words[1]
    return words[1].rpartition("/")[2].removesuffix(".py") if words[1].endswith(".py") else None


def test_every_command_exists():
    found = commands(*PAGES)
    names = {words[1] for words in found if words[0] == "meteor"} - {"--help"}
    assert names <= set(COMMANDS)
    assert set(COMMANDS) <= {command_of(words) for words in found}  # each has an example
    for words in found:
        if words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1].replace("~/meteor_jax/", "")).is_file(), words[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_of_commands_exist(name, capsys):
    assert main([name, "--help"]) == 0
    said = re.findall(r"^  --(\[no\])?(\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    defined = {flag for _, flag in said} | {f"no{flag}" for negated, flag in said if negated}
    texts = [" ".join(words) for words in commands(*PAGES) if command_of(words) == name]
    inline = [re.findall(rf"`meteor {name}( [^`]*)`", page.read_text()) for page in PAGES]
    for text in (*texts, *itertools.chain(*inline)):
        named = set(re.findall(r" --([\w-]+)", text)) - {"help"}
        assert named <= defined, f"{text}: {sorted(named - defined)}"


def test_the_fields_that_commands_set_exist():
    unknown = []
    for words in WITH_CONFIG:
        config = config_of(words)
        for name in re.findall(r"--config\.([\w.]+)=", " ".join(words)):
            node = config
            for key in name.split("."):
                if key not in node:
                    unknown.append(f"{' '.join(words[:3])}: {name}")
                    break
                node = node[key]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_plans_of_commands_can_be_read(page):
    for words in (words for words in commands(page) if words in WITH_CONFIG):
        library = dict(config_of(words).plans)
        for text in values(words, "plans"):
            resolve_plans(split_plans(text), library=library, calibration=Calibration())
    for text in re.findall(r"`((?:fastv|only|random|divprune)\([^`…]*\))`", page.read_text()):
        parse_plan(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page.read_text())
    missing = [
        target
        for target in targets
        if not target.startswith("http") and not (page.parent / target).exists()
    ]
    assert not missing


def test_the_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:meteor_jax|configs|tests)/[\w./]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_one_version_is_told_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert citation["version"] == newest[1] == __version__
