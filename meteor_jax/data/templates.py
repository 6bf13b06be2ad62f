"""Conversations to token ids and labels, in the layouts that EAGLE was trained with.

The strings are those of LLaVA and EAGLE (NVlabs/EAGLE, `conversation.py`); `qa` is a short one for
small models. Labels are built from pieces instead of by counting tokens again afterwards, so a
mask cannot slip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meteor_jax.config import suggest
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN

IMAGE_MARKER = "<image>"
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """How turns are written. `{q}` and `{a}` stand for the question and the answer.

    Fields:
        opening: stands once, before the first turn.
        question, answer: one turn; only the answer and what ends it are supervised.
        end: the special token that ends an answer (the tokenizer's EOS where it does not know
            this one), or None where nothing but the answer's own text does.
        image: what an image adds at the start of the first question.
        special: names in `opening` and `question` that are one token each, where the tokenizer
            has them; plain text otherwise.
        keeps_question: False where only the images of a question are kept.
    """

    opening: str
    question: str
    answer: str
    end: str | None = "</s>"
    image: str = IMAGE_MARKER + "\n"
    special: tuple[str, ...] = ()
    keeps_question: bool = True


TEMPLATES = {
    # Captions, for the first stage. EAGLE ends them with a line break and no EOS.
    "plain": Template("", "{q}", "{a}\n", end=None, image=IMAGE_MARKER, keeps_question=False),
    # The same closed by EOS, so that generating a caption stops.
    "plain_eos": Template("", "{q}", "{a}", image=IMAGE_MARKER, keeps_question=False),
    "vicuna_v1": Template(_SYSTEM + " ", "USER: {q} ASSISTANT:", " {a}"),
    "llama3": Template(
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{_SYSTEM}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{a}",
        end="<|eot_id|>",
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "yi": Template(
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>user\n{q}<|im_end|><|im_start|>assistant\n",
        "{a}",
        end="<|im_end|>",
        special=("<|im_start|>", "<|im_end|>"),
    ),
    "qa": Template("", "{q}:", " {a}", image=IMAGE_MARKER),
}


@dataclass(frozen=True)
class Conversation:
    """Turns of (question, answer). The last answer may be None: a prompt to be continued."""

    turns: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Rendered:
    """Ids with `IMAGE_TOKEN` at each image's place, labels and segments as in `Batch`."""

    tokens: list[int]
    labels: list[int]
    segment_ids: list[int] | None = None

    @property
    def num_images(self) -> int:
        return self.tokens.count(IMAGE_TOKEN)


def get_template(name: str) -> Template:
    """Raises: ValueError naming the nearest template."""
    if name not in TEMPLATES:
        raise ValueError(f"template: no such template '{name}'.{suggest(name, TEMPLATES)}")
    return TEMPLATES[name]


def with_images(question: str, num_images: int, *, template: Template) -> str:
    """A conversation's first question, with one marker an image at its start."""
    return template.image * num_images + question


def stop_id(template: Template, tokenizer: Tokenizer) -> int:
    """The id at which generation stops: what ends an answer, else the tokenizer's EOS."""
    known = tokenizer.special_id(template.end) if template.end else None
    return tokenizer.eos_id if known is None else known


def render(conversation: Conversation, *, template: Template, tokenizer: Tokenizer) -> Rendered:
    """Writes a conversation as ids and labels.

    Every `<image>` in a question becomes one `IMAGE_TOKEN`, and the text between images is
    tokenized chunk by chunk, as EAGLE does. A prompt (last answer None) ends exactly where the
    answer begins, and its ids are those that a training example has up to there.

    The answer is tokenized apart from its question. For tokenizers that never merge across a
    space (sentencepiece with LLaMA's settings, byte-level BPE) and the templates `vicuna_v1` and
    `qa` this gives the ids of tokenizing the whole text, as it does for the `plain` ones. For
    `llama3` and `yi`, whose answers follow a line break, it does so unless the answer itself
    begins with white space. Text that looks like a special token stays text.

    Raises:
        ValueError: no turns, an answer missing before the last turn, or several turns in a
            template that drops the questions.
    """
    turns = conversation.turns
    if not turns:
        raise ValueError("conversation: expected at least one turn, got none.")
    if any(answer is None for _, answer in turns[:-1]):
        raise ValueError("conversation: only the last turn's answer may be missing.")
    if len(turns) > 1 and not template.keeps_question:
        raise ValueError(
            f"conversation: this template drops questions and takes one turn, got {len(turns)}."
        )
    tokens, labels = [], []
    for index, (question, answer) in enumerate(turns):
        turn = render_turn(
            question, answer, first=index == 0, template=template, tokenizer=tokenizer
        )
        tokens += turn.tokens
        labels += turn.labels
    return Rendered(tokens, labels)


def render_turn(
    question: str, answer: str | None, *, first: bool, template: Template, tokenizer: Tokenizer
) -> Rendered:
    """One turn; the first brings BOS and the opening. Turns joined are the conversation."""
    tokens = _question_tokens(question, first=first, template=template, tokenizer=tokenizer)
    labels = [IGNORE_LABEL] * len(tokens)
    if answer is not None:
        # Where the question leaves no text behind (`plain`), the answer begins a chunk.
        after = "text" if template.keeps_question else "start"
        supervised = tokenizer.encode(template.answer.replace("{a}", answer), after=after)
        if template.end is not None:
            supervised.append(stop_id(template, tokenizer))
        tokens, labels = tokens + supervised, labels + supervised
    return Rendered(tokens, labels)


def _question_tokens(
    question: str, *, first: bool, template: Template, tokenizer: Tokenizer
) -> list[int]:
    if not template.keeps_question:
        question = IMAGE_MARKER * question.count(IMAGE_MARKER)
    tokens = tokenizer.encode("", bos=True) if first else []
    after = "start" if first else "special"
    layout = template.opening + template.question if first else template.question
    for part in _split(layout, template.special):
        special = tokenizer.special_id(part) if part in template.special else None
        if special is not None:
            tokens.append(special)
            after = "special"
            continue
        for index, chunk in enumerate(part.replace("{q}", question).split(IMAGE_MARKER)):
            if index:
                tokens.append(IMAGE_TOKEN)
                after = "start"
            if chunk:
                tokens += tokenizer.encode(chunk, after=after)
                after = "text"
    return tokens


def _split(layout: str, special: tuple[str, ...]) -> list[str]:
    """The layout cut at its special names, names included."""
    if not special:
        return [layout]
    return [part for part in re.split(f"({'|'.join(map(re.escape, special))})", layout) if part]
