"""LLaVA files: what an entry may be, preparing once and resuming, and what the pipeline makes."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from meteor_jax.cli.__main__ import main
from meteor_jax.data.config import DataConfig
from meteor_jax.data.examples import SKIPPED_ID, ExampleTooLong, cut_text
from meteor_jax.data.pipeline import (
    first_questions,
    make_held_out_batches,
    make_train_iterator,
    open_sources,
    training_texts,
)
from meteor_jax.data.sources import llava
from meteor_jax.data.sources import registry as sources
from meteor_jax.data.sources.conversations import MalformedEntry, parse_entry, place_images
from meteor_jax.data.templates import Rendered, get_template
from meteor_jax.data.tokenizers import ByteTokenizer
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN

TOKENIZER = ByteTokenizer()
VICUNA, QA, PLAIN = map(get_template, ("vicuna_v1", "qa", "plain"))


def turns(*said):
    return [
        {"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(said)
    ]


def write_images(folder, count):
    folder.mkdir()
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.{'jpg' if index % 2 else 'png'}")


def image_name(index):
    return f"{index}.{'jpg' if index % 2 else 'png'}"


def write_set(root, *, count=10, extra=()):
    """`count` conversations about an image each, two turns long; then `extra`."""
    write_images(root / "images", count)
    entries = [
        {
            "id": f"e{index}",
            "image": image_name(index),
            "conversations": turns(f"q{index}?\n<image>", f"a{index}", "more?", f"b{index}"),
        }
        for index in range(count)
    ]
    path = root / "set.json"
    path.write_text(json.dumps(entries + list(extra)))
    return {"json_path": path, "images": root / "images", "data_dir": root / "data"}


EXTRA = (
    {"id": "text", "conversations": [{"from": "system", "value": "s"}, *turns("hi", "ho")]},
    {
        "id": "two",
        "image": [image_name(0), image_name(1)],
        "conversations": turns("<image> or <image>?", "this"),
    },
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of 12, the last two without image and with two; with its data_dir."""
    files = write_set(tmp_path_factory.mktemp("llava"), extra=EXTRA)
    llava.prepare_llava(**files, name="twelve", examples_per_shard=5, num_threads=1)
    return files["data_dir"]


def config(data_dir, **fields):
    fields = {"sources": ("llava:twelve",), "text_length": 300, "image_size": 8} | fields
    return DataConfig(template="qa", data_dir=str(data_dir), seed=1, prefetch=1, **fields)


def one_epoch(config, *, task="instruction", batches=6, **options):
    iterator = make_train_iterator(config, tokenizer=TOKENIZER, task=task, batch_size=2, **options)
    return [next(iterator) for _ in range(batches)]


def rows_by_id(batches):
    return {
        int(example_id): (tokens[valid].tolist(), labels[valid].tolist(), images, image_valid)
        for batch in batches
        for example_id, tokens, labels, valid, images, image_valid in zip(
            batch.example_id, batch.tokens, batch.labels, batch.text_valid, batch.images,
            batch.image_valid, strict=True,
        )
    }  # fmt: skip


def text(ids):
    return TOKENIZER.decode([i for i in ids if i >= 0])


