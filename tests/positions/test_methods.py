"""What holds of every rotation and every bias in attention: decoding, padding, packed documents; and of models through config."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn import positions
from efficient_attn.arguments import ConfigError
from efficient_attn.config import experiment
from efficient_attn.mixers import Attention, Context
from efficient_attn.plan import make_plan
from efficient_attn.steps import init_state, train_step
from tests.positions import position_cases as cases

B, L, E, CHUNK = 2, 12, 8, 4
INDEX = np.arange(L)[None]
SOFTMAX = dict(name="softmax", num_heads=2, implementation="reference")  # the dense form compiles fastest
METHODS = {f"rotation {name}": dict(rotation=given) for name, given in cases.ROTATIONS.items()}
METHODS |= {f"bias {name}": dict(bias=given) for name, given in cases.BIASES.items() if name != "none"}
METHODS |= {
    "rotation rotary, bias t5": dict(rotation=cases.ROTATIONS["rotary"], bias=cases.BIASES["t5"]),
    "rotation rerope, bias shaw": dict(rotation=cases.ROTATIONS["rerope"], bias=cases.BIASES["shaw"]),
}


pytestmark = pytest.mark.usefixtures("quick_compile")


def test_cases_cover_the_tables():
    assert cases.ROTATIONS.keys() == positions.ROTATIONS.keys() and cases.BIASES.keys() == positions.BIASES.keys()
    assert {given["name"] for given in cases.EMBEDDINGS.values()} == positions.EMBEDDINGS.keys()
    assert cases.SAMPLINGS.keys() == positions.SAMPLINGS.keys()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_padding_documents_and_decoding(method):
    """Alone = before padding = packed with another document = token by token, at every length on the way; and order matters."""
    module = Attention(num_heads=2, num_kv_heads=1, causal=True, implementation="reference", **method)
    x = jax.random.normal(jax.random.key(0), (B, L, E))
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context(decode=True)), x)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    variables = {"params": jax.tree.map(lambda s: 0.4 * jax.random.normal(next(keys), s.shape), shapes["params"])}
    alone = jax.jit(lambda x, length: module.apply(variables, x, Context(mask=jnp.broadcast_to(length > INDEX, (B, L)))))
    prefixes = {n: alone(x, n)[:, :n] for n in (CHUNK, 2 * CHUNK, L)}

    poisoned = jnp.where(INDEX[..., None] < CHUNK, x, 50.0)
    np.testing.assert_allclose(alone(poisoned, CHUNK)[:, :CHUNK], prefixes[CHUNK], atol=1e-5)

    reversed_past = jnp.concatenate([x[:, :-1][:, ::-1], x[:, -1:]], axis=1)  # the last token sees the same set
    moved = np.abs(alone(reversed_past, L) - prefixes[L])[:, -1].max()
    assert moved < 1e-5 if method == {"rotation": dict(name="none")} else moved > 1e-3

    context = Context(
        segment_ids=jnp.array([[3] * CHUNK + [1] * (L - CHUNK)] * B),
        positions=jnp.array([[*range(CHUNK), *range(L - CHUNK)]] * B),
    )
    packed = jax.jit(lambda x, context: module.apply(variables, x, context))(jnp.roll(x, CHUNK, axis=1), context)
    np.testing.assert_allclose(packed[:, CHUNK:], prefixes[L - CHUNK], atol=1e-5)

    cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes["cache"])
    step = jax.jit(lambda cache, x: module.apply({**variables, "cache": cache}, x, Context(decode=True), mutable=["cache"]))
    for start in range(0, L, CHUNK):
        out, updated = step(cache, x[:, start : start + CHUNK])
        cache = updated["cache"]
        np.testing.assert_allclose(out, prefixes[start + CHUNK][:, -CHUNK:], atol=2e-5)


def small(model):
    """The configuration of a tiny language model."""
    task = dict(name="multi_query_recall", vocab_size=32, length=16, num_pairs=2)
    model = dict(width=8, mixer=SOFTMAX) | model
    recipe = dict(model=model, train=dict(batch_size=2, duration="2 steps"))
    return experiment(name="small", task=task, recipes={"a": recipe}, recipe="a")


def one_step(model):
    """The gradient's paths that are zero after one training step of the configured model, and its loss."""
    plan = make_plan(small(model))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 32, (2, 16)), jnp.int32)
    batch = {"inputs": tokens, "mask": tokens > 0, "targets": tokens[:, ::-1], "weights": jnp.ones(tokens.shape)}
    tx = optax.sgd(1.0)
    state = jax.jit(lambda: init_state(plan.model, tx, 0, batch, ema=False))()
    new, sums = jax.jit(functools.partial(train_step, plan.model, tx))(state, batch)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, new.params)
    assert np.isfinite(sums["loss"][0]) and all(np.isfinite(x).all() for x in jax.tree.leaves(new.params))
    return {jax.tree_util.keystr(path) for path, value in jax.tree_util.tree_leaves_with_path(moved) if not value}


