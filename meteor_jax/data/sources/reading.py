"""The reading set: sparse pictures with handwritten digits, words, lists, charts and shapes.

Everything is generated from (seed, split, index): real handwritten digits (scikit-learn's, other
samples in train and test) and text in DejaVu on a light canvas. Nine tasks in three groups, each
scored with the metric of the public benchmark that asks the same.
"""

from __future__ import annotations

import dataclasses
import io
import random
import string
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds
from PIL import Image

from meteor_jax.data.sources import reading_canvas as draw
from meteor_jax.data.sources import reading_questions as questions
from meteor_jax.data.sources.records import RecordBuilder, TaskSpec
from meteor_jax.progress import track

SOURCE = "reading"
TASKS = (
    TaskSpec("reading_attribute", SOURCE, "knowledge", "exact_match"),
    TaskSpec("reading_existence", SOURCE, "general", "yes_no"),
    TaskSpec("reading_count", SOURCE, "general", "exact_match"),
    TaskSpec("reading_relation", SOURCE, "general", "exact_match"),
    TaskSpec("reading_digits", SOURCE, "reading", "exact_match"),
    TaskSpec("reading_digit", SOURCE, "reading", "exact_match"),
    TaskSpec("reading_word", SOURCE, "reading", "anls"),
    TaskSpec("reading_keyvalue", SOURCE, "reading", "anls"),
    TaskSpec("reading_chart", SOURCE, "reading", "relaxed_accuracy"),
)
DEFAULT_SIDE = 96
DEFAULT_IMAGES = {"train": 20_000, "test": 1_500}
MARGIN = 2  # pixels at the canvas's edge that stay empty
GAP = 2  # pixels between blocks, at least
MAX_QUESTIONS = 16  # an image's question ids start at this multiple of its own

# Scenes in turn: `shapes` alone; `lines` (digits, a word and shapes); a `list` or a `chart`, each
# with a word in one half of its pictures and digits in the other. So every split has the same mix.
SCENES = (
    *("lines", "list word", "lines", "chart digits", "lines"),
    *("shapes", "lines", "list digits", "lines", "chart word"),
)
COUNTS = {
    "shapes": {
        "reading_attribute": 2,
        "reading_existence": 2,
        "reading_count": 2,
        "reading_relation": 2,
    },
    "lines": {
        "reading_digits": 1,
        "reading_digit": 2,
        "reading_word": 1,
        "reading_attribute": 1,
        "reading_existence": 1,
        "reading_count": 1,
        "reading_relation": 1,
    },
    "list": {"reading_keyvalue": 4, "reading_digits": 1, "reading_digit": 1, "reading_word": 1},
    "chart": {"reading_chart": 4, "reading_digits": 1, "reading_digit": 1, "reading_word": 1},
}
GENERAL = ("reading_attribute", "reading_existence", "reading_count", "reading_relation")

