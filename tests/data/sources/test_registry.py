"""The sources: what is in a record, that it is true, and that building it is repeatable."""

import collections
import io
import pickle
import random

import numpy as np
import pytest
from PIL import Image

from meteor_jax.data.sources import easy_vqa, reading, reading_canvas, reading_questions
from meteor_jax.data.sources import registry as sources

NUM_PICTURES = 400


@pytest.fixture(scope="module")
def pictures():
    return [reading.make_picture(i, split="test") for i in range(NUM_PICTURES)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def easy(data_dir):
    return {split: sources.open_source("easy-vqa", split=split, data_dir=data_dir)
            for split in ("train", "test")}  # fmt: skip


def encode(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def from_caption(caption: str) -> list[dict]:
    """The elements that a caption tells of, parsed back from its words."""
    elements = []
    for part in caption.split("; "):
        text, _, place = part.rpartition(" at ")
        words = text.split()
        if words[0] == "digits":
            elements.append({"kind": "digits", "content": words[1]})
        elif words[0] == "chart":
            bars = [bar.split() for bar in text.removeprefix("chart ").split(", ")]
            elements.append({"kind": "chart", "content": {b: (v, c) for b, c, v in bars}})
        elif words[1] == "list":
            lines = dict(line.split(": ") for line in text.split(" list ")[1].split(", "))
            elements.append({"kind": "list", "color": words[0], "content": lines})
        elif words[1] == "word":
            elements.append({"kind": "word", "color": words[0], "content": words[2]})
        else:
            elements.append({"kind": words[1], "color": words[0], "shape": True})
        elements[-1]["place"] = place
    return elements


def answer_from(elements: list[dict], question: str) -> str:
    """Answers every question but a relation, by other code than that which asked it."""
    words = question.rstrip("?").split()
    shapes = [element for element in elements if "shape" in element]
    of = {element["kind"]: element.get("content") for element in elements}
    start = " ".join(words[:3])
    if start == "what color is" and words[3] == "bar":
        return of["chart"][words[4]][1]
    if start == "what color is":
        (color,) = [e["color"] for e in elements if e["kind"] == words[-1]]
        return color
    if start == "what shape is":
        place = question.rstrip("?").partition(" at ")[2]
        (kind,) = [e["kind"] for e in shapes
                   if (e["place"] == place if place else e["color"] == words[-1])]  # fmt: skip
        return kind
    if start == "how many shapes" and words[3] == "are" and words[4] != "there":
        return str(sum(e["color"] == words[4] for e in shapes))
    if start == "how many shapes":
        return str(len(shapes))
    if words[:2] == ["how", "many"] and words[2] in ("digits", "letters", "lines", "bars"):
        kind = {"letters": "word", "lines": "list", "bars": "chart"}.get(words[2], words[2])
        return str(len(of[kind]))
    if words[:2] == ["how", "many"]:
        return str(sum(words[2] in (e["kind"] + "s", e["kind"] + "es") for e in shapes))
    if start == "is the word":
        return "yes" if of["word"] == words[3] else "no"
    if words[-3:] == ["on", "the", "list"]:
        return "yes" if words[1] in of["list"] else "no"
    if words[:4] == ["is", "there", "a", "digit"]:
        return "yes" if words[4] in of["digits"] else "no"
    if words[:4] == ["is", "there", "a", "bar"]:
        return "yes" if words[4] in of["chart"] else "no"
    if words[:2] == ["is", "there"]:
        return "yes" if (words[3], words[4]) in {(e["color"], e["kind"]) for e in shapes} else "no"
    if question == "what are the digits?":
        return of["digits"]
    if words[-1] == "digit":
        return of["digits"][reading_questions.ORDINALS.index(words[3])]
    if question == "what is the word?":
        return of["word"]
    if words[-2] == "bar":
        return of["chart"][words[-1]][0]
    if question.startswith("what is the value of"):
        return of["list"][words[-1]]
    if question.startswith("what has the value"):
        return {value: key for key, value in of["list"].items()}[words[-1]]
    raise AssertionError(question)


def test_captions_hold_every_answer(pictures):
    for picture in pictures:
        elements = from_caption(picture.caption)
        assert len(elements) == len(picture.elements)
        for task, question, answer in picture.questions:
            if task != "reading_relation":
                assert answer_from(elements, question) == answer, (question, picture.caption)


def test_captions_are_not_in_reading_order(pictures):
    firsts = {"top": 0, "rest": 0}
    for picture in pictures:
        tops = [element.box[1] for element in picture.elements]
        if len(set(tops)) > 1:
            first = from_caption(picture.caption)[0]["place"]
            highest = min(picture.elements, key=lambda element: element.box[1])
            side = picture.image.width
            is_top = first == reading_questions.place_name(highest, side)
            firsts["top" if is_top else "rest"] += 1
    assert min(firsts.values()) > 0.2 * len(pictures)


def test_relations_follow_the_boxes(pictures):
    places = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
    for picture in pictures:
        named = {element.name: element for element in picture.elements}
        for task, question, answer in picture.questions:
            if task != "reading_relation":
                continue
            if question.startswith("where"):
                one, other = question.rstrip("?").split(" the ", 1)[1].split(" relative to the ")
                side = answer
            else:
                side, one = question.split()[2], answer
                other = question.rstrip("?").split("the ")[1]
            axis, sign = places[side]
            assert sign * (named[one].center[axis] - named[other].center[axis]) > 0, question


def test_what_is_drawn_is_where_the_elements_are(pictures):
    for picture in pictures[:40]:
        pixels = np.asarray(picture.image)
        background = pixels[0, 0] if (pixels[0, 0] > 230).all() else pixels[-1, 0]
        painted = (pixels != background).any(-1)
        for element in picture.elements:
            left, top, right, bottom = element.box
            assert 0 <= left < right <= pixels.shape[1]
            assert 0 <= top < bottom <= pixels.shape[0]
            assert painted[top:bottom, left:right].mean() > 0.05
            painted[top:bottom, left:right] = False
        assert not painted.any()  # nothing was drawn outside


def test_every_task_is_asked_enough(pictures):
    counts = collections.Counter(task for p in pictures for task, _, _ in p.questions)
    assert set(counts) == {task.name for task in reading.TASKS}
    assert min(counts.values()) * reading.DEFAULT_IMAGES["test"] / NUM_PICTURES >= 1000
    assert all(5 <= len(p.questions) <= 8 for p in pictures)
    assert {task.group for task in reading.TASKS} == {"knowledge", "general", "reading"}


def test_no_picture_asks_one_thing_twice(pictures):
    for picture in pictures:
        asked = [question for _, question, _ in picture.questions]
        assert len(set(asked)) == len(asked)


def test_yes_and_no_are_balanced_whatever_is_asked():
    answers = collections.defaultdict(list)
    for i in range(1000):
        for task, question, answer in reading.make_picture(i, split="test").questions:
            if task == "reading_existence":
                about = " ".join(question.rstrip("?").split()[:4])
                answers["list" if question.endswith("list?") else about].append(answer == "yes")
    everything = [said for some in answers.values() for said in some]
    assert abs(np.mean(everything) - 0.5) < 0.04
    for about in ("is there a digit", "is there a bar", "list"):
        assert abs(np.mean(answers[about]) - 0.5) < 4 * 0.5 / len(answers[about]) ** 0.5


def test_digit_samples_of_train_and_test_are_disjoint():
    train, test = (
        {sample for samples in reading_canvas.digit_samples(split) for sample in samples}
        for split in ("train", "test")
    )
    assert not train & test
    assert len(train | test) == 1797
    assert min(map(len, reading_canvas.digit_samples("test"))) >= 20


def test_a_seed_gives_the_same_picture_and_another_seed_another():
    one, again = (reading.make_picture(7, split="train", seed=3) for _ in range(2))
    reading.make_picture(8, split="train", seed=3)
    assert one.image.tobytes() == again.image.tobytes()
    assert (one.caption, one.questions) == (again.caption, again.questions)
    for other in ({"seed": 4, "split": "train"}, {"seed": 3, "split": "test"}):
        assert reading.make_picture(7, **other).caption != one.caption


def test_scenes_fit_every_canvas():
    for side in (96, 128):
        for i in range(300):
            picture = reading.make_picture(i, split="train", seed=1, side=side)
            assert picture.image.size == (side, side)


def test_words_are_distinct_and_short():
    assert len(set(reading.WORDS)) == len(reading.WORDS) >= 300
    assert all(3 <= len(word) <= 5 for word in reading.WORDS)
    assert len(set(reading.KEYS)) == len(reading.KEYS)


def test_reading_goes_to_disk_and_back(data_dir):
    source = sources.open_source("reading", split="test", data_dir=data_dir, num_images=12, seed=5)
    assert len(source) == 12
    assert sorted(record["image_id"] for record in source) == list(range(12))
    record = source[0]
    picture = reading.make_picture(record["image_id"], split="test", seed=5)
    assert record["caption"] == picture.caption
    assert [(q["task"], q["question"], q["answer"]) for q in record["qa"]] == list(
        picture.questions
    )
    decoded = sources.decode_image(record["image"], size=96)
    np.testing.assert_array_equal(decoded, np.asarray(picture.image))
    ids = [q["question_id"] for record in source for q in record["qa"]]
    assert len(set(ids)) == len(ids)
    with pytest.raises(IndexError):
        source[12]


def test_a_source_is_pickled_and_reused(data_dir, monkeypatch):
    args = {"split": "train", "data_dir": data_dir, "num_images": 6}
    source = sources.open_source("reading", **args)
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    # It is built already: a second opening draws nothing. Another seed is another set.
    monkeypatch.setattr(reading, "make_picture", None)
    assert sources.open_source("reading", **args)[3] == source[3]
    with pytest.raises(TypeError):
        sources.open_source("reading", **args, seed=1)
    assert not list(data_dir.glob(f"reading/train6_side96_seed1/{reading.Reading.VERSION}"))


def test_easy_vqa_is_whole(easy):
    assert {split: len(source) for split, source in easy.items()} == {"train": 4000, "test": 1000}
    questions = {
        split: [item for record in source for item in record["qa"]]
        for split, source in easy.items()
    }
    assert {split: len(qa) for split, qa in questions.items()} == {"train": 38575, "test": 9673}
    assert len({item["answer"] for item in questions["train"]}) == 13
    for item in questions["test"]:
        assert (item["task"] == "easyvqa_yesno") == (item["answer"] in ("yes", "no"))
    assert len({item["question_id"] for item in questions["test"]}) == 9673


def test_easy_vqa_captions_agree_with_the_answers(easy):
    complete = 0
    for record in easy["test"]:
        words = set(record["caption"].split())
        complete += len(words) == 2 and "shape" not in words
        for item in record["qa"]:
            if item["task"] == "easyvqa_attribute":
                assert item["answer"] in words
            else:
                asked = item["question"].rstrip("?").split()
                (named,) = (easy_vqa.COLORS | easy_vqa.SHAPES).intersection(asked)
                negated = bool({"no", "not"}.intersection(asked))
                if named in words:
                    assert (item["answer"] == "yes") != negated
                else:
                    assert (item["answer"] == "no") != negated or not known(named, words)
    assert complete > 850


def known(name: str, words: set[str]) -> bool:
    options = easy_vqa.COLORS if name in easy_vqa.COLORS else easy_vqa.SHAPES
    return bool(words & options)


def test_easy_vqa_caption_says_only_what_is_known():
    assert easy_vqa.caption([("what color is the shape?", "teal")]) == "teal shape"
    assert easy_vqa.caption([("is there not a circle?", "no")]) == "circle"
    assert easy_vqa.caption([("is there a red shape?", "no")]) == "shape"
    denied = [("is there a circle?", "no"), ("is no triangle present?", "yes")]
    assert easy_vqa.caption(denied) == "rectangle"


def test_chance_level_is_the_commonest_answer(easy, data_dir):
    assert sources.chance_level("easyvqa_yesno", easy["test"]) == pytest.approx(0.5, abs=0.02)
    assert sources.chance_level("easyvqa_attribute", easy["test"]) < 0.2
    source = sources.open_source("reading", split="test", data_dir=data_dir, num_images=12, seed=5)
    with pytest.raises(ValueError, match="no question of task 'easyvqa_yesno'"):
        sources.chance_level("easyvqa_yesno", source)


def test_chance_is_low_for_every_reading_task(pictures):
    for task in reading.TASKS:
        answers = collections.Counter(
            a for p in pictures for name, _, a in p.questions if name == task.name
        )
        limit = 0.58 if task.metric == "yes_no" else 0.4
        assert answers.most_common(1)[0][1] / answers.total() < limit, task.name


def test_first_images_of_easy_vqa(easy, data_dir):
    few = sources.open_source("easy-vqa", split="test", data_dir=data_dir, num_images=5)
    assert [record["image_id"] for record in few] == [easy["test"][i]["image_id"] for i in range(5)]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("easyvqa", {}, "no data source 'easyvqa'. Did you mean 'easy-vqa'?"),
        ("reading", {"split": "tset"}, "no split 'tset' of 'reading'. Did you mean 'test'?"),
        ("reading", {"num_images": 0}, "num_images must be at least 1, got 0"),
        ("reading", {"canvas_side": 64}, "canvas_side must be 96 to 128 pixels, got 64"),
        ("easy-vqa", {"num_images": 1001}, "has 1000 images; num_images asks 1001"),
    ],
)
def test_wrong_arguments_end_in_one_line(easy, data_dir, name, kwargs, message):
    with pytest.raises(ValueError) as error:
        sources.open_source(name, **({"split": "test", "data_dir": data_dir} | kwargs))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_decode_pads_to_a_square_and_resizes():
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    pixels = sources.decode_image(encode(wide), size=80)
    assert (pixels.shape, pixels.dtype) == ((80, 80, 3), np.uint8)
    np.testing.assert_array_equal(pixels[0, 0], sources.PAD_COLOR)
    np.testing.assert_array_equal(pixels[40, 40], (255, 0, 0))
    gray = sources.decode_image(encode(Image.new("L", (8, 8), 9)), size=8)
    np.testing.assert_array_equal(gray, np.full((8, 8, 3), 9))


def test_corrupt_images_are_found():
    rng = random.Random(0)
    whole = encode(Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    for damaged in (b"", b"not an image", whole[:20], whole[: len(whole) // 2], bytes(flipped)):
        with pytest.raises(sources.CorruptImage, match="cannot decode an image of") as error:
            sources.decode_image(damaged, size=32)
        assert "\n" not in str(error.value)
