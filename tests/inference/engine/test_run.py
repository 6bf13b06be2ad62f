import jax
import numpy as np
import pytest

from meteor_jax.config import ConfigError
from meteor_jax.data.sources.registry import decode_image
from meteor_jax.data.templates import get_template
from meteor_jax.inference.engine.batching import BatchSizes, make_schedule
from meteor_jax.inference.engine.data_shards import ROWS, Lanes
from meteor_jax.inference.engine.predictor import Rows as PromptRows
from meteor_jax.inference.engine.prompts import Room, make_ask, place_images
from meteor_jax.inference.engine.run import Timings, answer_prompts, look_up, prefetch
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.types import IMAGE_TOKEN, VisualTokens
from tests.evaluation.fakes import ROOM, SIZE, TOKENIZER, FakeAnswerer, ask_of, make_questions, png


def asks_of(questions):
    return [ask_of(q.question, images=((*q.image, 0),)) for q in questions]


def ask(sources, asks, *, images=4, batch=4, group=8, lanes=None):
    """By prompt, what is said, the tokens kept, and whether an image was unreadable."""
    answerer, seconds, said, lanes = FakeAnswerer(), Timings(), {}, lanes or Lanes()
    sizes = BatchSizes(images=images, questions=batch, group=group)
    for answered in answer_prompts(
        asks,
        answerer,
        schedule=make_schedule(asks, sizes=sizes, lanes=lanes.count),
        read_image=lambda key: sources[key[0]][key[1]]["image"],
        decode_image=lambda encoded: decode_image(encoded, size=SIZE),
        image_size=SIZE,
        seconds=seconds,
        lanes=lanes,
    ):
        for row, index in enumerate(answered.index.tolist()):
            assert index not in said
            text = TOKENIZER.decode(answered.tokens[row, : answered.num_tokens[row]]).strip()
            kept = tuple(int(cut[row]) for cut in answered.kept)
            said[index] = (text, kept, bool(answered.unreadable[row]))
    assert seconds.wall > seconds.model > 0 and seconds.host > 0
    return [said[index] for index in range(len(asks))], answerer


def expected(questions, asks, *, corrupt=()):
    return [
        ("0", (0, len(a.tokens)), True)
        if q.record in corrupt
        else (q.answer, (q.record, len(a.tokens)), False)
        for q, a in zip(questions, asks, strict=True)
    ]


def test_every_prompt_is_asked_and_every_image_encoded_once():
    sources, questions = make_questions(20)
    asks = asks_of(questions)
    answers, answerer = ask(sources, asks)
    assert answers == expected(questions, asks)
    seen = [grey for grey in answerer.encoded if grey]  # grey 0 is also what fills up a batch
    assert sorted(seen) == [10 * i for i in range(1, 20)]


def test_a_few_static_shapes():
    sources, questions = make_questions(21)
    asks = asks_of(questions)
    _, answerer = ask(sources, asks)
    assert len({shape for shape in answerer.shapes if shape[0] == "encode"}) == 1
    shapes = sorted(shape[2] for shape in answerer.shapes if shape[0] == "answer")
    assert shapes == [(4, 16), (4, 32), (4, 64)]
    for prompt in asks:
        assert prompt.shape.prompt_length / 2 < len(prompt.tokens) <= prompt.shape.prompt_length


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("images", "group"), [(1, 1), (3, 5), (16, 64)])
def test_batch_sizes_do_not_change_answers(batch, images, group):
    sources, questions = make_questions(11)
    asks = asks_of(questions)
    answers, _ = ask(sources, asks, images=images, batch=batch, group=group)
    assert answers == expected(questions, asks)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_lanes_of_a_mesh_give_the_same_answers(axes):
    sources, questions = make_questions(25, corrupt=(3, 24))
    asks = asks_of(questions)
    lanes = Lanes(make_mesh(MeshConfig(**axes)))
    assert lanes.count == axes["data"] * axes.get("fsdp", 1)
    answers, answerer = ask(sources, asks, images=8, batch=16, group=16, lanes=lanes)
    assert answers == expected(questions, asks, corrupt=(3, 24))
    assert sorted(grey for grey in answerer.encoded if grey) == [
        10 * i for i in range(1, 24) if i != 3
    ]