def test_all_rotations_and_biases_train():
    """A layer for each rotation, the biases in turn: every learned array gets a gradient (the bias of a key cannot have one)."""
    pairs = zip(cases.ROTATIONS.values(), itertools.cycle(cases.BIASES.values()))
    mixers = tuple(SOFTMAX | dict(rotation=rotation, bias=bias) for rotation, bias in pairs)
    assert len(mixers) >= len(cases.BIASES)
    assert all("'key']['bias']" in path for path in one_step(dict(depth=len(mixers), mixer=mixers)))


@pytest.mark.parametrize(
    ("embedding", "sampling"),
    [
        ("none", "shifted"),
        ("sinusoidal", "none"),
        ("sinusoidal, halves", "randomised"),
        ("learned", "shifted"),
        ("learned, per layer", "randomised"),
    ],
)
def test_embeddings_and_samplings_train(embedding, sampling):
    """The tables of learned positions, too, which are as long as the samplings reach."""
    model = dict(depth=2, positions=cases.EMBEDDINGS[embedding], position_sampling=cases.SAMPLINGS[sampling])
    assert not any("positions" in path for path in one_step(model))


def test_one_bias_for_all_layers():
    """One table under the trunk, none in the layers; its gradient passes through rematerialised layers."""
    model = dict(depth=2, bias=cases.BIASES["t5"])
    params = make_plan(small(model)).state.params
    assert params["position_bias"]["table"].shape == (2, 8) and "position_bias" not in params["layer_0"]["mixer"]
    assert not any("position_bias" in path for path in one_step(model | dict(remat="full")))
    with pytest.raises(ConfigError, match="shared by attention layers of one size"):
        make_plan(small(model | dict(mixer=(SOFTMAX, SOFTMAX | dict(num_heads=4)))))


def with_mixer(**arguments):
    return dict(mixer=SOFTMAX | arguments)


BAD = [
    (with_mixer(rotation=dict(name="yarnn")), r"rotation.name='yarnn' is unknown \(did you mean 'yarn'\?\)"),
    (with_mixer(rotation=dict(name="yarn")), "model.mixer.rotation needs factor, trained_length"),
    (
        with_mixer(rotation=dict(name="yarn", factor=2.0, trained_length=8, beta_slow=40.0)),
        r"beta_slow=40.0\): give at most beta_fast",
    ),
    (with_mixer(rotation=dict(name="xpos", gamma=0.0)), "gamma=0.0 must be more than 0"),
    (with_mixer(rotation=dict(name="linear", factor=0.1)), r"factor=0.1\): give a factor of"),
    (with_mixer(bias=dict(name="t6")), "bias.name='t6' is unknown; one of: alibi"),
    (with_mixer(bias=dict(name="t5", buckets=3)), "model.mixer.bias has no argument 'buckets'"),
    (with_mixer(bias=dict(name="t5", num_buckets=3)), "num_buckets must be a positive"),
    (dict(bias="t5"), r"model.bias must be dict\(name=...,"),
    (dict(bias=dict(name="t5"), mixer=dict(name="s5", state_dim=8)), "model.bias is shared by attention layers of one size"),
    (dict(position_sampling=dict(name="shift")), "model.position_sampling.name='shift' is unknown"),
    (dict(position_sampling=dict(name="randomised", max_position=3)), "give at least the length, 16"),
]


@pytest.mark.parametrize(("model", "message"), BAD)
def test_bad_arguments_are_found_before_compiling(model, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(small(dict(depth=1) | model))
