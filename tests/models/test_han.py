"""HAN against its equations in NumPy, padding, and as a configuration that trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lra_text
from efficient_attn import models
from efficient_attn.arguments import ConfigError
from efficient_attn.config import experiment
from efficient_attn.mixers import Context
from efficient_attn.models.han import HAN
from efficient_attn.plan import make_plan
from efficient_attn.steps import train_step
from efficient_attn.tasks.text import Text

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, SENTENCE = 3, 11, 4


def make(**options):
    model = HAN(vocab_size=7, num_outputs=3, length=L, width=5, hidden=2, sentence_length=SENTENCE, **options)
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.integers(0, 7, (B, L)), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs, Context())
    return model, jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.5, size=p.shape), jnp.float32), shapes), inputs


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(p, x):
    """States of r, z, n gates, the reset after the recurrent product, h = (1 - z) n + z h; x [T, E]."""
    h, states = np.zeros(p["hr"]["kernel"].shape[0]), []
    for step in x:
        gates = {g: step @ p[f"i{g}"]["kernel"] + p[f"i{g}"]["bias"] for g in "rzn"}
        r, z = (sigmoid(gates[g] + h @ p[f"h{g}"]["kernel"]) for g in "rz")
        n = np.tanh(gates["n"] + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"]))
        h = (1 - z) * n + z * h
        states.append(h)
    return np.array(states)


def level(p, x):
    h = np.concatenate([gru(p["forward"], x), gru(p["backward"], x[::-1])[::-1]], axis=1)
    u = np.tanh(h @ p["attention"]["hidden"]["kernel"] + p["attention"]["hidden"]["bias"])
    e = np.exp(u @ p["attention"]["context"])
    return e / e.sum() @ h


def test_is_its_equations_on_what_is_real():
    model, variables, inputs = make()
    lengths = [L, 6, 4]
    mask = jnp.arange(L)[None] < jnp.array(lengths)[:, None]
    ours = jax.jit(model.apply)(variables, inputs, Context(mask=mask))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    for row, n, score in zip(np.asarray(inputs), lengths, ours):
        tokens = p["embed"]["embedding"][row[:n]]
        sentences = [level(p["words"], tokens[start : start + SENTENCE]) for start in range(0, n, SENTENCE)]
        expected = level(p["sentences"], np.array(sentences)) @ p["head"]["kernel"] + p["head"]["bias"]
        np.testing.assert_allclose(score, expected, rtol=0, atol=1e-5)


def test_padding_never_leaks_and_an_empty_row_is_finite():
    model, variables, inputs = make()
    mask = jnp.arange(L)[None] < jnp.array([L, 5, 0])[:, None]
    run = jax.jit(lambda inputs: model.apply(variables, inputs, Context(mask=mask)))
    other = jnp.where(mask, inputs, (inputs + 1) % 7)
    np.testing.assert_array_equal(run(inputs), run(other))
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, inputs, Context(mask=mask)) ** 2)))(variables)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((run(inputs), gradient)))
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradient))


def test_a_configuration_trains():
    recipe = {**lra_text.RECIPES["han"], "task": dict(max_bytes=32)}
    recipe["model"] = {**recipe["model"], "width": 8, "hidden": 4, "sentence_length": 8}
    config = experiment(name="han", task=dict(name="text"), recipes={"han": recipe}, recipe="han", train=dict(batch_size=8))
    config.train.duration, config.optimizer.warmup, config.optimizer.schedule = "100 steps", "0 steps", "constant"
    config.optimizer.learning_rate = 0.02
    plan = make_plan(config)
    assert isinstance(plan.model, HAN)
    targets = np.arange(8) % 2
    inputs = np.random.default_rng(0).integers(5, 200, (8, 32)).astype(np.int32)
    inputs[:, 20] = np.where(targets, 3, 4)  # one byte tells
    batch = dict(inputs=inputs, mask=np.ones((8, 32), bool), targets=targets.astype(np.int32), weights=np.ones(8, np.float32))
    state, step = jax.jit(plan.init_state)(), jax.jit(lambda s, b: train_step(plan.model, plan.tx, s, b))
    losses = []
    for _ in range(30):
        state, sums = step(state, batch)
        losses.append(float(sums["loss"][0] / 8))
    assert losses[-1] < 0.5 * losses[0]


def test_errors():
    task = Text(max_bytes=16)
    with pytest.raises(ConfigError, match=r"hann.*did you mean 'han'"):
        models.build(dict(architecture="hann"), task)
    with pytest.raises(ConfigError, match="no argument 'depth'"):
        models.build(dict(architecture="han", depth=2), task)
    with pytest.raises(ConfigError, match="sentence_length=0 must be at least 1"):
        models.build(dict(architecture="han", sentence_length=0), task).init(
            jax.random.key(0), jnp.zeros((1, 4), jnp.int32), Context()
        )
    with pytest.raises(ConfigError, match=r"'han' has no model for 'lm' tasks; it has: classify"):
        models.constructor("han", "lm")
    model, variables, inputs = make()
    with pytest.raises(ValueError, match="no packed documents"):
        model.apply(variables, inputs, Context(segment_ids=inputs))
