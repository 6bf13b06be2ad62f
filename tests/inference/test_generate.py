"""Answers: greedy, sampled, ended; rows on their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.data.templates import get_template
from meteor_jax.inference.engine.batching import BatchSizes
from meteor_jax.inference.engine.engine import Engine
from meteor_jax.inference.engine.predictor import PromptBatch
from meteor_jax.inference.engine.prompts import PromptLimits
from meteor_jax.inference.engine.request import Request
from meteor_jax.inference.engine.streaming import text_pieces
from meteor_jax.inference.generate import TextPredictor, choose_cache_length, generate, start
from meteor_jax.inference.sampling import Sampling, draw, is_finite, row_keys
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import override
from tests import tiny_model as tiny

EOS = 1
NEW = 10  # with rows of three, 16 tokens and one image: programs that all tests here share


def make_batch(**options):
    return tiny.make_batch(lengths=(6, 5, 4), text_length=16, **options)


def answer(batch, plan, *, visual=None, **options):
    if visual is None:
        visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    return generate(
        tiny.MODEL,
        tiny.params(),
        visual,
        image_valid=batch.image_valid,
        tokens=batch.tokens,
        text_valid=batch.text_valid,
        plan=plan,
        max_new_tokens=NEW,
        **({"eos_id": EOS} | options),
    )


def test_greedy_equals_asking_the_whole_row_again_for_each_token():
    """And after the end only end tokens follow, which are not counted."""
    batch = make_batch()
    eos = int(answer(batch, PrunePlan()).tokens[0, 2])
    found = answer(batch, PrunePlan(), eos_id=eos)
    generated, lengths = np.asarray(found.tokens), np.asarray(batch.text_valid).sum(1)
    tokens, valid = np.array(batch.tokens), np.array(batch.text_valid)
    for step in range(NEW):
        row = batch.replace(tokens=jnp.asarray(tokens), text_valid=jnp.asarray(valid))
        logits = np.asarray(tiny.forward(tiny.params(), row, plan=PrunePlan()).logits)
        for i, length in enumerate(lengths + step):
            expected = logits[i, length - 1].argmax()
            ended = eos in generated[i, :step]
            assert generated[i, step] == (eos if ended else expected)
            tokens[i, length], valid[i, length] = generated[i, step], True
    assert found.num_tokens[0] == np.argmax(generated[0] == eos) <= 2
    assert (generated[0, found.num_tokens[0] :] == eos).all()


def test_a_row_whose_logits_are_not_finite_is_flagged_and_disturbs_no_other():
    plan, batch = tiny.plan(tiny.METEOR), make_batch(with_image=(True, True, True))
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    x = np.array(visual.x)
    x[1] = np.nan
    broken = visual.replace(x=x)
    sound = answer(batch, plan, visual=visual)
    assert np.asarray(sound.finite).all()
    found = answer(batch, plan, visual=broken)
    np.testing.assert_array_equal(found.finite, [True, False, True])
    np.testing.assert_array_equal(found.tokens[::2], sound.tokens[::2])


def test_a_token_that_cannot_come_is_no_fault():
    inf = jnp.inf
    logits = jnp.array([[0.0, -inf], [jnp.nan, 0.0], [inf, 0.0], [-inf, -inf]])
    np.testing.assert_array_equal(is_finite(logits), [True, False, False, False])


def test_the_cache_is_cut_to_what_the_longest_row_keeps():
    """Rows that keep few tokens are decoded over a shorter cache."""
    plan, batch = tiny.plan(tiny.METEOR), tiny.make_batch()
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    for lambda_, choice in ((1e-9, 0), (1e9, 1)):
        scaled = override(plan, **{"decode.lambda_": lambda_})
        started = start(
            tiny.MODEL,
            tiny.params(),
            visual,
            PromptBatch(
                batch.tokens, batch.text_valid, batch.image_valid, jnp.zeros(3, jnp.uint32)
            ),
            plan=scaled,
            max_new_tokens=NEW,
            eos_id=EOS,
        )
        assert choose_cache_length(started) == choice


def test_top_p_draws_only_from_the_likely():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 400))
    sampling = Sampling(temperature=1.0, top_p=0.7)
    keys = row_keys(jnp.arange(400, dtype=jnp.uint32))
    drawn = np.asarray(draw(logits, sampling=sampling, keys=keys))
    assert set(drawn.tolist()) == {0, 1}
    assert 0.5 < (drawn == 0).mean() < 0.75  # 5 to 3
    certain = draw(logits, sampling=Sampling(1.0, 0.4), keys=keys)
    assert (np.asarray(certain) == 0).all()


def test_temperature_needs_a_key_and_sensible_numbers():
    with pytest.raises(ValueError, match=r"key=jax.random.key"):
        answer(make_batch(), PrunePlan(), sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="0 < top_p"):
        Sampling(top_p=0.0)


def test_the_same_key_draws_the_same():
    options = {"sampling": Sampling(temperature=2.0), "key": jax.random.key(3)}
    one, other = (answer(make_batch(), PrunePlan(), **options).tokens for _ in range(2))
    np.testing.assert_array_equal(one, other)


class Letters:
    """Each id but the first three is a character."""

    vocab_size, pad_id, eos_id, bos_id = tiny.VOCAB, 0, EOS, None

    def encode(self, text, *, bos=False, after="start"):
        return [3 + ord(letter) % (tiny.VOCAB - 3) for letter in text]

    def decode(self, ids):
        return "".join(chr(62 + i) for i in ids if i >= 3)

    def special_id(self, name):
        return None


@pytest.fixture(scope="module")
def engine():
    plans = {"full": PrunePlan(), "meteor": tiny.plan(tiny.METEOR)}
    return Engine(
        predictors={
            name: TextPredictor(tiny.MODEL, tiny.params(), plan, Letters(), eos_id=EOS)
            for name, plan in plans.items()
        },
        tokenizer=Letters(),
        template=get_template("qa"),
        limits=PromptLimits(lengths=(16,), positions=256, image_positions=tiny.NUM_VISUAL),
        sizes=BatchSizes(encode=2, batch=3, cache=4),
    )


def request(image, **fields):
    pixels = np.random.default_rng(image).integers(0, 256, (32, 32, 3), np.uint8)
    return Request(f"what is {image}?", images=[pixels], max_new_tokens=NEW, **fields)


def predict(engine, *requests):
    return sorted(engine.predict(requests), key=lambda prediction: prediction.index)


@pytest.mark.parametrize("plan", ["full", "meteor"])
def test_streaming_gives_the_tokens_of_one_loop(engine, plan, monkeypatch):
    """Greedy and drawn, among others or alone, up to a stop text or not."""
    monkeypatch.setattr("meteor_jax.inference.generate.STOP_INTERVAL", 4)
    requests = [request(image, plan=plan) for image in range(3)]
    if plan == "full":
        requests.append(request(0, plan=plan, sampling=Sampling(temperature=1.5), seed=1))
    found = predict(engine, *requests)
    assert any(len(prediction.tokens) == NEW for prediction in found)
    for asked, whole in zip(requests, found, strict=True):
        assert list(engine.stream(asked)) == [Letters().decode([token]) for token in whole.tokens]
        assert predict(engine, asked)[0].tokens == whole.tokens
        middle = len(whole.text) // 2
        stopped = dataclasses.replace(asked, stop=("none", whole.text[middle : middle + 2]))
        (cut,) = predict(engine, stopped)
        assert cut.text == whole.text[: whole.text.find(stopped.stop[1])] != whole.text
        assert cut.tokens == whole.tokens[: len(cut.text) + 2]
        assert "".join(engine.stream(stopped)) == cut.text


def test_other_seeds_draw_other_tokens(engine):
    asked = request(0, sampling=Sampling(temperature=1.5))
    one, other = predict(engine, asked, dataclasses.replace(asked, seed=1))
    assert one.tokens != other.tokens


def test_rows_with_a_stop_text_are_not_decoded_to_the_end(engine, monkeypatch):
    monkeypatch.setattr("meteor_jax.inference.generate.STOP_INTERVAL", 4)
    limits, step = [], TextPredictor._step

    def counted(self, state, limit, *args):
        limits.append(limit)
        return step(self, state, limit, *args)

    monkeypatch.setattr(TextPredictor, "_step", counted)
    whole = max(predict(engine, *map(request, range(3))), key=lambda found: len(found.tokens))
    assert limits == [NEW] and len(whole.tokens) == NEW
    predict(engine, request(whole.index, stop=(whole.text[5],)))
    assert limits == [NEW, 4, 8] or whole.text[5] in whole.text[:4]


def test_pieces_hold_back_what_may_change():
    texts = ["", " a", " a ", " a \ufffd", " a \u00e9", " a \u00e9n", " a \u00e9nx", " a \u00e9nxd"]
    assert list(text_pieces(texts[:-1], stop=["nd"])) == ["a", " \u00e9", "nx"]
    assert list(text_pieces(texts, stop=["nxd", "q"])) == ["a", " \u00e9"]
    assert list(text_pieces([" a "], stop=[])) == ["a"]