_KEYS = """
age art bus cab cost date day door end fee fuel gate gym hall hour item jar kit lap lot map mile
net page park pay pin rate rent room row seat size sum tax time tip unit vat week
"""
_WORDS = """
able acid aged air also apple arch area arm army ash aunt away baby back bag bake ball band bank
barn base bath beach bean bear beat bed bell belt bench best bike bird black blade block blow blue
board boat body bone book boot born bowl box boy brain brave bread brick broom brown brush build
burn bush cake calm camel camp can candy cap car card care cash cat chain chair chalk cheek chess
chest child city clay clean clock cloth cloud club coach coal coast coat coin cold cook cool copy
corn cost couch cow crab cream crop crow crown cup dance dark data dawn deep deer desk dish dog
doll door dove draw dream dress drink drive drum duck dust eagle ear earth east easy edge egg
elbow face fair farm fast feet field fig film fire fish flag floor flour fog food foot fork fox
frame free frog fruit full game gate ghost gift girl glad glass globe glove goat gold good grape
grass green grid guest hair half hall hand happy hat heart help herb hill home honey hook horn
horse hotel house ice idea inch iron jam jar jeans jet job juice jump key kind king kite knee
knife lake lamb lamp land leaf leg lemon light lime line lion lip list lock long lunch magic mail
maple mark mask meal meat melon metal milk mint mix model money moon mouse mouth music nail name
neck nest net new night noise north nose note nurse nut oak ocean oil olive onion open oven owl
page paint pair palm pan paper park path peach pear pen phone piano pie pig pilot pink pipe pizza
plane plant plate plum pond pool post pot queen quick quiet radio rain ray red rice ring river
road robot rock roof room root rope rose salt sand scale sea seed shark sheep shelf ship shirt
shoe shop sky sleep small snow soap sock soft son song soup south spoon star steam steel stone
store storm sugar suit sun swan sweet table tail tall tea team tent test tiger time toast toe
tooth top tower toy track train tray tree truck tulip uncle van vase wagon walk wall warm watch
water wave west whale wheat wheel white wild wind wine wing wolf wood wool word world yard year
young zebra zoo
"""
KEYS = tuple(_KEYS.split())
WORDS = tuple(_WORDS.split())
LIST_WORDS = tuple(word for word in WORDS if len(word) <= 4 and word not in KEYS)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One generated image: its pixels, what is in it, what is asked (task, question, answer)."""

    image: Image.Image
    elements: tuple[draw.Element, ...]
    caption: str
    questions: tuple[questions.Question, ...]


def check_side(side: int) -> None:
    """Raises ValueError for a canvas outside 96 to 128 pixels."""
    if not 96 <= side <= 128:
        raise ValueError(f"{SOURCE}: canvas_side must be 96 to 128 pixels, got {side}.")


def make_picture(index: int, *, split: str, seed: int = 0, side: int = DEFAULT_SIDE) -> Picture:
    """The split's picture number `index`; the same for the same arguments, wherever it runs."""
    rng = random.Random(f"{seed}/{split}/{index}")
    scene, _, line = SCENES[index % len(SCENES)].partition(" ")
    canvas = Image.new("RGB", (side, side), (rng.randint(238, 255),) * 3)
    counts = dict(COUNTS[scene])
    if scene == "shapes":
        elements = _scatter(rng, canvas)
    else:
        if scene == "lines":
            count = rng.randint(1, 3)
            shapes = [_shape(rng, rng.randint(17, 21)) for _ in range(count)]
            row = draw.row_block(rng, shapes, max_width=side - 2 * MARGIN)
            blocks = [row, _word(rng), _digits(rng, split)]
        else:
            main = _list(rng, side) if scene == "list" else _chart(rng)
            blocks = [main, _word(rng) if line == "word" else _digits(rng, split)]
            counts |= dict.fromkeys(rng.sample(GENERAL, 2), 1)
        elements = _stack(rng, canvas, blocks)
    asked = questions.ask(rng, elements, side=side, keys=KEYS, words=WORDS, counts=counts)
    caption = questions.caption(rng, elements, side)
    return Picture(canvas, tuple(elements), caption, tuple(asked))


def make_page(index: int, *, split: str, seed: int = 0, side: int = DEFAULT_SIDE) -> Picture:
    """A picture full of rows of random letters, digits and shapes; nothing is asked about it."""
    rng = random.Random(f"page {seed}/{split}/{index}")
    canvas = Image.new("RGB", (side, side), (rng.randint(238, 255),) * 3)
    room, blocks, height = side - 2 * MARGIN, [], 0
    while True:
        block = _page_row(rng, room, split)
        if height + block.height > room:
            break
        blocks.append(block)
        height += block.height + GAP
    elements = _stack(rng, canvas, blocks)
    return Picture(canvas, tuple(elements), questions.caption(rng, elements, side), ())


def _page_row(rng: random.Random, room: int, split: str) -> draw.Block:
    kind = rng.choice(("large", "large", "small", "digits", "shapes"))
    if kind == "digits":
        return draw.digits_block(rng, "".join(rng.choices(string.digits, k=4)), split=split)
    if kind == "shapes":
        shapes = [_shape(rng, rng.randint(17, 21)) for _ in range(3)]
        return draw.row_block(rng, shapes, max_width=room)
    size = rng.randint(18, 22) if kind == "large" else rng.randint(11, 15)
    symbols = string.ascii_lowercase + string.digits * (kind == "small")
    text = "".join(rng.choices(symbols, k=16))
    return draw.text_block(rng, text, _color(rng), size=size, max_width=room)


