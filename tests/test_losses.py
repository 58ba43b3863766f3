"""Chunked cross-entropy: the sums and gradients of the plain one, whatever the chunk, the output layer and the weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn import models
from efficient_attn.losses import Unprojected, chunked_cross_entropy, cross_entropy
from efficient_attn.steps import eval_step, init_state, train_step
from efficient_attn.tasks.synthetic import MultiQueryRecall

B, L, E, V = 2, 13, 8, 50


def project(params, hidden):
    return hidden @ params["kernel"] + params["bias"][None, None]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(rng.standard_normal((E, V))), "bias": jnp.asarray(rng.standard_normal(V))}
        yield (
            params, jnp.asarray(rng.standard_normal((B, L, E))), jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32),
            jnp.asarray(rng.uniform(0, 2, (B, L))),
        )  # fmt: skip


@pytest.mark.parametrize("chunk, smoothing", [(1, 0.0), (5, 0.3), (64, 0.0)])
def test_sums_and_all_gradients_are_those_of_the_plain_loss(arrays, chunk, smoothing, quick_compile):
    params, hidden, targets, weights = arrays

    def plain(params, hidden, weights):
        sums = cross_entropy(project(params, hidden), targets, weights, smoothing)
        return sums["loss"][0] / 7.0, sums

    def chunked(params, hidden, weights):
        sums = chunked_cross_entropy(Unprojected(hidden, params, project), targets, weights, smoothing, chunk=chunk)
        return sums["loss"][0] / 7.0, sums

    grads = [jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(params, hidden, weights) for f in (plain, chunked)]
    # the log-softmax is float32 whatever the inputs
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), *grads)
    undifferentiated = jax.jit(chunked)(params, hidden, weights)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), undifferentiated, grads[0][0][1])


@pytest.mark.parametrize("tied", [False, True])
def test_a_training_step_with_and_without_chunks(tied, quick_compile):
    task = MultiQueryRecall(length=16, vocab_size=32, num_pairs=2)
    model = models.build(dict(depth=1, width=16, tied=tied, mixer=dict(name="identity", causal=True)), task)
    batch = {k: jnp.asarray(v) for k, v in task.source("train").batch(np.arange(8)).items()}
    tx = optax.sgd(1.0)  # so that parameters show the gradient
    state = jax.jit(lambda: init_state(model, tx, 0, batch, ema=False))()
    steps = [jax.jit(functools.partial(train_step, model, tx, loss_chunk=chunk, accumulate=2)) for chunk in (0, 5)]
    (plain, sums), (chunked, chunked_sums) = (step(state, batch) for step in steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sums, chunked_sums)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), plain.params, chunked.params)
    evaluated = [jax.jit(functools.partial(eval_step, model, loss_chunk=chunk))(plain.evaluated(), batch) for chunk in (0, 5)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *evaluated)


def test_the_logits_of_all_positions_never_exist():
    params = {"kernel": jax.ShapeDtypeStruct((16, 4096), jnp.float32), "bias": jax.ShapeDtypeStruct((4096,), jnp.float32)}
    hidden, targets = jax.ShapeDtypeStruct((2, 256, 16), jnp.float32), jax.ShapeDtypeStruct((2, 256), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, 256), jnp.float32)

    def loss(params, hidden, targets, weights):
        return chunked_cross_entropy(Unprojected(hidden, params, project), targets, weights, chunk=16)["loss"][0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden, targets, weights).compile()
    logits = 2 * 256 * 4096 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 3
