"""Schedules against their formulas, groups against their rules, AdamW against optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn import optim
from efficient_attn.arguments import ConfigError
from efficient_attn.optim import OptimizerConfig

PARAMS = {"layer_0": {"mixer": {"B": jnp.ones((2, 3)), "D": jnp.ones(3)}}, "head": {"bias": jnp.ones(2)}}


def rate(schedule: str, step: int, warmup: int = 10, total: int = 110) -> float:
    return float(optim.learning_rate(OptimizerConfig(learning_rate=2.0, schedule=schedule), warmup, total)(step))


def test_warm_up_is_linear_and_starts_above_zero():
    for schedule in optim.SCHEDULES:
        np.testing.assert_allclose([rate(schedule, s) for s in (0, 4, 9)], [0.2, 1.0, 2.0], rtol=1e-6)


def test_schedules_after_warm_up():
    assert rate("constant", 100) == 2.0
    np.testing.assert_allclose(rate("linear", 59), 1.0, rtol=1e-6)
    np.testing.assert_allclose(rate("cosine", 59), 1.0, rtol=1e-6)
    np.testing.assert_allclose(rate("cosine", 34), 1 + np.cos(np.pi / 4), rtol=1e-6)
    np.testing.assert_allclose(rate("rsqrt", 39), 1.0, rtol=1e-6)
    for schedule in ("linear", "cosine"):
        np.testing.assert_allclose(rate(schedule, 109), 0.0, atol=1e-6)
    assert rate("cosine", 0, warmup=0, total=100) == 2.0


def test_lra_rsqrt_schedule_is_the_published_one():
    """lr * min(1, t / w) / sqrt(max(t, w)), t from 1, as the peak lr / sqrt(w) configures it."""
    fn = optim.learning_rate(OptimizerConfig(learning_rate=0.05 / 1000**0.5, schedule="rsqrt"), 1000, 5000)
    for t in (1, 500, 1000, 4000):
        np.testing.assert_allclose(float(fn(t - 1)), 0.05 * min(1, t / 1000) / max(t, 1000) ** 0.5, rtol=1e-6)


def test_first_matching_rule_wins():
    rules = ((r".*/mixer/B", dict(lr_mult=0.5)), (r".*/(B|D)", dict(weight_decay=0.0)), (r".*", {}))
    groups = optim.groups(rules, PARAMS)
    assert groups["layer_0"]["mixer"]["B"] == optim.Group(0.5, None)
    assert groups["layer_0"]["mixer"]["D"] == optim.Group(1.0, 0.0)
    assert groups["head"]["bias"] == optim.Group()


@pytest.mark.parametrize(
    "rules, message",
    [
        (((r".*/B", {}),), r"no rule matches parameter 'head/bias'"),
        (((r".*", {}), (r".*/B", {})), r"\['\.\*/B'\] match no parameter"),
        ((("(", {}),), r"rules\[0\].*must be \(regular expression, dict\)"),
        ((r".*",), r"rules\[0\].*must be \(regular expression, dict\)"),
        (((r".*", dict(lr=1.0)),), r"rules\[0\] has no argument 'lr'"),
    ],
)
def test_wrong_rules_are_errors(rules, message):
    with pytest.raises(ConfigError, match=message):
        optim.groups(rules, PARAMS)


def updates_of(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        gradients = jax.tree.map(lambda p, scale=i + 1.0: scale * p, params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_equals_optax_adamw_where_all_parameters_are_alike():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.3)
    ours = updates_of(optim.build(config, PARAMS, warmup=0, total=10))
    theirs = updates_of(optax.adamw(0.1, weight_decay=0.3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_groups_scale_the_rate_and_replace_the_decay():
    rules = ((r".*/B", dict(lr_mult=0.5, weight_decay=0.0)), (r".*", {}))
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.3, rules=rules)
    ours = updates_of(optim.build(config, PARAMS, warmup=0, total=10))
    slow = updates_of(optax.adam(0.05))
    np.testing.assert_allclose(ours["layer_0"]["mixer"]["B"], slow["layer_0"]["mixer"]["B"], rtol=1e-6)
    decayed = updates_of(optax.adamw(0.1, weight_decay=0.3))
    np.testing.assert_allclose(ours["head"]["bias"], decayed["head"]["bias"], rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    """Adam undoes a common scale, so what is looked at is the first moment."""
    tx = optim.build(OptimizerConfig(clip_norm=1.0), PARAMS, warmup=0, total=10)
    _, state = tx.update(jax.tree.map(lambda p: 100 * p, PARAMS), tx.init(PARAMS), PARAMS)
    moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), 0.1, rtol=1e-5)  # (1 - b1) * 1