def _scatter(rng: random.Random, canvas: Image.Image) -> list[draw.Element]:
    """Two to five shapes of few colours and kinds, each in its own cell of a 3×3 grid."""
    cell = canvas.width // 3
    colors, kinds = rng.sample(list(draw.COLORS), 3), rng.sample(draw.SHAPES, 3)
    elements = []
    for place in rng.sample(range(9), rng.randint(2, 5)):
        size = rng.randint(18, 26)
        block = draw.shape_block(rng.choice(kinds), rng.choice(colors), size)
        x, y = (cell * i + rng.randint(1, cell - size - 1) for i in (place % 3, place // 3))
        elements += draw.place(canvas, block, x, y)
    return elements


def _stack(rng: random.Random, canvas: Image.Image, blocks: list[draw.Block]) -> list[draw.Element]:
    """The blocks one above the other in random order, the free space shared out at random."""
    rng.shuffle(blocks)
    gaps = GAP * (len(blocks) - 1)
    free = canvas.height - 2 * MARGIN - gaps - sum(block.height for block in blocks)
    cuts = sorted(rng.randint(0, free) for _ in blocks)
    elements, y, used = [], MARGIN, 0
    for block, cut in zip(blocks, cuts, strict=True):
        y, used = y + cut - used, cut
        x = rng.randint(MARGIN, canvas.width - MARGIN - block.width)
        elements += draw.place(canvas, block, x, y)
        y += block.height + GAP
    return elements


def _color(rng: random.Random) -> str:
    return rng.choice(list(draw.COLORS))


def _shape(rng: random.Random, size: int) -> draw.Block:
    return draw.shape_block(rng.choice(draw.SHAPES), _color(rng), size)


def _word(rng: random.Random) -> draw.Block:
    return draw.word_block(rng, rng.choice(WORDS), _color(rng))


def _digits(rng: random.Random, split: str) -> draw.Block:
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 4)))
    return draw.digits_block(rng, digits, split=split)


def _list(rng: random.Random, side: int) -> draw.Block:
    """Three or four lines; keys and values each occur once. A third of the values are words."""
    keys = rng.sample(KEYS, rng.randint(3, 4))
    numbers = map(str, rng.sample(range(10, 1000), len(keys)))
    words = rng.sample(LIST_WORDS, len(keys))
    values = [
        word if rng.random() < 1 / 3 else number
        for word, number in zip(words, numbers, strict=True)
    ]
    lines = tuple(zip(keys, values, strict=True))
    return draw.list_block(rng, lines, _color(rng), max_width=side - 2 * MARGIN)


def _chart(rng: random.Random) -> draw.Block:
    count = rng.randint(3, 5)
    letters = sorted(rng.sample(draw.BAR_LETTERS, count))
    colors = rng.sample(list(draw.COLORS), count)
    values = [rng.randint(1, 9) for _ in letters]
    return draw.chart_block(tuple(zip(letters, values, colors, strict=True)))


@dataclasses.dataclass
class ReadingConfig(tfds.core.BuilderConfig):
    """One split at one size; its name is the folder, so that different sets lie side by side."""

    split: str = "train"
    num_images: int = 0
    seed: int = 0
    canvas_side: int = DEFAULT_SIDE

    @classmethod
    def make(
        cls, *, split: str, num_images: int | None, seed: int, canvas_side: int
    ) -> ReadingConfig:
        """Raises ValueError if the canvas is outside 96 to 128 pixels."""
        check_side(canvas_side)
        num_images = num_images or DEFAULT_IMAGES[split]
        return cls(
            name=f"{split}{num_images}_side{canvas_side}_seed{seed}",
            split=split,
            num_images=num_images,
            seed=seed,
            canvas_side=canvas_side,
        )


class Reading(RecordBuilder):
    """Generates the one split that its config names."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.1.0": "Captions in random order."}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing to download
        return {self.builder_config.split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for index in track(range(config.num_images), f"Generating {SOURCE} {config.split}"):
            picture = make_picture(
                index, split=config.split, seed=config.seed, side=config.canvas_side
            )
            encoded = io.BytesIO()
            picture.image.save(encoded, "png", compress_level=1)
            yield (
                index,
                {
                    "image": encoded.getvalue(),
                    "caption": picture.caption,
                    "image_id": index,
                    "qa": [
                        {
                            "task": task,
                            "question": question,
                            "answer": answer,
                            "question_id": index * MAX_QUESTIONS + i,
                        }
                        for i, (task, question, answer) in enumerate(picture.questions)
                    ],
                },
            )
