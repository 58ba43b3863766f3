"""The reversible residual stack and the chunked feed-forward network: an independent implementation, gradients, memory."""

import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import models
from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context
from efficient_attn.models import reversible
from efficient_attn.models.feed_forward import FeedForward
from efficient_attn.models.trunk import Trunk
from efficient_attn.tasks.listops import ListOps
from efficient_attn.tasks.synthetic import MultiQueryRecall

pytestmark = pytest.mark.usefixtures("quick_compile")

TASK = ListOps(max_depth=5, max_args=5, min_length=20, max_length=40, max_tokens=24 + 16, num_examples=100)
LM = MultiQueryRecall(length=24, vocab_size=32, num_pairs=3)
REFORMER = dict(name="reformer", num_heads=2, chunk_size=8, num_buckets=4, rounds=2)


def build(task=TASK, **config):
    return models.build(dict(width=8, mixer=REFORMER, feed_forward_width=16, residual="reversible") | config, task)


def tokens(length: int, rows: int = 2):
    return jnp.asarray(np.random.default_rng(0).integers(1, 15, (rows, length)), jnp.int32)


def test_oracle(oracle_dir):
    stated = json.loads((oracle_dir / "reversible_residual.json").read_text())
    assert any("y1=x1+f(x2); y2=x2+g(y1)" in line for line in stated["semantics"])
    arrays = {name: jnp.asarray(x) for name, x in np.load(oracle_dir / "reversible_residual.npz").items()}
    depth = next(i for i in itertools.count() if f"w.{i}.0.0.weight" not in arrays)
    names = [f"{layer}.{half}.0" for layer in range(depth) for half in (0, 1)]
    params = [{part: arrays[f"w.{name}.{part}"] for part in ("weight", "bias")} for name in names]

    def branch(p, x, _):
        return jnp.tanh(x @ p["weight"].T + p["bias"][None, None])

    def loss(params, x):
        streams = reversible.run((branch,) * len(names), params, tuple(jnp.split(x, 2, axis=-1)), [None] * len(names))
        y = jnp.concatenate(streams, axis=-1)
        return jnp.sum(y * arrays["in.dy"]), y

    (gradients, dx), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, arrays["in.x"])
    np.testing.assert_allclose(y, arrays["out.y"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(dx, arrays["out.dx"], rtol=0, atol=1e-4)
    for name, gradient in zip(names, gradients, strict=True):
        for part, x in gradient.items():
            np.testing.assert_allclose(x, arrays[f"out.grad.{name}.{part}"], rtol=0, atol=1e-4)


class Stack(Trunk):
    """The layers alone."""

    @nn.compact
    def __call__(self, x, ctx):
        return self.blocks(x, ctx)


def test_gradients_are_those_of_ordinary_autodiff(monkeypatch):
    """With padding, hashes that are drawn, and dropout of every kind."""
    mask = jnp.arange(30)[None, :] < jnp.array([[30], [21]])
    sizes = dict(vocab_size=None, num_outputs=1, length=30, depth=2, width=8, feed_forward_width=16, feed_forward_chunk=8)
    mixer = REFORMER | dict(dropout=0.2)
    with jax.enable_x64(True):
        model = Stack(residual="reversible", mixer=mixer, dropout=0.3, dtype=jnp.float64, **sizes)
        x = jax.random.normal(jax.random.key(1), (2, 30, 8), jnp.float64)
        variables = jax.jit(model.init)(jax.random.key(0), x, Context())
        variables = jax.tree.map(lambda p: p.astype(jnp.float64), variables)

        def gradient():
            def loss(v, x, key):
                return jnp.sum(model.apply(v, x, Context(mask=mask, train=True), rngs={"dropout": key}) ** 2)

            return jax.jit(jax.grad(loss, argnums=(0, 1)))

        reversed_ = gradient()
        ours, other = (reversed_(variables, x, jax.random.key(i)) for i in (2, 3))
        monkeypatch.setattr(reversible, "run", reversible.run.__wrapped__)
        plain = gradient()(variables, x, jax.random.key(2))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert max(np.max(np.abs(a - b)) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other))) > 0.1


