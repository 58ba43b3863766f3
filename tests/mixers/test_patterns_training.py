"""Pattern mixers in a model: three training steps from a configuration, the published recipes, and a pattern of one's own."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import mixers
from efficient_attn.arguments import ConfigError
from efficient_attn.config import experiment
from efficient_attn.mixers import MIXERS, Attention, Context, Entry, build
from efficient_attn.plan import make_plan
from efficient_attn.steps import train_step
from kernels.attention import attend, biases, masks

SMALL = {
    "local": dict(window=4),
    "block_local": dict(block_size=4, look_back=1),
    "image_local_1d": dict(query_block=4, memory=4),
    "image_local_2d": dict(width=4, query_height=2, query_width=2, memory_height=2),
    "blockbert": {},
    "sparse_transformer": dict(stride=4),
    "longformer": dict(window=4),
    "bigbird": dict(block_size=2, num_random=1),
    "etc": dict(global_tokens=2, radius=3, clip=2),
    "gaussian": {},
    "synthesizer": dict(mode="dense", max_length=16),
}
CLASSIFIED = dict(name="listops", max_depth=2, max_args=3, min_length=4, max_length=16, max_tokens=16, num_examples=100)
MODELLED = dict(name="multi_query_recall", length=16, vocab_size=20, num_pairs=2, num_examples=64)


@pytest.mark.parametrize("name", SMALL)
def test_three_training_steps(quick_compile, name):
    """A language model where the mechanism has a causal form, else a classifier."""
    model = dict(depth=1, width=8, positions=dict(name="learned"), mixer=dict(name=name, num_heads=2, **SMALL[name]))
    recipe = dict(model=model, optimizer=dict(learning_rate=1e-2), train=dict(batch_size=8, duration="3 steps"))
    task = MODELLED if MIXERS[name].causal else CLASSIFIED
    plan = make_plan(experiment(name="small", task=task, recipes={"a": recipe}, recipe="a"))
    rng = np.random.default_rng(0)
    inputs = rng.integers(1, plan.task.vocab_size, size=(8, plan.task.length))
    is_lm = plan.task.head == "lm"
    batch = {
        "inputs": inputs.astype(np.int32),
        "mask": np.arange(plan.task.length)[None] < rng.integers(3, plan.task.length, size=(8, 1)),
        "targets": (inputs if is_lm else inputs[:, 0] % 10).astype(np.int32),
        "weights": np.ones(inputs.shape if is_lm else (8,), np.float32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    step = jax.jit(lambda state: train_step(plan.model, plan.tx, state, batch))
    first = state = jax.jit(plan.init_state)()
    losses = []
    for _ in range(3):
        state, sums = step(state)
        total, count = sums["loss"]
        losses.append(float(total / count))
    assert losses[2] < losses[1] < losses[0]
    before, after = first.params["layer_0"]["mixer"], state.params["layer_0"]["mixer"]
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)))


@pytest.mark.parametrize("task", ["listops", "text", "retrieval", "image", "pathfinder"])
def test_published_recipes_differ_by_their_mixer(task):
    """Those of Long Range Arena's repository have its layers, heads and patterns."""
    config = importlib.import_module(f"configs.lra_{task}").get_config
    mixer = {name: config(name).model.mixer for name in ("local", "sparse_transformer", "longformer", "synthesizer")}
    assert mixer["local"].block_size == (64 if task in ("image", "pathfinder") else 50)
    assert mixer["sparse_transformer"].global_tokens == (config("sparse_transformer").model.pooling == "cls")
    assert mixer["longformer"].window == 512 and mixer["longformer"].global_tokens == 0
    assert mixer["synthesizer"].mode == ("factorized_random" if task == "text" else "random")
    bigbird = config("bigbird").model
    assert [layer["seed"] for layer in bigbird.mixer] == list(range(bigbird.depth))
    assert all(layer["block_size"] == 64 and layer["num_random"] == 3 for layer in bigbird.mixer)


def test_a_form_that_does_not_exist_is_refused_before_anything_runs():
    recipe = dict(model=dict(depth=1, width=8, mixer=dict(name="bigbird", num_heads=2)))
    with pytest.raises(ConfigError, match="mixer 'bigbird' has no causal form"):
        make_plan(experiment(name="small", task=MODELLED, recipes={"a": recipe}, recipe="a"))
    recipe = dict(model=dict(depth=1, width=8, mixer=dict(name="synthesizer", num_heads=2, max_length=15)))
    with pytest.raises(ConfigError, match="16 positions is longer than max_length=15"):
        make_plan(experiment(name="small", task=MODELLED, recipes={"a": recipe}, recipe="a"))


def knight(q, k):
    """A pattern of one's own: neighbours, and every seventh key."""
    return (abs(q - k) <= 2) | (k % 7 == 0)


class Knight(Attention):
    def pattern(self, length):
        return masks.Predicate(knight)


def decay(score, q_pos, kv_pos, head, rate):
    """A bias of one's own, with a learned rate for each head."""
    return score - rate[head] * jnp.log1p(abs(q_pos - kv_pos))


def test_a_pattern_and_a_bias_of_ones_own(quick_compile, monkeypatch):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 20, 2, 4)) for i in range(3))
    rate, i, j = jnp.array([0.5, 2.0]), np.arange(20)[:, None], np.arange(20)[None]
    out = attend(q, k, v, mask=masks.Predicate(knight), bias=biases.Function(decay, rate))
    scores = np.einsum("blhd,bshd->bhls", q, k) / 2 - np.asarray(rate)[None, :, None, None] * np.log1p(abs(i - j))
    weights = np.where((abs(i - j) <= 2) | (j % 7 == 0), np.exp(scores), 0)
    expected = np.einsum("bhls,bshd->blhd", weights / weights.sum(axis=-1, keepdims=True), v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)

    monkeypatch.setattr(mixers, "MIXERS", {**MIXERS, "knight": Entry(Knight, cost="L")})
    module = build(dict(name="knight", num_heads=2, causal=True))
    x = jax.random.normal(jax.random.key(3), (1, 20, 8))
    variables = module.init(jax.random.key(4), x, Context())
    gradient = jax.grad(lambda x: jnp.sum(module.apply(variables, x, Context())[:, 17]))(x)
    assert np.flatnonzero(np.any(gradient[0] != 0, axis=-1)).tolist() == [0, 7, 14, 15, 16, 17]