def test_entries_as_they_come():
    entry = parse_entry({"id": 7, "image": "a.jpg", "conversations": turns("q <image>", "a")})
    assert (entry.name, entry.images, entry.turns) == ("7", ("a.jpg",), (("q <image>", "a"),))
    for nothing in ({}, {"image": None}, {"image": ""}, {"image": []}):
        assert parse_entry({"conversations": turns("q", "a")} | nothing).images == ()
    # What comes before the first human turn goes, and a last question without an answer.
    said = [{"from": "gpt", "value": "x"}, *turns("q", "a", "left open")]
    assert parse_entry({"conversations": said}).turns == (("q", "a"),)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "a list 'conversations'"),
        ({"image": "a.jpg"}, "a list 'conversations'"),
        ({"image": 3, "conversations": turns("q", "a")}, "a path or a list of them, got 3"),
        ({"conversations": [{"from": "human"}]}, "texts 'from' and 'value'"),
        ({"conversations": turns("q")}, "no human turn with an answer"),
        ({"conversations": turns("q", "a")[::-1]}, "no human turn with an answer"),
        ({"conversations": turns("q", "a") + turns("q", "a")[1:]}, "turn 3 is from 'gpt'"),
        ({"conversations": turns("q", "\ud800")}, "not valid Unicode"),
        ({"conversations": turns("<image> q", "a")}, "1 <image> in the questions of 0 images"),
        ({"image": ["a", "b"], "conversations": turns("<image>", "a")}, "1 <image> in the"),
    ],
)
def test_malformed_entries_are_one_line(entry, message):
    with pytest.raises(MalformedEntry) as error:
        parse_entry(entry)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_images_go_where_the_template_has_them():
    def place(*said, num_images=1, template=VICUNA):
        pairs = tuple(zip(said[::2], said[1::2], strict=True))
        return [question for question, _ in place_images(pairs, num_images, template=template)]

    for asked in ("what?\n<image>", "<image>\nwhat?", "<image>what?", "what?"):
        assert place(asked, "a") == ["<image>\nwhat?"]
    assert place("q?", "a", "and <image> here", "b") == ["q?", "<image>\nand  here"]
    assert place("what? <image>", "a", template=QA) == ["<image>what?"]
    several = "left <image> right <image>"
    assert place(several, "a", num_images=2) == [several]
    assert place("which?", "a", num_images=2) == ["<image>\n<image>\nwhich?"]
    assert place("q?", "a", num_images=0) == ["q?"]
    assert place("Describe it.\n<image>", "a", "x", "b", template=PLAIN) == ["<image>"]


def test_text_is_cut_but_no_image():
    ids, labels = [9, IMAGE_TOKEN, 8, 7, 6], [IGNORE_LABEL] * 3 + [7, 6]
    whole = Rendered(ids, labels)
    assert cut_text(whole, text_length=5) == whole
    assert cut_text(whole, text_length=4) == Rendered(ids[:4], labels[:4])
    with pytest.raises(ExampleTooLong, match="every answer"):
        cut_text(whole, text_length=3)
    with pytest.raises(ExampleTooLong, match="an image"):
        cut_text(whole, text_length=1)


def test_a_prepared_set_holds_the_files_own_bytes(prepared):
    source = sources.open_source("llava:twelve", split="train", data_dir=prepared)
    records = {record["image_id"]: record for record in source}
    assert len(source) == 12 and sorted(records) == list(range(12))
    for index in range(10):
        file = prepared.parent / "images" / image_name(index)
        assert records[index]["images"] == (file.read_bytes(),)
        assert records[index]["turns"][0] == (f"q{index}?\n<image>", f"a{index}")
    assert records[10] == {"images": (), "turns": (("hi", "ho"),), "image_id": 10}
    assert len(records[11]["images"]) == 2
    assert [record["image_id"] for record in source] != sorted(records)  # shuffled
    by_path = sources.open_source(
        str(prepared / "llava" / "twelve" / "1.0.0"), split="train", data_dir="", num_images=3
    )
    assert [by_path[i] for i in range(3)] == [source[i] for i in range(3)]


def test_bad_entries_are_all_reported_and_their_shards_done_again(tmp_path, monkeypatch):
    extra = [{"id": "bad", "conversations": turns("q")}]
    files = write_set(tmp_path, extra=extra)
    whole = (tmp_path / "images" / "3.jpg").read_bytes()
    (tmp_path / "images" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "4.png").unlink()
    options = {"name": "bad", "examples_per_shard": 1, "num_threads": 1}
    with pytest.raises(llava.BadEntries) as error:
        llava.prepare_llava(**files, **options)
    message = str(error.value)
    assert message.startswith("3 entries cannot be used: entry 3 (id e3): cannot decode an image")
    assert "entry 4 (id e4): cannot read '4.png'" in message and "entry 10 (id bad)" in message
    assert "\n" not in message

    (tmp_path / "images" / "3.jpg").write_bytes(whole)
    loaded, load = [], llava._load

    def load_and_tell(entry, *, row, images):
        loaded.append(row)
        return load(entry, row=row, images=images)

    monkeypatch.setattr(llava, "_load", load_and_tell)
    with pytest.raises(llava.BadEntries, match="2 entries"):
        llava.prepare_llava(**files, **options)
    assert sorted(loaded) == [3, 4, 10]
    done = llava.prepare_llava(**files, **options, skip_bad=True)
    assert sorted(loaded) == [3, 4, 10]
    assert (done.num_examples, done.num_skipped, done.num_shards) == (9, 2, 9)
    listed = (done.folder / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in listed] == [4, 10]
    assert not list(done.folder.parent.glob("*unfinished*"))
    assert llava.prepare_llava(**files, **options) == done  # nothing is left to do
    assert sorted(loaded) == [3, 4, 10]
    assert len(sources.open_source("llava:bad", split="train", data_dir=files["data_dir"])) == 9


