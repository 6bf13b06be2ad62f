import dataclasses
import io
import logging

import numpy as np
import pytest
from absl import flags
from PIL import Image

from meteor_jax.config import ConfigError, build
from meteor_jax.data.examples import SKIPPED_ID
from meteor_jax.data.pipeline import (
    DataConfig,
    make_held_out_batches,
    make_train_iterator,
    training_texts,
)
from meteor_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN

TOKENIZER = ByteTokenizer()
CONFIG = DataConfig(
    sources=("fake",), image_size=8, text_length=60, questions_per_image=3, seed=3, prefetch=2
)


def png(color, side=8):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


class FakeSource:
    """Records in memory, in the shape that every data source has."""

    def __init__(self, size, *, first_id=0, corrupt=(), questions=5):
        self.records = [
            {
                "image": png((i, 0, 0))[: 40 if i in corrupt else None],
                "caption": f"picture {i}",
                "image_id": first_id + i,
                "qa": [
                    {"task": "t", "question": f"q{n}?", "answer": f"a{i}{n}", "question_id": n}
                    for n in range(questions)
                ],
            }
            for i in range(size)
        ]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def make(config=CONFIG, *, source=None, task="instruction", batch_size=4, **options):
    return make_train_iterator(
        config,
        tokenizer=options.pop("tokenizer", TOKENIZER),
        task=task,
        batch_size=batch_size,
        records=options.pop("records", None) or [source or FakeSource(12)],
        **options,
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(batch, other):
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(getattr(batch, field.name), getattr(other, field.name))


def supervised(row):
    return TOKENIZER.decode([label for label in row if label != IGNORE_LABEL])


def test_shapes_and_types_are_static():
    config = dataclasses.replace(CONFIG, max_images=2)
    for batch in take(make(config, source=FakeSource(5, corrupt=(1,))), 4):
        assert batch.images.shape == (4, 2, 8, 8, 3) and batch.images.dtype == np.uint8
        assert batch.image_valid.shape == (4, 2) and batch.image_valid.dtype == bool
        for name, dtype in (("tokens", np.int32), ("labels", np.int32), ("text_valid", bool)):
            array = getattr(batch, name)
            assert isinstance(array, np.ndarray)
            assert array.shape == (4, 60) and array.dtype == dtype
        assert batch.example_id.dtype == np.int32
        assert ((batch.tokens == IMAGE_TOKEN).sum(1) == batch.image_valid.sum(1)).all()
        assert (batch.tokens[~batch.text_valid] == TOKENIZER.pad_id).all()
        assert (batch.labels[~batch.text_valid] == IGNORE_LABEL).all()
        assert (np.diff(batch.text_valid.astype(int), axis=1) <= 0).all()  # padded on the right


def test_rows_hold_their_own_image_and_answers():
    for batch in take(make(), 3):
        for image, labels, example_id in zip(
            batch.images, batch.labels, batch.example_id, strict=True
        ):
            assert image[0, 0, 0, 0] == example_id
            answers = supervised(labels).split()
            assert len(set(answers)) == 3  # questions_per_image different questions
            assert all(answer[:-1] == f"a{example_id}" for answer in answers)


def test_captions_are_supervised_whole():
    batch = next(make(task="captioning", template="plain"))
    for labels, example_id in zip(batch.labels, batch.example_id, strict=True):
        assert supervised(labels) == f"picture {example_id}\n"
    batch = next(make(task="captioning"))  # a template that keeps the question asks for it
    row = batch.tokens[0][(batch.labels[0] == IGNORE_LABEL) & batch.text_valid[0]]
    assert TOKENIZER.decode(row) == "Describe the image.:"


def test_the_same_seed_gives_the_same_batches_and_another_does_not():
    first, second = take(make(), 7), take(make(), 7)
    for batch, other in zip(first, second, strict=True):
        assert_equal(batch, other)
    other = next(make(dataclasses.replace(CONFIG, seed=4)))
    assert (other.tokens != first[0].tokens).any()


def test_every_epoch_has_all_examples_in_another_order_with_other_questions():
    epochs = [take(make_iterator, 3) for make_iterator in [make()] for _ in range(2)]
    orders = [np.concatenate([batch.example_id for batch in epoch]) for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(12))] * 2
    assert (orders[0] != orders[1]).any()
    chosen = [
        {
            int(example_id): supervised(labels)
            for batch in epoch
            for example_id, labels in zip(batch.example_id, batch.labels, strict=True)
        }
        for epoch in epochs
    ]
    assert sum(chosen[0][i] != chosen[1][i] for i in range(12)) >= 6


@pytest.mark.parametrize("position", [1, 4])  # in the middle of the first and of a later epoch
def test_resumes_exactly(position):
    iterator = make()
    take(iterator, position)
    state = iterator.get_state()
    expected = take(iterator, 5)
    resumed = make()
    resumed.set_state(state)
    for batch, other in zip(expected, take(resumed, 5), strict=True):
        assert_equal(batch, other)


