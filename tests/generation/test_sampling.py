"""Sampling as functions: what each keeps, by hand, and that draws follow the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.generation.sampling import GREEDY, Sampling, keep_top_k, keep_top_p, sample

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.45, 0.05]]))


def kept(logits) -> list[list[int]]:
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in logits]


def test_top_k_keeps_the_best():
    assert kept(keep_top_k(LOGITS, 2)) == [[1, 3], [0, 1, 2]]  # a tie with the second stays
    assert kept(keep_top_k(LOGITS, 0)) == kept(keep_top_k(LOGITS, 9)) == [[0, 1, 2, 3]] * 2


def test_top_p_keeps_the_fewest_with_enough_probability():
    assert kept(keep_top_p(LOGITS, 0.39)) == [[1], [2]]
    assert kept(keep_top_p(LOGITS, 0.65)) == [[1, 3], [0, 1, 2]]
    assert kept(keep_top_p(LOGITS, 0.75)) == [[1, 2, 3], [0, 1, 2]]
    assert kept(keep_top_p(LOGITS, 1.0)) == [[0, 1, 2, 3]] * 2


def draw(sampling: Sampling, count: int) -> np.ndarray:
    """Tokens [count, 2] of so many draws from each row."""
    keys, rows = jax.vmap(jax.random.key)(jnp.array([3, 4])), jnp.arange(2, dtype=jnp.int32)
    one = jax.jit(jax.vmap(lambda i: sample(LOGITS, keys, 0 * rows + i, sampling)))
    return np.asarray(one(jnp.arange(count, dtype=jnp.int32)))


def test_draws_follow_the_probabilities():
    tokens = draw(Sampling(temperature=0.5, top_k=3), 4000)
    expected = np.exp(2 * np.asarray(LOGITS))
    expected[0, 0] = expected[1, 3] = 0
    expected /= expected.sum(axis=1, keepdims=True)
    found = np.stack([np.bincount(column, minlength=4) for column in tokens.T]) / 4000
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / 4000**0.5)  # four standard deviations at most


def test_temperature_0_is_greedy_and_keys_decide_the_rest():
    assert np.all(draw(GREEDY, 3) == [1, 2])
    plain = draw(Sampling(), 50)
    np.testing.assert_array_equal(plain, draw(Sampling(), 50))
    assert np.any(plain[:, 0] != plain[:, 1])


@pytest.mark.parametrize("field", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)], ids=str)
def test_wrong_fields_are_named(field):
    [(name, value)] = field.items()
    with pytest.raises(ConfigError, match=f"{name}={value} must be"):
        Sampling(**field)
