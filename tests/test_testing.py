"""What `meteor_jax.testing` offers to tests of others."""

import functools
import inspect
import textwrap

import jax

from meteor_jax import testing
from meteor_jax.testing import DUMMY_PLANS, DummyTokenizer, dummy_config, dummy_plan


def test_the_example_of_its_documentation_runs():
    _, _, example = inspect.getdoc(testing).partition("In a test:\n\n")
    exec(textwrap.dedent(example), vars(testing) | {"jax": jax, "functools": functools})


def test_the_tokenizer_gives_text_back_and_fits_the_model():
    tokenizer = DummyTokenizer()
    text = "what is 7? a 'shape', here: no-one\nknows!"
    ids = tokenizer.encode(text, bos=True)
    assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids) == text
    assert tokenizer.encode("Äpfel") == tokenizer.encode("pfel")
    assert max(ids) < tokenizer.vocab_size == dummy_config().llama.vocab_size


def test_plans_fit_by_name_and_by_text():
    for name, text in DUMMY_PLANS.items():
        assert dummy_plan(name) == dummy_plan(text)
