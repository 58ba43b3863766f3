"""AdamW and SGD with a schedule, and with per-parameter settings from a table of regular expressions."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efficient_attn.arguments import ConfigError, check_arguments, lookup

PyTree = Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`config.optimizer`.

    algorithm: one of `ALGORITHMS`.
    learning_rate: the peak, reached after `warmup` (a duration) of linear increase from 0.
    schedule: one of `SCHEDULES`, over the run's duration.
    weight_decay: decoupled (Loshchilov & Hutter 2019): each step takes learning_rate * weight_decay of the parameter.
    b1, b2, eps: Adam's (Kingma & Ba 2015); of SGD, b1 is the momentum.
    clip_norm: largest global norm of the gradient; 0 is no limit.
    ema: decay of the running average of the parameters that is evaluated in their place; 0 is none.
    rules: (regular expression, settings) pairs; for each parameter the first whose expression matches the whole of its
        '/'-joined path gives its settings (see `Group`). A parameter without a rule is an error, so is an unused rule.
    """

    algorithm: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: str = "0 steps"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0
    ema: float = 0.0
    rules: Sequence = ((".*", {}),)


@dataclasses.dataclass(frozen=True)
class Group:
    """What one rule may set: a factor on the learning rate, and a weight decay in place of the common one."""

    lr_mult: float = 1.0
    weight_decay: float | None = None


ALGORITHMS: Mapping[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda config: optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
    "sgd": lambda config: optax.trace(config.b1, accumulator_dtype=jnp.float32) if config.b1 else optax.identity(),
}
"""What makes a step out of a gradient, before weight decay and learning rate, by the name `config.optimizer.algorithm` uses."""


def _with_warmup(after: Callable) -> Callable:
    """Linear warm-up to 1, then `after(step, warmup, total)`."""

    def schedule(step, warmup: int, total: int):
        ramp = jnp.minimum(1.0, step / max(warmup, 1)) if warmup else 1.0
        return ramp * after(jnp.maximum(step, warmup), warmup, total)

    return schedule


def _remaining(step, warmup: int, total: int):
    return 1.0 - jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)


SCHEDULES: Mapping[str, Callable] = {
    "constant": _with_warmup(lambda step, warmup, total: 1.0),
    "linear": _with_warmup(_remaining),
    "cosine": _with_warmup(lambda step, warmup, total: 0.5 - 0.5 * jnp.cos(jnp.pi * _remaining(step, warmup, total))),
    "rsqrt": _with_warmup(lambda step, warmup, total: jnp.sqrt(max(warmup, 1) / jnp.maximum(step, 1))),
}
"""Factor on the learning rate at a step (from 0): warm-up to 1, then constant, down to 0 by a line or half a cosine, or
as 1/sqrt(step) (Vaswani et al. 2017, eq. 3)."""


def learning_rate(config: OptimizerConfig, warmup: int, total: int) -> Callable[[Any], jax.Array]:
    """Step (from 0) -> learning rate. The first update of a warm-up is taken at 1/warmup of the peak, not at 0."""
    factor = lookup(SCHEDULES, config.schedule, "optimizer.schedule")
    return lambda step: config.learning_rate * factor(step + 1 if warmup else step, warmup, total)


def paths(params: PyTree) -> PyTree:
    """The '/'-joined path of each leaf, in a tree of the same structure."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(key.key) for key in path), params)


def groups(rules: Sequence, params: PyTree) -> PyTree:
    """The `Group` of each parameter: that of the first rule that matches its whole path. Raises `ConfigError`."""
    compiled = [_rule(i, rule) for i, rule in enumerate(rules)]
    used = set()

    def find(path: str) -> Group:
        for i, (pattern, group) in enumerate(compiled):
            if pattern.fullmatch(path):
                used.add(i)
                return group
        raise ConfigError(f"optimizer.rules: no rule matches parameter {path!r}; end the table with (r'.*', dict())")

    found = jax.tree.map(find, paths(params))
    unused = [compiled[i][0].pattern for i in range(len(compiled)) if i not in used]
    if unused:
        known = "\n  ".join(jax.tree.leaves(paths(params)))
        raise ConfigError(f"optimizer.rules: {unused} match no parameter that an earlier rule left; paths are\n  {known}")
    return found


def _rule(i: int, rule: Any) -> tuple[re.Pattern, Group]:
    try:
        pattern, settings = rule
        settings = dict(settings)
        compiled = re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise ConfigError(f"optimizer.rules[{i}]={rule!r} must be (regular expression, dict): {error}") from error
    check_arguments(Group, settings, f"optimizer.rules[{i}]")
    return compiled, Group(**settings)


def build(config: OptimizerConfig, params: PyTree, *, warmup: int, total: int) -> optax.GradientTransformation:
    """The configured optimiser of `params` (arrays or their shapes) for a run of `total` steps."""
    group = groups(config.rules, params)
    decay = jax.tree.map(lambda g: config.weight_decay if g.weight_decay is None else g.weight_decay, group)
    multiplier = jax.tree.map(lambda g: g.lr_mult, group)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        lookup(ALGORITHMS, config.algorithm, "optimizer.algorithm")(config),
        _stateless(lambda update, param, wd: update + wd * param, decay),
        _stateless(lambda update, param, mult: mult * update, multiplier),
        optax.scale_by_learning_rate(learning_rate(config, warmup, total)),
    )


def _stateless(fn: Callable, settings: PyTree) -> optax.GradientTransformation:
    """fn(update, parameter, setting) on every parameter."""

    def update(updates, state, params):
        return jax.tree.map(fn, updates, params, settings), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