def test_state_lives_in_an_orbax_checkpoint(tmp_path):
    import grain
    import orbax.checkpoint as ocp

    iterator = make()
    take(iterator, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = grain.checkpoint.CheckpointSave(iterator)
        manager.save(2, args=ocp.args.Composite(data=save))
        manager.wait_until_finished()
        expected = next(iterator)
        resumed = make()
        restore = grain.checkpoint.CheckpointRestore(resumed)
        manager.restore(2, args=ocp.args.Composite(data=restore))
    assert_equal(next(resumed), expected)


def test_processes_share_every_epoch_without_overlap():
    shards = [take(make(batch_size=2, process_index=i, process_count=3), 2) for i in range(3)]
    seen = [set(np.concatenate([batch.example_id for batch in shard])) for shard in shards]
    assert sorted(example for shard in seen for example in shard) == list(range(12))


def test_the_number_of_processes_does_not_change_what_a_step_sees():
    alone = make(batch_size=6)
    pair = [make(batch_size=3, process_index=i, process_count=2) for i in range(2)]
    for _ in range(3):
        whole, halves = next(alone), [next(iterator) for iterator in pair]
        for index, half in enumerate(halves):
            np.testing.assert_array_equal(half.tokens, whole.tokens[index::2])
            np.testing.assert_array_equal(half.images, whole.images[index::2])


def test_a_batch_number_is_a_position_on_any_number_of_processes():
    alone = take(make(batch_size=6), 7)
    for index in range(2):
        options = {"batch_size": 3, "process_index": index, "process_count": 2}
        started = make(start_batch=5, **options)
        assert started.get_state() == {"next_index": 5}
        resumed = make(**options)
        take(resumed, 1)
        resumed.set_state({"next_index": 5})
        for whole, half, other in zip(alone[5:], take(started, 2), take(resumed, 2), strict=True):
            np.testing.assert_array_equal(half.tokens, whole.tokens[index::2])
            assert_equal(half, other)
        assert started.get_state() == resumed.get_state() == {"next_index": 7}


def test_a_start_far_away_reads_nothing_before_it():
    class Counting(FakeSource):
        read = ()

        def __getitem__(self, index):
            Counting.read += (index,)
            return super().__getitem__(index)

    iterator = make(dataclasses.replace(CONFIG, prefetch=1), source=Counting(12), start_batch=999)
    assert not Counting.read
    next(iterator)
    assert len(Counting.read) <= 4 * 4  # this batch, and what is prepared ahead


def test_held_out_questions_are_the_same_each_time():
    config = dataclasses.replace(CONFIG, held_out=3)
    options = {"tokenizer": TOKENIZER, "task": "instruction", "batch_size": 2}
    one, other = (
        make_held_out_batches(config, records=[FakeSource(12)], **options) for _ in range(2)
    )
    for batch, again in zip(one, other, strict=True):
        assert_equal(batch, again)
    assert np.concatenate([batch.example_id for batch in one]).tolist() == [9, 10, 11, SKIPPED_ID]
    assert all(supervised(row) for row in one[0].labels)
    trained = take(make(config), 9)
    assert set(np.concatenate([batch.example_id for batch in trained])) == set(range(9))
    assert make_held_out_batches(CONFIG, records=[FakeSource(12)], **options) == []


def test_sources_are_mixed_by_weight():
    config = dataclasses.replace(CONFIG, sources=("one", "two"), weights=(3.0, 1.0))
    records = [FakeSource(10), FakeSource(10, first_id=100)]
    ids = np.concatenate([batch.example_id for batch in take(make(config, records=records), 10)])
    assert (ids >= 100).sum() == 10 and len(ids) == 40


def test_a_corrupt_image_is_counted_and_the_rest_is_not_touched(caplog):
    source = FakeSource(12, corrupt=(5,))
    with caplog.at_level(logging.ERROR):
        batches = take(make(source=source), 3)
    skipped = np.concatenate([batch.example_id < 0 for batch in batches])
    assert skipped.sum() == 1
    assert "example 5 skipped" in caplog.text
    for batch, whole in zip(batches, take(make(), 3), strict=True):
        keep = batch.example_id != SKIPPED_ID
        np.testing.assert_array_equal(batch.tokens[keep], whole.tokens[keep])
        assert not batch.images[~keep].any() and not batch.image_valid[~keep].any()
        assert (batch.labels[~keep] == IGNORE_LABEL).all()
        assert (batch.text_valid[~keep].sum(1) == 1).all()


def test_an_answer_longer_than_the_sequence_is_one_line_and_counted(caplog):
    config = dataclasses.replace(CONFIG, text_length=14)
    source = FakeSource(4)
    for item in source.records[2]["qa"]:
        item["answer"] = "far too long"
    with caplog.at_level(logging.ERROR):
        batch = next(make(config, source=source))
    assert sorted(batch.example_id) == [SKIPPED_ID, 0, 1, 3]
    # Iterators of other tests may still be reading ahead, so of all messages only this one's.
    messages = {text for text in caplog.messages if text.startswith("example 2 ")}
    assert messages == {
        "example 2 skipped: the shortest of 5 questions with its answer takes 20 tokens, "
        "text_length is 14; raise text_length or shorten the answers."
    }


def test_a_classifier_gets_one_question_a_row_and_its_class():
    config = dataclasses.replace(CONFIG, classes=("a31", "a52"))  # of two of twelve records
    found = [
        row
        for batch in take(make(config, task="classification"), 4)
        for row in zip(batch.target, batch.labels, batch.tokens, batch.example_id, strict=True)
    ]
    assert {int(target) for target, *_ in found} >= {0, 1}
    for target, labels, tokens, example_id in found:
        assert (labels == IGNORE_LABEL).all()
        assert (target >= 0) == (example_id != SKIPPED_ID) == (IMAGE_TOKEN in tokens)
    assert next(make(CONFIG)).target is None
    with pytest.raises(ValueError, match="expected the answers that are told apart"):
        make(CONFIG, task="classification")


def test_a_batch_says_which_turn_a_token_belongs_to_if_they_are_apart():
    assert next(make(CONFIG)).segment_ids is None
    apart = dataclasses.replace(CONFIG, attention="independent_qa")
    assert next(make(apart, task="captioning", template="plain")).segment_ids is None
    batch = next(make(apart))
    assert batch.segment_ids.shape == batch.tokens.shape
    answers = batch.labels != IGNORE_LABEL
    assert set(batch.segment_ids[answers]) >= {1, 2}
    assert (batch.segment_ids[batch.tokens == IMAGE_TOKEN] == 0).all()
    with pytest.raises(ValueError, match=r"no mode .independent.\. Did you mean"):
        dataclasses.replace(CONFIG, attention="independent")


def test_a_bpe_trained_on_the_training_texts_feeds_the_pipeline(tmp_path):
    records = [FakeSource(12)]
    tokenizer = load_tokenizer(
        "bpe:270", folder=tmp_path / "tokenizer", texts=lambda: training_texts(records)
    )
    batch = next(make(records=records, tokenizer=tokenizer))
    labels = batch.labels[0]
    answers = tokenizer.decode(labels[labels != IGNORE_LABEL]).split()
    assert len(answers) == 3 and all(a.startswith(f"a{batch.example_id[0]}") for a in answers)
    assert list(training_texts(records, limit=1)) == [
        *(f"q{n}?: a0{n}" for n in range(5)),
        "picture 0",
    ]


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_kept_records_are_read_once_and_change_nothing(kept):
    class Counting(FakeSource):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    config = dataclasses.replace(CONFIG, record_cache_size=kept, prefetch=1)
    for batch, other in zip(
        take(make(config, source=Counting(12)), 6), take(make(), 6), strict=True
    ):
        assert_equal(batch, other)
    if kept == 100:  # two threads may meet the same record at once, across an epoch's border
        assert Counting.reads < 20
    else:
        assert Counting.reads >= 12 + 12 - kept


@pytest.mark.slow
def test_worker_processes_resume_exactly():
    flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags
    config = dataclasses.replace(CONFIG, num_workers=2)
    iterator = make(config)
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 3)
    for resumed in (make(config), make()):  # with workers again, and without
        take(resumed, 1)
        resumed.set_state(state)
        for batch, other in zip(expected, take(resumed, 3), strict=True):
            assert_equal(batch, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "instructions"}, "no such task 'instructions'. Did you mean 'instruction'?"),
        ({"template": "vicuna"}, "Did you mean 'vicuna_v1'?"),
        ({"template": "plain"}, "'plain' drops questions"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError) as error:
        make(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ("a",), "template": "qaa"}, "Did you mean 'qa'?"),
        ({"sources": ("a", "b"), "weights": (1.0,)}, "weights: expected one for each of 2"),
        ({"sources": ("a",), "weights": (0.0,)}, "weights: expected positive"),
        ({"sources": ("a",), "text_length": 0}, "text_length: expected at least 1, got 0"),
        ({"sources": ()}, "sources: expected at least one"),
        ({"sources": ("a",), "text_len": 9}, "Did you mean 'text_length'?"),
    ],
)
def test_bad_configs_are_one_line(values, message):
    with pytest.raises(ConfigError) as error:
        build(DataConfig, values, where="data")
    assert message in str(error.value) and str(error.value).startswith("data")