KILLED = """
import os, signal, sys
from pathlib import Path
from meteor_jax.data.sources import llava
root, left = Path(sys.argv[1]), [7]
def check(encoded):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
llava.check_image = check
llava.prepare_llava(root / "set.json", images=root / "images", data_dir=root / "data",
                    name="killed", examples_per_shard=3, num_threads=1)
"""


def test_killed_and_started_again_it_goes_on(tmp_path, monkeypatch):
    files = write_set(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-500:]
    with pytest.raises(ValueError, match="is not prepared in"):
        sources.open_source("llava:killed", split="train", data_dir=files["data_dir"])
    checked = []
    check = llava.check_image
    monkeypatch.setattr(llava, "check_image", lambda x: checked.append(x) or check(x))
    options = {"name": "killed", "examples_per_shard": 3, "num_threads": 1}
    with pytest.raises(ValueError, match="another JSON file or with another shard size"):
        llava.prepare_llava(**files, **options | {"examples_per_shard": 4})
    assert llava.prepare_llava(**files, **options).num_examples == 10
    assert len(checked) == 10 - 2 * 3  # two shards were whole
    killed = sources.open_source("llava:killed", split="train", data_dir=files["data_dir"])
    undisturbed = llava.prepare_llava(**files, **options | {"name": "undisturbed"})
    assert list(killed) == list(
        sources.open_source(str(undisturbed.folder), split="train", data_dir="")
    )


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    (tmp_path / "no.json").write_text("[{]")
    (tmp_path / "empty.json").write_text("[]")
    files = write_set(tmp_path, count=2)
    good = {"json": files["json_path"], "images": files["images"], "name": "n"}
    for changed, message in (
        ({"json": tmp_path / "absent.json"}, "there is no file"),
        ({"json": tmp_path / "no.json"}, "is not JSON"),
        ({"json": tmp_path / "empty.json"}, "holds no list"),
        ({"images": tmp_path / "absent"}, "is not a folder"),
        ({"name": "a/b"}, "--name: expected letters"),
    ):
        flags = [f"--{flag}={value}" for flag, value in (good | changed).items()]
        assert main(["prepare", *flags, f"--data_dir={tmp_path / 'out'}"]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and not printed.out
    flags = [f"--{flag}={value}" for flag, value in good.items()]
    assert main(["prepare", *flags, f"--data_dir={tmp_path}"]) == 0
    assert "2 examples (0 without image)" in capsys.readouterr().out


def test_what_is_not_prepared_names_the_command(tmp_path):
    for name, option in (("llava:x", "--name=x"), (str(tmp_path), "--name=NAME")):
        with pytest.raises(ValueError) as error:
            sources.open_source(name, split="train", data_dir=tmp_path)
        assert "meteor prepare --json=FILE" in str(error.value)
        assert option in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no split 'test' of 'llava:x'"):
        sources.open_source("llava:x", split="test", data_dir=tmp_path)


def test_conversations_stand_whole_with_all_answers_supervised(prepared):
    rows = rows_by_id(one_epoch(config(prepared, max_images=2)))
    assert sorted(rows) == list(range(12))
    tokens, labels, images, image_valid = rows[3]
    assert text(tokens) == "q3?: a3more?: b3" and tokens.count(IMAGE_TOKEN) == 1
    assert text(label for label in labels if label != IGNORE_LABEL) == " a3 b3"
    assert image_valid.tolist() == [True, False]
    expected = sources.decode_image((prepared.parent / "images" / "3.jpg").read_bytes(), size=8)
    np.testing.assert_array_equal(images[0], expected)
    tokens, _, images, image_valid = rows[10]  # text alone
    assert text(tokens) == "hi: ho" and not image_valid.any() and not images.any()
    tokens, _, _, image_valid = rows[11]
    assert tokens.count(IMAGE_TOKEN) == 2 and image_valid.all()
    assert tokens[1] == IMAGE_TOKEN and text(tokens) == " or ?: this"


def test_what_does_not_fit_is_skipped(prepared, caplog):
    batches = one_epoch(config(prepared, max_images=1))
    assert sum((batch.example_id == SKIPPED_ID).sum() for batch in batches) == 1
    assert "example 11 skipped: it has 2 images, max_images=1" in caplog.text
    cut = rows_by_id(one_epoch(config(prepared, text_length=15)))[3]
    assert text(cut[0]) == "q3?: a3more?:"[:12] and len(cut[0]) == 15


def test_captions_keep_the_answer_alone(prepared):
    batches = one_epoch(config(prepared, max_images=2), task="captioning", template="plain")
    rows = rows_by_id(batches)
    assert text(rows[4][0]) == "a4\n" and rows[4][0].count(IMAGE_TOKEN) == 1
    assert 10 not in rows and sum((batch.example_id < 0).sum() for batch in batches) == 1


def test_held_out_records_never_train_and_do_not_depend_on_the_processes(prepared):
    settings = config(prepared, held_out=5, max_images=2)
    source = open_sources(settings)[0]
    last = {source[index]["image_id"] for index in range(7, 12)}
    trained = [batch.example_id for batch in one_epoch(settings, batches=14)]
    assert set(np.concatenate(trained).tolist()) == set(range(12)) - last

    def held_out(rows, index=0, count=1):
        return make_held_out_batches(
            settings, tokenizer=TOKENIZER, task="instruction", batch_size=rows,
            process_index=index, process_count=count,
        )  # fmt: skip

    alone, pair = held_out(4), [held_out(2, index, 2) for index in range(2)]
    assert [batch.example_id.shape for batch in alone] == [(4,), (4,)]
    assert len(pair[0]) == len(pair[1]) == 2
    ids = np.concatenate([batch.example_id for batch in alone])
    assert set(ids.tolist()) == last | {SKIPPED_ID} and (ids < 0).sum() == 3
    assert (alone[1].labels[alone[1].example_id < 0] == IGNORE_LABEL).all()
    for index in range(2):
        for whole, half in zip(alone, pair[index], strict=True):
            np.testing.assert_array_equal(half.tokens, whole.tokens[index::2])
            np.testing.assert_array_equal(half.images, whole.images[index::2])
    with pytest.raises(ValueError, match="held_out: 12 of the 12 records of 'llava:twelve'"):
        one_epoch(config(prepared, held_out=12))


def test_a_source_serves_the_stages_that_kinds_names(prepared):
    settings = config(
        prepared, sources=("llava:twelve", "easy-vqa"), num_images=(None, 20),
        tasks=("captioning", "instruction"), max_images=2,
    )  # fmt: skip
    records = [open_sources(config(prepared))[0], []]
    batches = one_epoch(settings, task="captioning", template="plain_eos", records=records)
    assert len(rows_by_id(batches)) == 12
    alone = config(prepared, tasks=("captioning",))
    with pytest.raises(ValueError, match="no source is for 'instruction', they are for captioning"):
        one_epoch(alone)


def test_texts_and_questions_for_tokenizers_and_calibration(prepared):
    records = open_sources(config(prepared))
    assert {"hi", "ho", "a3", "more?"} <= set(training_texts(records))
    asked = first_questions(records, count=4)
    assert len(asked) == 4 and all(item.question[0] == "q" for item in asked)
    assert "<image>" not in asked[0].question
    assert Image.open(io.BytesIO(asked[0].image)).size == (32, 24)
    pairs = first_questions(records, count=2, of_image=2)
    assert len(pairs) % 2 == 0 and pairs
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert one.question != other.question and one.image is other.image
