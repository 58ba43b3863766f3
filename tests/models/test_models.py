"""Models as wholes: padding, causality, pooling, pairs, decoding, rematerialisation, hybrids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import models
from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context
from efficient_attn.models.blocks import POOLINGS
from efficient_attn.models.feed_forward import FEED_FORWARDS
from efficient_attn.plan import example_batch
from efficient_attn.tasks.image import Image
from efficient_attn.tasks.listops import ListOps
from efficient_attn.tasks.retrieval import Retrieval
from efficient_attn.tasks.synthetic import MultiQueryRecall

pytestmark = pytest.mark.usefixtures("quick_compile")

SHORT = ListOps(max_depth=5, max_args=5, min_length=20, max_length=40, max_tokens=24 + 16, num_examples=100)
LM = MultiQueryRecall(length=24, vocab_size=32, num_pairs=3)
SOFTMAX, S5 = dict(name="softmax", num_heads=2), dict(name="s5", state_dim=8, blocks=2)


def make(task, seed=0, **config):
    model = models.build(dict(depth=2, width=8, mixer=SOFTMAX) | config, task)
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), example_batch(task, 2))
    return model, model.init(jax.random.key(seed), batch["inputs"], Context())


def tokens(rows, length, high=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, high, (rows, length)), jnp.int32)


@pytest.mark.parametrize("mixer", [SOFTMAX, S5], ids=lambda m: m["name"])
@pytest.mark.parametrize(("pooling", "norm"), [*((pooling, "layer") for pooling in POOLINGS), ("mean", "rms"), ("mean", "batch")])
def test_classifier_does_not_see_padding(pooling, mixer, norm):
    model, variables = make(SHORT, pooling=pooling, mixer=mixer, norm=norm, positions=dict(name="learned"))
    x = tokens(2, 40)
    mask = jnp.arange(40)[None, :] < jnp.array([[40], [21]])
    y = model.apply(variables, x, Context(mask=mask))
    z = model.apply(variables, x.at[1, 21:].set(7), Context(mask=mask))
    assert y.shape == (2, 10)
    np.testing.assert_allclose(y, z, atol=1e-6)


@pytest.mark.parametrize("mixer", [SOFTMAX, S5, (S5, SOFTMAX)], ids=["softmax", "s5", "hybrid"])
def test_language_model_is_causal(mixer):
    causal = tuple(m | dict(causal=True) for m in mixer) if isinstance(mixer, tuple) else mixer | dict(causal=True)
    model, variables = make(LM, mixer=causal)
    x = tokens(2, 24, 32)
    y, z = (model.apply(variables, v, Context()) for v in (x, x.at[:, 13:].set(3)))
    np.testing.assert_array_equal(y[:, :13], z[:, :13])
    assert np.any(y[:, 13:] != z[:, 13:])


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned"])
def test_language_model_decodes_as_it_trains(positions):
    mixer = (S5 | dict(causal=True), SOFTMAX | dict(causal=True, rotation=dict(name="rotary")))
    model, variables = make(LM, mixer=mixer, positions=dict(name=positions), feed_forward_width=16, tied=True)
    x = tokens(3, 24, 32)
    parallel = model.apply(variables, x, Context())
    cache = model.init(jax.random.key(0), x, Context(decode=True))["cache"]
    outputs = []
    for part in (x[:, :9], x[:, 9:10], x[:, 10:]):
        y, updated = model.apply({**variables, "cache": cache}, part, Context(decode=True), mutable=["cache"])
        cache = updated["cache"]
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), parallel, atol=2e-5)


def test_tied_embeddings_share_their_table():
    _, tied = make(LM, mixer=SOFTMAX | dict(causal=True), tied=True)
    _, untied = make(LM, mixer=SOFTMAX | dict(causal=True), tied=False)
    assert "head" not in tied["params"] and "head" in untied["params"]


def test_language_model_refuses_bidirectional_mixers():
    with pytest.raises(ConfigError, match="a language model needs causal mixers"):
        make(LM, mixer=SOFTMAX)


def test_matcher_ties_its_towers():
    """Swapping the documents swaps x1 and x2 in [x1, x2, x1 x2, x1 - x2], and nothing else."""
    model, variables = make(Retrieval(max_bytes=20))
    x = jnp.stack([tokens(2, 20, 257), tokens(2, 20, 257, seed=1)], axis=1)
    mask = jnp.arange(20)[None, None, :] < jnp.array([[[20], [11]], [[5], [20]]])
    y = model.apply(variables, x, Context(mask=mask))
    first, second, product, difference = jnp.split(variables["params"]["match"]["kernel"], 4)
    match = {**variables["params"]["match"], "kernel": jnp.concatenate([second, first, product, -difference])}
    swapped = model.apply({"params": {**variables["params"], "match": match}}, x[:, ::-1], Context(mask=mask[:, ::-1]))
    assert y.shape == (2, 2)
    np.testing.assert_allclose(y, swapped, atol=1e-5)
    unchanged = model.apply(variables, x[:, ::-1], Context(mask=mask[:, ::-1]))
    assert np.max(np.abs(y - unchanged)) > 1e-4


def test_real_valued_inputs():
    model, variables = make(Image(as_tokens=False))
    y = model.apply(variables, jnp.ones((2, 1024, 1)), Context(mask=jnp.ones((2, 1024), bool)))
    assert y.shape == (2, 10) and variables["params"]["embed"]["kernel"].shape == (1, 8)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_neither_paths_nor_gradients(remat):
    plain, variables = make(SHORT, mixer=S5, feed_forward_width=16)
    spared, same = make(SHORT, mixer=S5, feed_forward_width=16, remat=remat)
    assert jax.tree.structure(variables) == jax.tree.structure(same)
    x, mask = tokens(2, 40), jnp.ones((2, 40), bool)

    def gradient(model):
        return jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, x, Context(mask=mask, train=True)) ** 2)))(variables)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(plain), gradient(spared))
    recomputed = str(jax.make_jaxpr(jax.grad(lambda v: jnp.sum(spared.apply(v, x, Context(mask=mask)))))(variables))
    assert "remat" in recomputed or "checkpoint" in recomputed


@pytest.mark.parametrize("kind", FEED_FORWARDS)
@pytest.mark.parametrize("prenorm", [True, False])
def test_feed_forwards_and_norm_order(kind, prenorm):
    model, variables = make(SHORT, feed_forward=kind, feed_forward_width=16, prenorm=prenorm)
    y = model.apply(variables, tokens(2, 40), Context())
    assert np.all(np.isfinite(y)) and ("gate" in variables["params"]["layer_0"]["mlp"]) == ("glu" in kind)
    other = models.build(
        dict(depth=2, width=8, mixer=SOFTMAX, feed_forward=kind, feed_forward_width=16, prenorm=not prenorm), SHORT
    )
    assert np.any(other.apply(variables, tokens(2, 40), Context()) != y)


def test_post_norm_normalises_what_a_block_returns():
    model, variables = make(SHORT, prenorm=False, final_norm=False, depth=1, embed_stddev=1.0)
    inputs = tokens(2, 40)
    _, captured = model.apply(variables, inputs, Context(), capture_intermediates=True, mutable=["intermediates"])
    x = captured["intermediates"]["layer_0"]["__call__"][0]
    np.testing.assert_allclose(jnp.mean(x, axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(x, axis=-1), 1.0, atol=1e-3)


def test_mixers_are_cycled_over_depth():
    _, variables = make(SHORT, depth=3, mixer=(SOFTMAX, S5))
    kinds = ["query" in variables["params"][f"layer_{i}"]["mixer"] for i in range(3)]
    assert kinds == [True, False, True]


def test_wrong_names_are_errors():
    for field, value in (("norm", "lyer"), ("feed_forward", "glue"), ("pooling", "men"), ("remat", "ful"), ("dtype", "float8")):
        with pytest.raises(ConfigError, match=f"model.{field}='{value}' is unknown"):
            make(SHORT, feed_forward_width=4, **{field: value})
    with pytest.raises(ConfigError, match="model has no argument 'widht'"):
        make(SHORT, widht=3)
