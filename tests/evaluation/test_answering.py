import numpy as np
import pytest

from meteor_jax.data.pipeline import collate_prompts
from meteor_jax.data.sources import decode_image
from meteor_jax.evaluation.answering import BatchSizes, answer_questions, image_loader, prefetch
from tests.evaluation.fakes import SIZE, TOKENIZER, FakeAnswerer, make_questions


def ask(sources, questions, *, images=4, batch=4, group=8):
    answerer, told = FakeAnswerer(), []
    prompts = collate_prompts(
        [question.question for question in questions], tokenizer=TOKENIZER, template="qa",
        text_length=24, batch_size=len(questions),
    )
    answers, seconds = answer_questions(
        questions, prompts, answerer, decode=TOKENIZER.decode,
        load_image=image_loader(sources, decode_image=decode_image, image_size=SIZE),
        sizes=BatchSizes(images=images, questions=batch, group=group), image_size=SIZE,
        advance=told.append,
    )
    assert seconds > 0
    assert sum(told) == len(questions)
    return answers, answerer


def test_every_question_is_asked_and_every_image_encoded_once():
    sources, questions = make_questions(20)
    answers, answerer = ask(sources, questions)
    assert [answer.prediction for answer in answers] == [q.answer for q in questions]
    assert all(answer.score == 1.0 for answer in answers)
    assert [answer.kept for answer in answers] == [(q.record,) for q in questions]
    seen = [grey for grey in answerer.encoded if grey]  # grey 0 is also what fills up a batch
    assert sorted(seen) == [10 * i for i in range(1, 20)]


def test_shapes_never_change():
    sources, questions = make_questions(21)
    _, answerer = ask(sources, questions)
    assert len({shape for shape in answerer.shapes if shape[0] == "encode"}) == 1
    assert len({shape for shape in answerer.shapes if shape[0] == "answer"}) == 1


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("images", "group"), [(1, 1), (3, 5), (16, 64)])
def test_batch_sizes_do_not_change_answers(batch, images, group):
    sources, questions = make_questions(11)
    expected, _ = ask(sources, questions)
    answers, _ = ask(sources, questions, images=images, batch=batch, group=group)
    assert answers == expected


def test_a_corrupt_image_is_scored_wrong_and_not_dropped():
    sources, questions = make_questions(9, corrupt=(2, 8))
    answers, _ = ask(sources, questions)
    assert len(answers) == len(questions)
    for question, answer in zip(questions, answers, strict=True):
        assert answer.corrupt == (question.record in (2, 8))
        assert answer.score == (0.0 if answer.corrupt else 1.0)


def test_a_group_of_nothing_but_corrupt_images():
    sources, questions = make_questions(6, corrupt=(0, 1, 2))
    answers, _ = ask(sources, questions, group=3)
    assert [answer.corrupt for answer in answers] == [q.record < 3 for q in questions]


def test_prompt_tokens_are_counted_without_padding():
    sources, questions = make_questions(3)
    answers, _ = ask(sources, questions)
    # <s> <image> h o w …: the byte tokenizer's BOS, the image's place, 11 bytes and ":"
    assert {answer.prompt_tokens for answer in answers} == {14}


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


def test_loads_at_the_models_size():
    sources, questions = make_questions(2)
    image = image_loader(sources, decode_image=decode_image, image_size=16)(questions[1])
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8
    assert (image == 10).all()