def test_images_are_looked_up_without_leaving_their_lane():
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, ROWS)
        place = jax.ShapeDtypeStruct((8, 4, 6), np.int32, sharding=split)
        group = VisualTokens(
            x=jax.ShapeDtypeStruct((8, 4, 6, 5), np.float32, sharding=split),
            encoder=place,
            patch_index=place,
            position=place,
            span=6,
        )
        slot = jax.ShapeDtypeStruct((8, 3, 1), np.int32, sharding=split)
        row = jax.ShapeDtypeStruct((8, 3, 16), np.int32, sharding=split)
        program = look_up.lower(group, slot, PromptRows(row, row, slot)).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


def test_a_corrupt_image_is_told_and_not_dropped():
    sources, questions = make_questions(9, corrupt=(2, 8))
    asks = asks_of(questions)
    answers, _ = ask(sources, asks)
    assert answers == expected(questions, asks, corrupt=(2, 8))


def test_a_group_of_nothing_but_corrupt_images():
    sources, questions = make_questions(6, corrupt=(0, 1, 2))
    asks = asks_of(questions)
    assert ask(sources, asks, images=3, group=3)[0] == expected(questions, asks, corrupt=(0, 1, 2))


def test_prompts_of_several_images_and_of_none():
    sources = {"many": [{"image": png(10 * i)} for i in range(8)]}
    keys = [("many", i, 0) for i in range(8)]
    counts = [0, 3, 1, 2, 0, 1, 3, 0]
    asks = [ask_of("sum?", images=keys[:count]) for count in counts]
    answers, answerer = ask(sources, asks, images=2, batch=2, group=2)
    assert [int(text) for text, *_ in answers] == [sum(range(count)) * 10 for count in counts]
    assert {shape[1][1] for shape in answerer.shapes if shape[0] == "answer"} == {1, 2, 3}
    sources["many"][1]["image"] = b"no image"
    unreadable = [bad for *_, bad in ask(sources, asks, images=2, batch=2, group=2)[0]]
    assert unreadable == [count > 1 for count in counts]


def test_nothing_to_ask():
    schedule = make_schedule([], sizes=BatchSizes(2, 2, 2))
    assert schedule.groups == ()


def test_answers_of_each_task_have_their_own_length():
    asks = [ask_of("how long?", max_new_tokens=length) for length in (4, 16, 4)]
    schedule = make_schedule(asks, sizes=BatchSizes(images=1, questions=2, group=2))
    steps = [step for group in schedule.groups for step in group.steps]
    asked = {
        length: sorted(
            index
            for step in steps
            if step.shape.max_new_tokens == length
            for index in step.asked[step.counts].tolist()
        )
        for length in (4, 16)
    }
    assert asked == {4: [0, 2], 16: [1]}


def test_images_that_find_no_room_are_left_out_with_their_marks():
    room = Room(lengths=(16, 64), positions=140, image_positions=30)
    asked = make_ask(
        "<image>, <image> or <image>?",
        images=("a", "b", "c"),
        max_new_tokens=8,
        template=get_template("qa"),
        tokenizer=TOKENIZER,
        room=room,
    )
    assert asked.images == ("a", "b", "c") and asked.shape.prompt_length == 16
    asked = make_ask(
        "<image>, <image> or <image>?" + "!" * 40,
        images=("a", "b", "c"),
        max_new_tokens=8,
        template=get_template("qa"),
        tokenizer=TOKENIZER,
        room=room,
    )
    assert asked.images == ("a", "b") and asked.tokens.count(IMAGE_TOKEN) == 2


def test_a_prompt_without_room_is_one_line():
    with pytest.raises(ConfigError, match="takes 82 tokens, and there is room for 64") as caught:
        ask_of("x" * 80)
    assert "\n" not in str(caught.value)
    assert ROOM.lengths[-1] == 64


@pytest.mark.parametrize(
    ("question", "count", "placed"),
    [
        ("what?", 0, "what?"),
        ("what?", 2, "<image>\n<image>\nwhat?"),
        ("of <image> and <image>?", 2, "of <image> and <image>?"),
        ("of <image> and <image>?", 1, "of <image> and ?"),
        ("of <image>?", 2, "<image>\nof <image>?"),
        ("of <image>?", 0, "of ?"),
    ],
)
def test_every_image_has_one_place(question, count, placed):
    assert place_images(question, count, template=get_template("vicuna_v1")) == placed


def test_prefetch_keeps_order_and_raises_what_the_maker_raises():
    assert list(prefetch(range(20), depth=3)) == list(range(20))
    assert list(prefetch([])) == []

    def broken():
        yield 1
        raise ValueError("no more")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        list(items)
