"""Positions drawn while training: which they are, that only training sees them, and what does not notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import models
from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Attention, Context
from efficient_attn.positions.absolute import Learned, Sinusoidal
from efficient_attn.positions.sampling import NoSampling, Randomised, Shifted
from efficient_attn.tasks.listops import ListOps
from efficient_attn.tasks.synthetic import MultiQueryRecall

pytestmark = pytest.mark.usefixtures("quick_compile")

PACKED = jnp.array([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]] * 50)


def test_shifts_are_uniform_and_one_a_row():
    shifts = np.asarray(Shifted(3)(jax.random.key(0), PACKED) - PACKED)
    assert (shifts == shifts[:, :1]).all() and set(shifts[:, 0]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(Shifted(0)(jax.random.key(0), PACKED), PACKED)
    assert Shifted(3).reach(7) == 10


def test_randomised_positions_keep_the_order_and_are_distinct():
    drawn = np.asarray(Randomised(20)(jax.random.key(0), PACKED))
    assert drawn.min() == 0 and drawn.max() == 19
    assert (np.diff(drawn[1::2], axis=1) > 0).all() and (np.diff(drawn[::2, :4], axis=1) > 0).all()
    np.testing.assert_array_equal(drawn[::2, :3], drawn[::2, 4:])  # a document restarts at its row's first position
    assert len({tuple(row) for row in drawn}) == 100
    everything = Randomised(7)(jax.random.key(0), PACKED)
    np.testing.assert_array_equal(everything, PACKED)
    with pytest.raises(ValueError, match=r"Randomised\(max_position=6\): give at least the length, 7"):
        Randomised(6)(jax.random.key(0), PACKED)
    with pytest.raises(ValueError, match=r"Shifted\(max_shift=-1\)"):
        Shifted(-1)
    np.testing.assert_array_equal(NoSampling()(jax.random.key(0), PACKED), PACKED)


LM = MultiQueryRecall(length=16, vocab_size=18, num_pairs=2)


def model_with(sampling, task=LM, **changes):
    mixer = dict(name="softmax", num_heads=2, causal=task.head == "lm", implementation="reference")
    arguments = dict(depth=1, width=8, mixer=mixer, positions=dict(name="learned"), position_sampling=sampling)
    return models.build(arguments | changes, task)


@pytest.mark.parametrize("per_layer", [False, True])
def test_only_training_sees_them(per_layer):
    model = model_with(dict(name="randomised", max_position=40), positions=dict(name="learned", per_layer=per_layer, stddev=1.0))
    x = jax.random.randint(jax.random.key(0), (2, 16), 1, 16)
    variables = jax.jit(model.init)(jax.random.key(1), x, Context())
    name = "positions_0" if per_layer else "positions"
    table = variables["params"][name]["table"]
    assert table.shape == (40, 8)
    plain = model_with(dict(name="none"), positions=dict(name="learned", per_layer=per_layer))
    first = {"params": variables["params"] | {name: {"table": table[:16]}}}
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, x, Context()), jax.jit(plain.apply)(first, x, Context()))
    train = jax.jit(lambda key: model.apply(variables, x, Context(train=True), rngs={"dropout": key}))
    one, same, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize(
    "method", [dict(rotation=dict(name="rotary")), dict(bias=dict(name="alibi")), dict(bias=dict(name="shaw", clip=3))]
)
def test_relative_methods_do_not_notice_a_shift(method):
    module = Attention(num_heads=2, causal=True, implementation="reference", **method)
    x = jax.random.normal(jax.random.key(0), (2, 9, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    apply = jax.jit(lambda context: module.apply(variables, x, context))
    positions = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    plain, shifted, gaps = (apply(Context(positions=p)) for p in (positions, positions + 100, 3 * positions))
    np.testing.assert_allclose(shifted, plain, atol=1e-5)
    np.testing.assert_allclose(plain, apply(Context()), atol=1e-5)
    assert np.abs(gaps - plain).max() > 1e-3


def test_cls_goes_with_no_other_positions():
    task = ListOps(max_depth=5, max_args=5, min_length=20, max_length=40, max_tokens=40, num_examples=100)
    shifted, per_layer = dict(name="shifted", max_shift=3), dict(name="learned", per_layer=True)
    for sampling, embedding in ((shifted, dict(name="learned")), (dict(name="none"), per_layer)):
        with pytest.raises(ConfigError, match="pooling='cls' goes with no position_sampling"):
            model_with(sampling, task, pooling="cls", positions=embedding)


def test_sinusoids_in_both_layouts():
    at = jnp.arange(5)[None]
    angles = np.arange(5)[:, None] / 10_000 ** (2 * np.arange(3) / 6)
    interleaved, halves = (Sinusoidal(halves=halves).apply({}, at, 5, 6)[0] for halves in (False, True))
    np.testing.assert_allclose(interleaved[:, ::2], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(interleaved[:, 1::2], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(halves, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=1e-6)


def test_a_sequence_longer_than_its_table_is_an_error():
    with pytest.raises(ValueError, match="a sequence of 6 is longer than the table of 5"):
        Learned().init(jax.random.key(0), jnp.arange(6)[None], 5, 4)