def temporary_bytes(residual: str, depth: int) -> int:
    """Of the compiled gradient: what is alive besides the parameters and their gradients.

    Left out of the compiler is the CPU's library of reductions, which makes XLA spread every norm's scale, a parameter, to the
    size of the activations, and do so for all layers at the start.
    """
    model = build(depth=depth, residual=residual, mixer=dict(name="softmax", num_heads=2, implementation="reference"))
    x = jax.ShapeDtypeStruct((64, 40), jnp.int32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, Context()), x)
    gradient = jax.jit(jax.grad(lambda v, x: jnp.sum(model.apply(v, x, Context()))))
    compiled = gradient.lower(variables, x).compile(compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""})
    return compiled.memory_analysis().temp_size_in_bytes


def test_activation_memory_does_not_grow_with_depth():
    spared = [temporary_bytes("reversible", depth) for depth in (2, 4, 8)]
    assert max(spared) < 1.01 * min(spared)
    kept = [temporary_bytes("standard", depth) for depth in (2, 4)]
    assert kept[1] > 1.8 * kept[0] > 1.8 * spared[0]


def test_parameters_are_those_of_the_standard_stack():
    def shapes(residual: str):
        model = build(depth=2, residual=residual)
        return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 40), jnp.int32), Context()))

    assert shapes("standard") == shapes("reversible")


def test_decodes_as_it_trains():
    model = build(LM, depth=2, mixer=dict(name="softmax", num_heads=2, causal=True))
    x = jnp.asarray(np.random.default_rng(0).integers(1, 32, (2, 24)), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), x, Context())
    parallel = jax.jit(model.apply)(variables, x, Context())
    cache = jax.jit(model.init)(jax.random.key(0), x, Context(decode=True))["cache"]
    step = jax.jit(lambda cache, x: model.apply({**variables, "cache": cache}, x, Context(decode=True), mutable=["cache"]))
    outputs = []
    for part in (x[:, :9], x[:, 9:]):
        y, updated = step(cache, part)
        cache = updated["cache"]
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), parallel, rtol=0, atol=2e-5)


def test_what_it_does_not_go_with_is_an_error():
    for config, message in {
        "feed_forward_width": (dict(feed_forward_width=0), "more than 0"),
        "prenorm": (dict(prenorm=False), "a norm of the sum cannot be inverted"),
        "remat": (dict(remat="full"), "'none'"),
        "bias": (dict(bias=dict(name="alibi")), "model.mixer.bias"),
        "positions": (dict(positions=dict(name="learned", per_layer=True)), "not per_layer"),
    }.values():
        with pytest.raises(ConfigError, match=rf"model.residual='reversible' needs model.*{message}"):
            build(depth=1, **config)
    with pytest.raises(ConfigError, match="goes with no mixer that carries a memory"):
        build(LM, depth=1, mixer=dict(name="transformer_xl", causal=True, num_heads=2, memory_length=4))
    with pytest.raises(ConfigError, match=r"model.residual='reversibel' is unknown.*standard"):
        build(depth=1, residual="reversibel")
    with pytest.raises(ConfigError, match="these layers also have batch_stats"):
        jax.eval_shape(lambda: build(depth=1, norm="batch").init(jax.random.key(0), tokens(40), Context()))
    routing = dict(name="routing", num_heads=2)
    with pytest.raises(ConfigError, match="these layers also have centroids"):
        jax.eval_shape(lambda: build(depth=1, mixer=routing).init(jax.random.key(0), tokens(40), Context()))


@pytest.mark.parametrize("length", [1, 16, 37])
def test_chunks_of_a_feed_forward_network_change_nothing(length):
    whole, chunked = FeedForward(width=32, kind="geglu"), FeedForward(width=32, kind="geglu", chunk=8)
    x = jax.random.normal(jax.random.key(0), (2, length, 8))
    variables = whole.init(jax.random.key(1), x, Context())
    assert jax.tree.structure(variables) == jax.tree.structure(chunked.init(jax.random.key(1), x, Context()))

    def gradient(module):
        return jax.jit(jax.value_and_grad(lambda v, x: jnp.sum(module.apply(v, x, Context()) ** 2), argnums=(0, 1)))

    for a, b in zip(*(jax.tree.leaves(gradient(m)(variables, x)) for m in (whole, chunked)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_bound_the_memory_of_a_feed_forward_network():
    def temporary(**config) -> int:
        module, x = FeedForward(width=512, **config), jax.ShapeDtypeStruct((1, 1024, 8), jnp.float32)
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context()), x)
        gradient = jax.jit(jax.grad(lambda v, x: jnp.sum(module.apply(v, x, Context()) ** 2)))
        return gradient.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(chunk=64) < temporary() / 4
