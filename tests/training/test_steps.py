"""The pure functions of training: exact sums, micro-batches, averages, reproducible randomness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn import models
from efficient_attn.steps import cross_entropy, eval_step, init_state, train_step
from efficient_attn.tasks.listops import ListOps
from efficient_attn.tasks.synthetic import MultiQueryRecall

pytestmark = pytest.mark.usefixtures("quick_compile")

SHORT = dict(max_depth=5, max_args=5, min_length=20, max_length=40, max_tokens=40, num_examples=100)


def classifier(**changes):
    config = dict(depth=2, width=16, feed_forward_width=16, mixer=dict(name="softmax", num_heads=2)) | changes
    return models.build(config, ListOps(**SHORT))


def batch_of(rows=8, length=40, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, length, (rows, 1))
    mask = np.arange(length)[None] < lengths
    return {
        "inputs": jnp.asarray(rng.integers(1, 16, (rows, length)) * mask, jnp.int32),
        "mask": jnp.asarray(mask),
        "targets": jnp.asarray(rng.integers(0, 10, rows), jnp.int32),
        "weights": jnp.asarray(rng.uniform(0.5, 2, rows), jnp.float32),
    }


def start(model, tx, batch, seed=0, ema=False):
    return jax.jit(lambda batch: init_state(model, tx, seed, batch, ema=ema))(batch)


def step(model, tx, state, batch, **options):
    return jax.jit(functools.partial(train_step, model, tx, **options))(state, batch)


def test_cross_entropy_by_hand():
    logits, targets = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([0, 2])
    sums = cross_entropy(logits, targets, jnp.array([1.0, 3.0]))
    nll = [np.log(np.exp(2) + 2) - 2, np.log(np.e + 2)]
    np.testing.assert_allclose(sums["loss"], (nll[0] + 3 * nll[1], 4.0), rtol=1e-6)
    np.testing.assert_allclose(sums["accuracy"], (1.0, 4.0))


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution():
    logits, targets = jax.random.normal(jax.random.key(0), (5, 7)), jnp.arange(5)
    smooth = cross_entropy(logits, targets, jnp.ones(5), 0.2)["loss"][0]
    mixed = 0.8 * jax.nn.one_hot(targets, 7) + 0.2 / 7
    np.testing.assert_allclose(smooth, -jnp.sum(mixed * jax.nn.log_softmax(logits)), rtol=1e-5)


def test_rows_of_weight_zero_change_nothing():
    model, tx = classifier(), optax.sgd(0.1)
    batch = batch_of()
    padded = {k: jnp.concatenate([v, jnp.zeros_like(v[:3])]) for k, v in batch.items()}
    state = start(model, tx, batch)
    (a, sums_a), (b, sums_b) = (step(model, tx, state, x) for x in (batch, padded))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), (a.params, sums_a), (b.params, sums_b))


@pytest.mark.parametrize("accumulate", [2, 8])
def test_micro_batches_give_the_same_step(accumulate):
    model, tx = classifier(), optax.sgd(0.1)
    batch = batch_of()
    state = start(model, tx, batch)
    whole, sums = step(model, tx, state, batch)
    parts, part_sums = step(model, tx, state, batch, accumulate=accumulate)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), whole.params, parts.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), sums, part_sums)


def test_randomness_is_a_function_of_seed_and_step():
    model, tx = classifier(dropout=0.5), optax.sgd(0.1)
    batch = batch_of()
    state = start(model, tx, batch)
    compiled = jax.jit(functools.partial(train_step, model, tx))
    (first, a), (_, again) = compiled(state, batch), compiled(state, batch)
    _, second = compiled(first, batch)
    assert a["loss"][0] == again["loss"][0]
    assert a["loss"][0] != second["loss"][0]
    assert int(first.step) == 1
    other = start(model, tx, batch, seed=1)
    assert not np.array_equal(other.rng, state.rng)


def test_average_of_parameters_is_what_evaluation_uses():
    model, tx = classifier(), optax.sgd(0.5)
    batch = batch_of()
    state = start(model, tx, batch, ema=True)
    new, _ = step(model, tx, state, batch, ema=0.75)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.params, new.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), new.ema, expected)
    assert new.evaluated()["params"] is new.ema


def test_batch_statistics_are_carried_and_used():
    model, tx = classifier(norm="batch"), optax.sgd(0.1)
    batch = batch_of()
    state = start(model, tx, batch)
    assert set(state.variables) == {"batch_stats"}
    new, _ = step(model, tx, state, batch)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.variables, new.variables)
    assert all(jax.tree.leaves(changed))
    a = eval_step(model, new.evaluated(), batch)[0]["loss"][0]
    b = eval_step(model, {"params": new.params, **state.variables}, batch)[0]["loss"][0]
    assert a != b


def test_sown_losses_are_added():
    import flax.linen as nn

    class Sows(nn.Module):
        @nn.compact
        def __call__(self, inputs, ctx):
            w = self.param("w", nn.initializers.ones, (3,))
            self.sow("losses", "penalty", 5.0 * jnp.sum(w))
            return jnp.zeros((inputs.shape[0], 10))

    tx = optax.sgd(1.0)
    batch = batch_of()
    for accumulate in (1, 4):
        state = start(Sows(), tx, batch)
        new, sums = step(Sows(), tx, state, batch, accumulate=accumulate)
        np.testing.assert_allclose(new.params["w"], 1 - 5.0, rtol=1e-6)
        np.testing.assert_allclose(sums["aux_loss"][0] / sums["aux_loss"][1], 15.0)


def test_one_step_learns_language_modelling_too():
    task = MultiQueryRecall(length=16, vocab_size=32, num_pairs=2)
    model = models.build(dict(depth=1, width=16, mixer=dict(name="softmax", causal=True)), task)
    tx = optax.adam(1e-2)
    batch = {k: jnp.asarray(v) for k, v in task.source("train").batch(np.arange(16)).items()}
    state = start(model, tx, batch)
    compiled = jax.jit(functools.partial(train_step, model, tx))
    losses = []
    for _ in range(30):
        state, sums = compiled(state, batch)
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
    assert losses[-1] < 0.5 * losses[0]
    assert sums["loss"][1] == 32  # only the queries count
