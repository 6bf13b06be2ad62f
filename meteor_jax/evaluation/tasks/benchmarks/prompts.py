"""How a published row becomes a prompt with its answers.

The prompts are those with which EAGLE was evaluated (its copy of lmms-eval), zero-shot; where it
has none the docstring says whose it is. Every function is `row -> Iterator[Item]`.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from meteor_jax.data.templates import IMAGE_MARKER
from meteor_jax.evaluation.tasks.scoring.boxes import format_box

Row = Mapping[str, Any]

LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."
NUM_ORDERS = 1_000_000  # MMBench counts orders of the same options in steps of this
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)

_MMMU_IMAGE = re.compile(r"<(image \d+)>")
_MMVP_OPTION = re.compile(r"\([a-z]\)\s*([^(]+?)(?=\s*\([a-z]\)|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a row; see `tasks.Question`, which has the same fields.

    `question_id` is the row's number where it is None. `detail` has a "group_id" where several
    questions count as one, and a "subset" where results are also given by subset.
    """

    prompt: str
    references: tuple[str, ...] = ()
    question_id: int | str | None = None
    detail: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_images: int = 1


def scienceqa(row: Row) -> Iterator[Item]:
    """Columns hint, question, choices (a list), answer (an index)."""
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    prompt = f"{context}{row['question']}\n{_lettered(row['choices'])}{LETTER}"
    yield Item(prompt, (_letter(row["answer"]),))


def ai2d(row: Row) -> Iterator[Item]:
    """Columns question, options (a list), answer (an index, as text)."""
    prompt = f"{row['question']}\n{_lettered(row['options'])}{LETTER}"
    yield Item(prompt, (_letter(int(row["answer"])),))


def mmmu(row: Row) -> Iterator[Item]:
    """Columns id, question, options (a Python list, as text), answer, question_type.

    An image stands where it is first spoken of; later mentions stay words (our choice).
    """
    options = ast.literal_eval(row["options"])
    detail = {"subset": re.sub(r"^[^_]*_|_\d+$", "", row["id"])}
    if row["question_type"] == "multiple-choice":
        asked = "\nAnswer with the option letter from the given choices directly."
        prompt = f"{row['question']}\n{_lettered(options)}{asked}"
        references = (row["answer"],)
        detail["choices"] = json.dumps(dict(zip(string.ascii_uppercase, options, strict=False)))
    else:
        prompt = f"{row['question']}{SHORT}"
        references = _listed(row["answer"])
    num_images = len(mmmu_images(row))
    for name in dict.fromkeys(_MMMU_IMAGE.findall(prompt)):
        first, rest = prompt.split(f"<{name}>", 1)
        prompt = first + IMAGE_MARKER + rest.replace(f"<{name}>", name)
    yield Item(prompt, references, row["id"], detail, num_images=num_images)


def mmmu_images(row: Row) -> tuple[str, ...]:
    """The columns of the images that a question and its options speak of, in that order."""
    # What follows the options is the same in all prompts and speaks of none.
    mentioned = _MMMU_IMAGE.findall(f"{row['question']}\n{row['options']}")
    return tuple(name.replace(" ", "_") for name in dict.fromkeys(mentioned))


def mathvista(row: Row) -> Iterator[Item]:
    """Columns pid, question, unit, choices, answer, precision, question_type, answer_type."""
    question = row["question"] + (f" (Unit: {row['unit']})" if row["unit"] else "")
    choices = list(row["choices"] or ())
    precision = int(row["precision"] or 0)
    if row["question_type"] == "multi_choice":
        hint = LETTER.strip()
    elif row["answer_type"] == "list":
        hint = "Answer the question using a Python list."
    elif row["answer_type"] == "integer":
        hint = "Answer the question using a single integer number."
    else:
        places = "one decimal place" if precision == 1 else "two decimal places"
        hint = f"Answer the question using a single floating-point number with {places}."
    lines = [question, *([_lettered(choices)] if choices else []), hint]
    detail = {"answer_type": row["answer_type"], "precision": str(precision)}
    if row["question_type"] == "multi_choice":
        detail["choices"] = json.dumps(choices)
    yield Item("\n".join(lines).strip(), (str(row["answer"]),), row["pid"], detail)


def mme(row: Row) -> Iterator[Item]:
    """Columns question_id (of the image), question, answer, category."""
    question = row["question"].strip().replace(" Please answer yes or no.", "")
    detail = {"subset": row["category"], "group_id": f"{row['category']}/{row['question_id']}"}
    yield Item(f"{question}{SHORT}", (row["answer"],), row["question_id"], detail)


def mmbench(row: Row) -> Iterator[Item]:
    """Columns index, question, hint, A to D, answer, category; what is missing is "nan"."""
    choices = {letter: row[letter] for letter in "ABCD" if _given(row[letter])}
    hint = f"{row['hint']} " if _given(row["hint"]) else ""
    listed = "\n".join(f"{letter}. {text}" for letter, text in choices.items())
    prompt = f"{hint}{row['question']} There are several options:\n{listed}\n{LETTER}"
    detail = {
        "group_id": str(row["index"] % NUM_ORDERS),
        "subset": row["category"],
        "choices": json.dumps(choices),
    }
    yield Item(prompt, (row["answer"],), row["index"], detail)


