"""Requests in, predictions out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from meteor_jax.config import ConfigError
from meteor_jax.data.sources.registry import CorruptImage
from meteor_jax.inference.engine.data_shards import BATCH_SPEC
from meteor_jax.inference.engine.engine import look_up
from meteor_jax.inference.engine.images import ImageHandle
from meteor_jax.inference.engine.loading import prefetch
from meteor_jax.inference.engine.predictor import PromptBatch
from meteor_jax.inference.engine.request import Request, Timings
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from tests.inference.engine.fakes import GreyPredictor, make_engine, png


def make_requests(num_images, *, corrupt=()):
    """Image i is of one grey, 10 · i, which is what the model answers; image i has i % 3 + 1
    questions, the later ones longer."""
    return [
        Request(
            f"how grey? {j}" + 2 * j * " please",
            images=[ImageHandle(i, lambda i=i: png(10 * i)[: 20 if i in corrupt else None])],
            max_new_tokens=6,
        )
        for i in range(num_images)
        for j in range(i % 3 + 1)
    ]


def ask(requests, **options):
    """Predictions in the order of the requests, and the predictor."""
    engine, timings = make_engine(**options), Timings()
    found = {p.index: p for p in engine.predict(requests, timings=timings, warm_up=True)}
    assert timings.wall > timings.model > 0 and timings.host > 0
    assert 0 < sum(p.seconds for p in found.values()) <= timings.wall
    return [found[index] for index in range(len(requests))], engine.predictors["fake"]


def check(predictions, requests, *, corrupt=()):
    assert len(predictions) == len(requests)
    for prediction, request in zip(predictions, requests, strict=True):
        (image,) = request.images
        grey = 0 if image.key in corrupt else 10 * image.key
        assert prediction.text == str(grey)
        assert prediction.unreadable == (image.key in corrupt)
        assert prediction.kept == (grey // 10, prediction.prompt_tokens)
        assert prediction.prompt_length / 2 < prediction.prompt_tokens <= prediction.prompt_length


def test_every_prompt_is_asked_and_every_image_encoded_once_in_a_few_static_shapes():
    requests = make_requests(21)
    predictions, predictor = ask(requests)
    check(predictions, requests)
    seen = [grey for grey in predictor.encoded if grey]  # grey 0 is also what fills up a batch
    assert sorted(seen) == [10 * i for i in range(1, 21)]
    assert len({shape for shape in predictor.shapes if shape[0] == "encode"}) == 1
    shapes = sorted(shape[2] for shape in predictor.shapes if shape[0] == "predict")
    assert shapes == [(4, 16), (4, 32), (4, 64)]
    assert {prediction.batch_rows for prediction in predictions} == {4}


@pytest.mark.parametrize(
    ("encode", "cache", "batch"), [(1, 1, 1), (1, 1, 7), (3, 5, 7), (16, 64, 1), (16, 64, 7)]
)
def test_batch_sizes_do_not_change_answers(batch, encode, cache):
    requests = make_requests(11)
    check(ask(requests, encode=encode, batch=batch, cache=cache)[0], requests)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_shards_of_a_mesh_give_the_same_answers(axes):
    requests = make_requests(25, corrupt=(3, 24))
    mesh = make_mesh(MeshConfig(**axes))
    predictions, predictor = ask(requests, encode=8, batch=16, cache=16, mesh=mesh)
    check(predictions, requests, corrupt=(3, 24))
    assert predictions[0].batch_rows == 16 // (axes["data"] * axes.get("fsdp", 1))
    assert sorted(g for g in predictor.encoded if g) == [10 * i for i in range(1, 24) if i != 3]


def test_images_are_looked_up_without_leaving_their_shard():
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, BATCH_SPEC)

        def shape(*sizes, dtype=np.int32):
            return jax.ShapeDtypeStruct((8, *sizes), dtype, sharding=split)

        visual = {"x": shape(4, 6, 5, dtype=np.float32), "place": shape(4, 6)}
        rows = PromptBatch(shape(3, 16), shape(3, 16), shape(3, 1), shape(3, dtype=np.uint32))
        program = look_up.lower(visual, shape(3, 1), rows).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


@pytest.mark.parametrize(
    ("corrupt", "sizes"), [((2, 5), {}), ((0, 1, 2), {"encode": 3, "cache": 3})]
)
def test_a_corrupt_image_is_told_and_not_dropped(corrupt, sizes):
    """Also where a group has no other image."""
    requests = make_requests(6, corrupt=corrupt)
    check(ask(requests, **sizes)[0], requests, corrupt=corrupt)


def test_prompts_of_several_images_and_of_none():
    handles = [ImageHandle(i, lambda i=i: png(10 * i)) for i in range(8)]
    counts = [0, 3, 1, 2, 0, 1, 3, 0]
    requests = [Request("sum?", images=handles[:count]) for count in counts]
    predictions, predictor = ask(requests, encode=2, batch=2, cache=2)
    assert [int(p.text) for p in predictions] == [sum(range(count)) * 10 for count in counts]
    assert [p.num_images for p in predictions] == counts
    assert {shape[1][1] for shape in predictor.shapes if shape[0] == "predict"} == {1, 2, 3}
    handles[1] = ImageHandle(1, lambda: b"no image")
    requests = [Request("sum?", images=handles[:count]) for count in counts]
    found, _ = ask(requests, encode=2, batch=2, cache=2)
    assert [p.unreadable for p in found] == [count > 1 for count in counts]


def test_images_come_in_any_form_and_equal_ones_are_one(tmp_path):
    pixels = np.full((SIZE := 8, SIZE, 3), 70, np.uint8)
    path = tmp_path / "grey.png"
    path.write_bytes(png(70))
    forms = [png(70), pixels, Image.fromarray(pixels), str(path), path, Image.new("L", (9, 9), 70)]
    requests = [Request("how grey?", images=[form]) for form in forms]
    predictions, predictor = ask(requests)
    assert [p.text for p in predictions] == ["70"] * 6
    # Bytes, pixels of two forms, a path named twice, and an image of another size.
    assert predictor.encoded.count(70) == 4
    with pytest.raises(TypeError, match="expected bytes, a path"):
        Request("how grey?", images=[pixels.astype(np.float32)])
    for missing in (tmp_path / "gray.png", str(tmp_path)):
        with pytest.raises(ConfigError, match=f"image: no file '{missing}'"):
            Request("how grey?", images=[missing])


def test_each_plan_has_its_predictor_and_its_images():
    predictors = {"a": GreyPredictor(), "b": GreyPredictor()}
    engine = make_engine(predictors)
    requests = [Request("how grey?", images=[png(10 * i)], plan="ba"[i % 2]) for i in range(1, 6)]
    texts = {p.index: p.text for p in engine.predict([*requests, engine.prepare(requests[0])])}
    assert texts == {0: "10", 1: "20", 2: "30", 3: "40", 4: "50", 5: "10"}
    for predictor, greys in zip(predictors.values(), ([10, 30, 50], [20, 40]), strict=True):
        assert [grey for grey in predictor.encoded if grey] == greys
    assert engine.prepare(Request("how grey?")).plan == "a"
    with pytest.raises(ConfigError, match="no plan 'c'"):
        engine.prepare(Request("how grey?", plan="c"))


def test_nothing_to_ask():
    assert list(make_engine().predict([])) == []


def test_a_request_has_its_own_length_of_answer():
    requests = [Request("how long?", max_new_tokens=length) for length in (4, 16, 4)]
    _, predictor = ask(requests, batch=2)
    assert sorted(shape[3] for shape in predictor.shapes if shape[0] == "predict") == [4, 16]
    with pytest.raises(ValueError, match="max_new_tokens ≥ 1"):
        Request("how long?", max_new_tokens=0)


def test_a_classifier_needs_another_predictor_and_nothing_else():
    class Classifier(GreyPredictor):
        """Bright or dark, by the first image."""

        def predict(self, visual, prompts, *, bucket):
            return jax.nn.softmax(jnp.stack([visual[:, 0], 100 - visual[:, 0]], axis=1))

        def read(self, outputs, row, *, bucket):
            scores = tuple(outputs[row].tolist())
            return {"text": ("bright", "dark")[int(np.argmax(scores))], "scores": scores}

    engine = make_engine({"full": Classifier()})
    requests = [Request("is it bright?", images=[png(value)]) for value in (10, 60, 90)]
    found = sorted(engine.predict(requests), key=lambda p: p.index)
    assert [p.text for p in found] == ["dark", "bright", "bright"]
    assert all(sum(p.scores) == pytest.approx(1) for p in found)


@pytest.mark.parametrize("axes", [None, {"data": 8}])
def test_an_answer_is_streamed_in_pieces(axes):
    engine = make_engine(mesh=axes and make_mesh(MeshConfig(**axes)))
    images = [png(100), png(20)]
    assert list(engine.stream(Request("sum?", images=images))) == ["1", "2", "0"]
    assert list(engine.stream(Request("sum?", images=images, stop=("0",)))) == ["1", "2"]


def test_streaming_an_unreadable_image_is_one_line():
    with pytest.raises(CorruptImage, match="cannot be decoded"):
        list(make_engine().stream(Request("how grey?", images=[b"no image"])))


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


def test_what_the_caller_does_meanwhile_is_host_time():
    import time

    timings, requests = Timings(), make_requests(4)
    for _ in make_engine().predict(requests, timings=timings):
        time.sleep(0.01)
    assert timings.host > 0.01 * len(requests)
    assert dataclasses.asdict(timings).keys() < timings.as_dict().keys()
