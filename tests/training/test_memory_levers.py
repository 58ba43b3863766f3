"""No lever that saves memory changes the loss, the gradients or what is sown, and every remat policy recomputes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn import models
from efficient_attn.models.blocks import REMAT_POLICIES
from efficient_attn.steps import init_state, train_step
from efficient_attn.tasks.synthetic import MultiQueryRecall

TASK = MultiQueryRecall(length=16, vocab_size=32, num_pairs=2)
LEVERS = {
    **{f"remat={name}": (dict(remat=name), {}) for name in REMAT_POLICIES if name != "none"},
    "feed_forward_chunk": (dict(feed_forward_chunk=5), {}),
    "all": (dict(remat="full", feed_forward_chunk=5), dict(loss_chunk=5, accumulate=2)),
}


def step_of(model_fields: dict, train_fields: dict):
    mixer = dict(name="identity", causal=True)
    model = models.build(dict(depth=2, width=8, feed_forward_width=16, mixer=mixer, **model_fields), TASK)
    return model, functools.partial(train_step, model, optax.sgd(1.0), **train_fields)


@pytest.fixture(scope="module")
def plain():
    batch = {k: jnp.asarray(v) for k, v in TASK.source("train").batch(np.arange(4)).items()}
    model, step = step_of({}, {})
    state = jax.jit(lambda: init_state(model, optax.sgd(1.0), 0, batch, ema=False))()
    return state, batch, jax.jit(step)(state, batch)


@pytest.mark.parametrize("lever", LEVERS)
def test_the_step_is_the_same(plain, lever, quick_compile):
    state, batch, expected = plain
    model_fields, train_fields = LEVERS[lever]
    found = jax.jit(step_of(model_fields, train_fields)[1])(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), found, expected)


def test_policies_keep_more_and_more(plain):
    """Weight products of the backward pass, recomputed ones among them, by policy."""
    state, batch, _ = plain

    def products(name: str) -> int:
        return str(jax.make_jaxpr(step_of(dict(remat=name), {})[1])(state, batch)).count("dot_general")

    counts = {name: products(name) for name in REMAT_POLICIES}
    assert counts["none"] == counts["dots"] == counts["all_dots"] < counts["branches"] < counts["full"], counts