def seedbench(row: Row) -> Iterator[Item]:
    """Columns question_id, question, choice_a to choice_d, answer."""
    choices = [row[f"choice_{letter}"] for letter in "abcd"]
    prompt = f"{row['question']}\n{_lettered(choices)}{LETTER}"
    yield Item(prompt, (row["answer"],), row["question_id"])


def gqa(row: Row) -> Iterator[Item]:
    """Columns id, question, answer."""
    yield Item(f"{row['question']}{SHORT}", (row["answer"],), row["id"])


def pope(row: Row) -> Iterator[Item]:
    """Columns id, question, answer, category (the subset)."""
    prompt = f"{row['question'].strip()}{SHORT}"
    yield Item(prompt, (row["answer"],), row["id"], {"subset": row["category"]})


def vqav2(row: Row) -> Iterator[Item]:
    """Columns question_id, question, answers (structs with `answer`; none in the test split)."""
    references = tuple(given["answer"] for given in row["answers"] or ())
    yield Item(f"{row['question']}{SHORT}", references, row["question_id"])


def vizwiz(row: Row) -> Iterator[Item]:
    """Columns question_id, question, answers (none in the test split)."""
    unsure = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    prompt = f"{row['question'].capitalize()}{unsure}{SHORT}"
    yield Item(prompt, tuple(row["answers"] or ()), row["question_id"])


def textvqa(row: Row, *, with_ocr: bool = False) -> Iterator[Item]:
    """Columns question_id, question, answers, and ocr_tokens for `with_ocr`."""
    tokens = f"\nReference OCR token: {', '.join(row['ocr_tokens'])}" if with_ocr else ""
    prompt = f"{row['question'].capitalize()}{tokens}{SHORT}"
    yield Item(prompt, tuple(row["answers"] or ()), row["question_id"])


def chartqa(row: Row) -> Iterator[Item]:
    """Columns question, answer, type (human_test or augmented_test)."""
    part = "human" if row["type"] == "human_test" else "augmented"
    prompt = f"{row['question']}\nAnswer the question with a single word."
    yield Item(prompt, (row["answer"],), detail={"subset": part})


def docvqa(row: Row) -> Iterator[Item]:
    """Columns questionId, question, answers (none in the test split). InfographicVQA as well."""
    yield Item(f"{row['question']}{SHORT}", tuple(row["answers"] or ()), row["questionId"])


def ocrbench(row: Row) -> Iterator[Item]:
    """Columns dataset, question, question_type, answer (a list)."""
    references = (row["answer"],) if isinstance(row["answer"], str) else tuple(row["answer"])
    detail = {"subset": row["question_type"], "dataset": row["dataset"]}
    yield Item(row["question"].strip(), references, detail=detail)


def realworldqa(row: Row) -> Iterator[Item]:
    """Columns question, which says how to answer, and answer. As lmms-eval 0.7 asks it."""
    yield Item(row["question"].strip(), (row["answer"],))


def mmvp(row: Row) -> Iterator[Item]:
    """Columns Index (from 1), Question, Options "(a) … (b) …", Correct Answer "(a)" or "(b)".

    As lmms-eval 0.7 asks it. Two questions in a row make a pair.
    """
    index = row["Index"]
    prompt = f"{row['Question']}\n{_lettered(_MMVP_OPTION.findall(row['Options']))}{LETTER}"
    reference = row["Correct Answer"].strip().strip("()").upper()
    yield Item(prompt, (reference,), index, {"group_id": str((index - 1) // 2)})


def refcoco(row: Row) -> Iterator[Item]:
    """Columns question_id, answer (a list of expressions), bbox (x, y, width, height in pixels).

    One question an expression. The prompt is our own; boxes are `[x1, y1, x2, y2]` as shares of
    the image's width and height.
    """
    x, y, width, height = row["bbox"]
    try:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            w, h = image.size
    except (OSError, TypeError):
        references = ()  # it cannot be asked either: its image is found to be corrupt
    else:
        references = (format_box((x / w, y / h, (x + width) / w, (y + height) / h)),)
    for number, expression in enumerate(row["answer"]):
        prompt = (
            f"Where is {expression.strip()}?\nAnswer with its box as [x1, y1, x2, y2], the left, "
            "top, right and bottom edges as shares of the image's width and height."
        )
        yield Item(prompt, references, f"{row['question_id']}/{number}")


def _letter(index: int) -> str:
    return string.ascii_uppercase[index]


def _lettered(choices: Sequence[str]) -> str:
    return "\n".join(f"{_letter(index)}. {choice}" for index, choice in enumerate(choices))


def _given(value: str | None) -> bool:
    return bool(value) and value != "nan"


def _listed(answer: str) -> tuple[str, ...]:
    """Several reference answers, which are published as the text of a Python list.

    (lmms-eval compares with that very text, which no answer equals.)
    """
    if answer.startswith("["):
        return tuple(map(str, ast.literal_eval(answer)))
    return (answer,)
