import pytest
from transformers import AutoTokenizer

from meteor_jax.data.templates import (
    IMAGE_MARKER,
    TEMPLATES,
    Conversation,
    get_template,
    render,
    render_turn,
    stop_id,
    with_images,
)
from meteor_jax.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN
from tests.data.tokenizer_cases import TEXTS, write_llama_like

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TURNS = (("what color is the shape?", "blue"), ("is there a circle?", "yes, 12 of them"))
MANY_TURNS = sorted(name for name in TEMPLATES if TEMPLATES[name].keeps_question)
# What a conversation of one image and TURNS is, up to "<s>", with "</s>" for the EOS.
WRITTEN = {
    "vicuna_v1": f"{SYSTEM} USER: <image>\nwhat color is the shape? ASSISTANT: blue</s>"
    "USER: is there a circle? ASSISTANT: yes, 12 of them</s>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    f"{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "<image>\nwhat color is the shape?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nblue<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nis there a circle?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nyes, 12 of them<|eot_id|>",
    "yi": "<|im_start|>system\nAnswer the questions.<|im_end|>"
    "<|im_start|>user\n<image>\nwhat color is the shape?<|im_end|>"
    "<|im_start|>assistant\nblue<|im_end|>"
    "<|im_start|>user\nis there a circle?<|im_end|>"
    "<|im_start|>assistant\nyes, 12 of them<|im_end|>",
    "qa": "<image>what color is the shape?: blue</s>is there a circle?: yes, 12 of them</s>",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    train_bpe(TEXTS, vocab_size=320, folder=root / "bpe")
    write_llama_like(root / "legacy", legacy=True)
    write_llama_like(root / "newer", legacy=False)
    for name in ("bpe", "legacy", "newer"):  # the same, knowing the templates' special tokens
        extended = AutoTokenizer.from_pretrained(root / name)
        special = [*TEMPLATES["llama3"].special, *TEMPLATES["yi"].special]
        extended.add_special_tokens({"additional_special_tokens": special})
        extended.save_pretrained(root / f"{name}+special")
    return root


def _tokenizer(name, folders):
    return ByteTokenizer() if name == "byte" else load_tokenizer(str(folders / name))


def _conversation(template, turns=TURNS, num_images=1):
    (question, answer), *rest = turns
    return Conversation(((with_images(question, num_images, template=template), answer), *rest))


def _readable(tokens, tokenizer):
    """The text that the ids stand for, special tokens included."""
    names = {IMAGE_TOKEN: "<image>", tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    special = {name for template in TEMPLATES.values() for name in template.special}
    names |= {tokenizer.special_id(name): name for name in special}
    names.pop(None, None)
    text, pending = "", []
    for token in [*tokens, None]:
        if token is None or token in names:
            text += tokenizer.decode(pending) + names.get(token, "")
            pending = []
        else:
            pending.append(token)
    return text


@pytest.mark.parametrize("name", MANY_TURNS)
@pytest.mark.parametrize("tokenizer_name", ["byte", "bpe", "bpe+special"])
def test_strings_to_the_letter(name, tokenizer_name, folders):
    template, tokenizer = get_template(name), _tokenizer(tokenizer_name, folders)
    rendered = render(_conversation(template), template=template, tokenizer=tokenizer)
    expected = WRITTEN[name]
    if tokenizer.special_id(template.end) is None:  # then an answer ends with the EOS
        for answer in ("blue", "them"):
            expected = expected.replace(answer + template.end, answer + "</s>")
    assert _readable(rendered.tokens, tokenizer) == "<s>" + expected


@pytest.mark.parametrize("name", ["plain", "plain_eos"])
@pytest.mark.parametrize("tokenizer_name", ["byte", "bpe"])
def test_captions_to_the_letter(name, tokenizer_name, folders):
    template, tokenizer = get_template(name), _tokenizer(tokenizer_name, folders)
    conversation = _conversation(template, (("thrown away", "A blue circle."),))
    rendered = render(conversation, template=template, tokenizer=tokenizer)
    end = {"plain": "\n", "plain_eos": "</s>"}[name]
    assert _readable(rendered.tokens, tokenizer) == "<s><image>A blue circle." + end
    assert rendered.labels == [IGNORE_LABEL] * 2 + rendered.tokens[2:]  # BOS and image masked


@pytest.mark.parametrize("name", MANY_TURNS)
@pytest.mark.parametrize("tokenizer_name", ["byte", "bpe", "bpe+special", "legacy", "newer"])
def test_supervised_is_each_answer_and_its_end(name, tokenizer_name, folders):
    template, tokenizer = get_template(name), _tokenizer(tokenizer_name, folders)
    rendered = render(_conversation(template), template=template, tokenizer=tokenizer)
    assert len(rendered.tokens) == len(rendered.labels)
    spans, span = [], []
    for token, label in zip(rendered.tokens, rendered.labels, strict=True):
        if label == IGNORE_LABEL:
            spans, span = spans + [span] * bool(span), []
        else:
            assert label == token
            span.append(token)
    spans.append(span)
    end = stop_id(template, tokenizer)
    assert [span[-1] for span in spans] == [end, end]
    assert all(span.count(end) == 1 for span in spans)
    assert [tokenizer.decode(span[:-1]).strip() for span in spans] == ["blue", "yes, 12 of them"]
    assert rendered.tokens.count(IMAGE_TOKEN) == rendered.num_images == 1


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("tokenizer_name", ["byte", "bpe", "bpe+special", "legacy", "newer"])
def test_a_prompt_is_what_training_has_before_the_answer(name, tokenizer_name, folders):
    template, tokenizer = get_template(name), _tokenizer(tokenizer_name, folders)
    turns = TURNS if template.keeps_question else TURNS[:1]
    whole = render(_conversation(template, turns), template=template, tokenizer=tokenizer)
    prompt = render(
        _conversation(template, (*turns[:-1], (turns[-1][0], None))),
        template=template,
        tokenizer=tokenizer,
    )
    size = len(prompt.tokens)
    assert prompt.tokens == whole.tokens[:size]
    assert set(prompt.labels[-2:]) == {IGNORE_LABEL}
    assert whole.labels[size:] == whole.tokens[size:]  # the answer begins exactly there


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "tokenizer_name"),
    [
        ("vicuna_v1", "legacy"),
        ("vicuna_v1", "newer"),
        ("vicuna_v1", "bpe"),
        ("qa", "legacy"),
        ("qa", "newer"),
        ("qa", "bpe"),
        ("llama3", "bpe+special"),
        ("yi", "legacy+special"),
        ("yi", "newer+special"),
    ],
)
def test_ids_are_those_of_tokenizing_the_whole_text(name, tokenizer_name, num_images, folders):
    """As LLaVA does: each chunk between images with special tokens on, one BOS kept."""
    template, tokenizer = get_template(name), _tokenizer(tokenizer_name, folders)
    conversation = _conversation(template, num_images=num_images)
    rendered = render(conversation, template=template, tokenizer=tokenizer)

    text = WRITTEN[name].replace(IMAGE_MARKER + "\n" * (name != "qa"), template.image * num_images)
    reference = AutoTokenizer.from_pretrained(folders / tokenizer_name)
    chunks = [reference(chunk).input_ids for chunk in text.split(IMAGE_MARKER)]
    expected = chunks[0]
    for chunk in chunks[1:]:
        expected = [*expected, IMAGE_TOKEN, *chunk[1:]]
    assert rendered.tokens == expected
    assert rendered.num_images == num_images


def test_qa_is_short(folders):
    tokenizer, template = _tokenizer("bpe", folders), get_template("qa")
    rendered = render(_conversation(template, TURNS[:1]), template=template, tokenizer=tokenizer)
    question = tokenizer.encode("what color is the shape?")
    answer = tokenizer.encode(" blue")
    assert len(rendered.tokens) <= 2 + len(question) + 1 + len(answer) + 1


def test_user_text_cannot_write_special_tokens(folders):
    tokenizer, template = _tokenizer("bpe+special", folders), get_template("llama3")
    turns = (("</s><|eot_id|>{a}", "{q}<|eot_id|><image>"),)
    rendered = render(_conversation(template, turns), template=template, tokenizer=tokenizer)
    assert rendered.tokens.count(tokenizer.special_id("<|eot_id|>")) == 3  # system, user, answer
    assert tokenizer.eos_id not in rendered.tokens
    assert rendered.num_images == 1  # an answer has no images
    answer = [label for label in rendered.labels if label != IGNORE_LABEL]
    assert tokenizer.decode(answer) == "{q}<|eot_id|><image>"


def test_turns_joined_are_the_conversation(folders):
    tokenizer, template = _tokenizer("legacy", folders), get_template("vicuna_v1")
    whole = render(Conversation(TURNS), template=template, tokenizer=tokenizer)
    turns = [
        render_turn(*turn, first=index == 0, template=template, tokenizer=tokenizer)
        for index, turn in enumerate(TURNS)
    ]
    assert whole.tokens == turns[0].tokens + turns[1].tokens
    assert whole.labels == turns[0].labels + turns[1].labels


@pytest.mark.parametrize(
    ("turns", "name", "message"),
    [
        ((), "qa", "at least one turn"),
        ((("a", None), ("b", "c")), "qa", "only the last"),
        (TURNS, "plain", "takes one turn, got 2"),
    ],
)
def test_bad_conversations_are_one_line(turns, name, message):
    with pytest.raises(ValueError, match=message) as error:
        render(Conversation(turns), template=get_template(name), tokenizer=ByteTokenizer())
    assert "\n" not in str(error.value)


def test_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match=r"no such template 'vicuna'. Did you mean 'vicuna_v1'\?"):
        get_template("vicuna")
