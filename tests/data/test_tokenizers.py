import pickle

import pytest

from meteor_jax.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    load_tokenizer,
    train_bpe,
)
from tests.data.tokenizer_cases import TEXTS, write_llama_like


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_bpe(TEXTS, vocab_size=320, folder=folder)
    return folder


def test_bytes_round_trip_and_skip_specials():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("Größe 5 </s>", bos=True)
    assert ids[0] == tokenizer.bos_id and max(ids[1:]) < 256  # "</s>" in a text is only text
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id, -200]) == "Größe 5 </s>"
    assert tokenizer.special_id("</s>") == tokenizer.eos_id
    assert tokenizer.special_id("<|eot_id|>") is None


def test_bpe_round_trip(bpe_folder):
    tokenizer = load_tokenizer(str(bpe_folder))
    assert 260 < tokenizer.vocab_size <= 320
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == 3
    text = " Größe </s> what color ☃ 1999\n"
    ids = tokenizer.encode(text, bos=True)
    assert ids[0] == tokenizer.bos_id and tokenizer.eos_id not in ids
    assert tokenizer.decode([-200, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bpe_digits_never_merge(bpe_folder):
    tokenizer = HuggingFaceTokenizer(bpe_folder)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12 37")] == ["1", "2", " ", "3", "7"]


def test_bpe_training_is_deterministic(bpe_folder, tmp_path):
    train_bpe(iter(TEXTS), vocab_size=320, folder=tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (bpe_folder / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # nothing unfinished is left


def test_bpe_never_overwrites_and_leaves_nothing_unfinished(bpe_folder, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        train_bpe(TEXTS, vocab_size=320, folder=bpe_folder)
    assert [path.name for path in bpe_folder.parent.iterdir()] == [bpe_folder.name]
    with pytest.raises(ValueError, match="at least 260"):
        train_bpe(TEXTS, vocab_size=100, folder=tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_bpe_spec_trains_once_then_loads(tmp_path):
    folder = tmp_path / "tokenizer"
    first = load_tokenizer("bpe:300", folder=folder, texts=lambda: TEXTS)
    again = load_tokenizer("bpe:300", folder=folder, texts=lambda: pytest.fail("trained twice"))
    assert first.encode(TEXTS[1]) == again.encode(TEXTS[1])
    with pytest.raises(ValueError, match="made for 300 pieces, the config asks for 'bpe:400'"):
        load_tokenizer("bpe:400", folder=folder)
    with pytest.raises(ValueError, match="train first"):
        load_tokenizer("bpe:300", folder=tmp_path / "elsewhere")


def test_bpe_of_the_parameters_is_copied_instead_of_trained(bpe_folder, tmp_path):
    folder, absent = tmp_path / "tokenizer", tmp_path / "encoders" / "tokenizer"
    texts = ["other texts make other pieces"] * 9
    own = load_tokenizer("bpe:320", folder=tmp_path / "own", texts=lambda: texts)
    found = load_tokenizer(
        "bpe:320", folder=folder, texts=lambda: texts, inherit=[absent, bpe_folder]
    )
    expected = load_tokenizer("bpe:320", folder=bpe_folder)
    assert found.encode(TEXTS[1]) == expected.encode(TEXTS[1]) != own.encode(TEXTS[1])
    # What lies in the run's own folder stays.
    again = load_tokenizer("bpe:320", folder=folder, inherit=[tmp_path / "own"])
    assert again.encode(TEXTS[1]) == expected.encode(TEXTS[1])
    with pytest.raises(ValueError, match="made for 320 pieces"):
        load_tokenizer("bpe:300", folder=tmp_path / "smaller", inherit=[bpe_folder])


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_spaces(tmp_path, legacy):
    reference = write_llama_like(tmp_path, legacy=legacy)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_id == reference.unk_token_id  # it has no pad token of its own
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.encode("a shape", bos=True) == reference.encode("a shape")

    question, answer = "what color?", " blue"
    joined = tokenizer.encode(question) + tokenizer.encode(answer, after="text")
    assert joined == tokenizer.encode(question + answer)
    assert tokenizer.encode("blue", after="text") != tokenizer.encode("blue")
    behind = reference.encode("</s>is there", add_special_tokens=False)
    assert tokenizer.encode("is there", after="special") == behind[1:]


def test_pad_is_added_where_there_is_neither_pad_nor_unknown(tmp_path):
    reference = write_llama_like(tmp_path, legacy=True)
    reference.unk_token = None
    reference.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_id == len(reference)
    assert tokenizer.vocab_size == len(reference) + 1


def test_slow_tokenizer_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode("a</s>b", bos=True)
    assert len(ids) == len("a</s>b") and tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a</s>b"


def test_pickled_tokenizer_is_the_same(bpe_folder):
    tokenizer = HuggingFaceTokenizer(bpe_folder)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("</s> blue", bos=True) == tokenizer.encode("</s> blue", bos=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bite", "Did you mean 'byte'?"),
        ("bpe:many", "expected 'bpe:SIZE'"),
        ("bpe:512", "needs a folder"),
        ("/no/such/folder", "got '/no/such/folder'"),
    ],
)
def test_bad_specs_are_one_line(spec, message):
    with pytest.raises(ValueError) as error:
        load_tokenizer(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="is not a Hugging Face tokenizer folder") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
