"""Reversible residual layers: activations that the backward pass computes again from what comes after them.

Two streams, y1 = x1 + F(x2) and y2 = x2 + G(y1), so that x2 = y2 - G(y1) and x1 = y1 - F(x2) (Gomez et al. 2017; Reformer,
Kitaev et al. 2020, section 3, eqs. 7 to 9). Written as steps that swap the streams, each is its own inverse but for a sign:

    (a, b) -> (b, a + branch(b)),  F and G in turn.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context

PyTree = Any
Stream = Float[Array, "B L E"]
Branch = Callable[[PyTree, Stream, PyTree], Stream]
"""(parameters, stream, what else it needs: no gradients) -> what is added to the other stream; a pure function."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(
    branches: tuple[Branch, ...], params: Sequence[PyTree], streams: tuple[Stream, Stream], given: Sequence[PyTree]
) -> tuple[Stream, Stream]:
    """The streams after all branches; reverse-mode gradients keep the last streams alone, whatever the number of branches.

    params, given: one of each for each branch. Gradients are those of ordinary autodiff at the recomputed streams, which differ
    from the first ones by rounding.
    """
    a, b = streams
    for branch, p, g in zip(branches, params, given, strict=True):
        a, b = b, a + branch(p, b, g)
    return a, b


def _forward(branches, params, streams, given):
    streams = run(branches, params, streams, given)
    return streams, (params, streams, given)


def _backward(branches, residuals, cotangents):
    params, (a, b), given = residuals
    da, db = cotangents
    gradients = []
    for branch, p, g in reversed(list(zip(branches, params, given, strict=True))):
        added, vjp = jax.vjp(functools.partial(_without_given, branch, g), p, a)
        dp, through = vjp(db)
        a, b = b - added, a
        da, db = db, da + through
        gradients.append(dp)
    return gradients[::-1], (da, db), None


def _without_given(branch: Branch, given: PyTree, params: PyTree, stream: Stream) -> Stream:
    return branch(params, stream, given)


run.defvjp(_forward, _backward)


def stack(layers: Sequence[Any], x: Float[Array, "B L E"], ctx: Context, key: Any = None) -> Float[Array, "B L E"]:
    """The mean of both streams after `layers`, bound `blocks.ReversibleBlock`s; both start as x. Streams are float32 at least.

    key: of dropout and whatever else is random, drawn once for each branch and used again when it is recomputed; None for none.

    Raises ConfigError where a layer has variables besides its parameters.
    """
    start = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    halves = [(layer, half) for layer in layers for half in layer.halves]
    if layers[0].is_initializing() or ctx.decode:
        a = b = start
        for layer, half in halves:
            a, b = b, a + layer(b.astype(x.dtype), ctx, half).astype(b.dtype)
        _refuse_state(layers)
    else:
        branches = tuple(_branch(layer.unbind()[0], half, x.dtype) for layer, half in halves)
        params = [{name: layer.variables["params"].get(name, {}) for name in layer.halves[half]} for layer, half in halves]
        keys = [None if key is None else jax.random.fold_in(key, i) for i in range(len(halves))]
        a, b = run(branches, params, (start, start), [(ctx, key) for key in keys])
    return ((a + b) / 2).astype(x.dtype)


def _branch(module: Any, half: str, dtype: Any) -> Branch:
    """One half of an unbound layer as a pure function."""

    def branch(params, stream, given):
        ctx, key = given
        rngs = {} if key is None else {"dropout": key}
        return module.apply({"params": params}, stream.astype(dtype), ctx, half, rngs=rngs).astype(stream.dtype)

    return branch


def _refuse_state(layers: Sequence[Any]) -> None:
    state = {name for layer in layers for name in layer.variables} - {"params", "cache", "blocks"}
    if state:
        raise ConfigError(
            f"model.residual='reversible' runs each layer twice, which goes with parameters alone; these layers also have "
            f"{', '.join(sorted(state))}: use residual='standard', or another norm or mixer"
        )
