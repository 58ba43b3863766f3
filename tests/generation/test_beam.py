"""Beam search: a beam as wide as the tree finds the best sequence; a narrow one is greedy; blocks change nothing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.generation.beam import beam_search
from efficient_attn.generation.decoding import Decoder
from efficient_attn.mixers import Context
from tests.generation.lm import VOCAB, language_model

PROMPT = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def log_probabilities(new: int) -> dict[tuple[int, ...], float]:
    """Of every continuation by `new` tokens, without a cache."""
    model, variables = language_model("hybrid")
    every = list(itertools.product(range(VOCAB), repeat=new))
    tokens = jnp.array([(*PROMPT, *sequence) for sequence in every], jnp.int32)
    scores = jax.nn.log_softmax(jax.jit(lambda v, x: model.apply(v, x, Context()))(variables, tokens), axis=-1)
    at = np.arange(len(PROMPT) - 1, len(PROMPT) + new - 1)
    return {s: float(sum(scores[i, at[j], s[j]] for j in range(new))) for i, s in enumerate(every)}


@pytest.mark.parametrize("paging", [None, (80, 4)], ids=["contiguous", "paged"])
def test_a_wide_beam_finds_the_best(paging):
    decoder = Decoder(*language_model("hybrid"), paging)
    scores = log_probabilities(2)
    found = beam_search(decoder, PROMPT, num_beams=VOCAB, max_tokens=2)
    best = sorted(scores, key=scores.get, reverse=True)
    assert [hypothesis.tokens for hypothesis in found[:3]] == best[:3]
    np.testing.assert_allclose([h.log_probability for h in found[:3]], [scores[s] for s in best[:3]], atol=1e-4)
    stop = best[0][0]
    ended = beam_search(decoder, PROMPT, num_beams=VOCAB, max_tokens=2, stop=stop, length_penalty=0.0)
    assert ended[0].tokens == (stop,) and all(stop not in h.tokens[:-1] for h in ended)


def test_narrow_beams_differ_by_their_layout_in_nothing():
    found = [
        beam_search(Decoder(*language_model("hybrid"), paging), PROMPT, num_beams=2, max_tokens=8) for paging in (None, (20, 4))
    ]
    assert [h.tokens for h in found[0]] == [h.tokens for h in found[1]] and len(found[0][0].tokens) == 8


def test_wrong_arguments_are_said():
    decoder = Decoder(*language_model("hybrid"), (4, 4))
    with pytest.raises(ConfigError, match="num_beams=0"):
        beam_search(decoder, PROMPT, num_beams=0, max_tokens=3)
    with pytest.raises(ConfigError, match="2 beams of 8 tokens may not fit"):
        beam_search(decoder, PROMPT, num_beams=2, max_tokens=3)
