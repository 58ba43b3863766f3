"""Weighted cross-entropy and accuracy as sums, from logits or, a few positions at a time, from hidden states."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PyTree = Any
Sums = dict[str, tuple[Any, Any]]


@flax.struct.dataclass
class Unprojected:
    """What a model returns in place of logits [B, L, V]: hidden states, and the output layer that makes logits of them.

    project: a pure function (params, hidden [..., E]) -> logits [..., V].
    """

    hidden: Any
    params: PyTree
    project: Callable = flax.struct.field(pytree_node=False)


def cross_entropy(
    logits: Float[Array, "*B C"], targets: Int[Array, "*B"], weights: Float[Array, "*B"], label_smoothing: float = 0.0
) -> Sums:
    """Weighted sums of the negative log-likelihood in nats and of correct answers, each with the sum of weights."""
    nll, correct = _scores(logits, targets, label_smoothing)
    count = jnp.sum(weights)
    return {"loss": (jnp.sum(nll * weights), count), "accuracy": (jnp.sum(correct * weights), count)}


def _scores(logits, targets, label_smoothing: float):
    """The negative log-likelihood of each target, and whether it has the largest logit."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    if label_smoothing:
        nll = (1.0 - label_smoothing) * nll - label_smoothing * jnp.mean(log_p, axis=-1)
    return nll, jnp.argmax(logits, axis=-1) == targets


def chunked_cross_entropy(
    output: Unprojected,
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    label_smoothing: float = 0.0,
    *,
    chunk: int,
) -> Sums:
    """`cross_entropy` of the logits of `output`, of which at most `chunk` positions of each row exist at a time.

    Chunk i of n is the positions i, i + n, ..., so that a length that is split over devices stays so. Under
    differentiation the gradients of hidden states and output layer are worked out with the loss, chunk by chunk, while its
    logits are there, and only scaled in the backward pass: nothing is computed twice. Reverse mode only.
    """
    length = targets.shape[1]
    number = -(-length // chunk)
    size = -(-length // number)

    def split(x):
        padded = jnp.pad(x, ((0, 0), (0, number * size - length), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(x.shape[0], size, number, *x.shape[2:]), 2, 0)

    chunks = tuple(split(x) for x in (output.hidden, targets, weights))
    loss, correct = _sums(output.project, label_smoothing, output.params, *chunks)
    count = jnp.sum(weights)
    return {"loss": (loss, count), "accuracy": (correct, count)}


def _chunk_sums(project, label_smoothing: float, targets, params, hidden, weights):
    nll, correct = _scores(project(params, hidden), targets, label_smoothing)
    return jnp.sum(nll * weights), jnp.sum(correct * weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(project, label_smoothing: float, params, hidden, targets, weights):
    """Loss and correct answers, summed over the chunks along the first axis."""

    def one(sums, chunk):
        hidden, targets, weights = chunk
        new = _chunk_sums(project, label_smoothing, targets, params, hidden, weights)
        return jax.tree.map(jnp.add, sums, new), None

    zero = jnp.zeros((), jnp.promote_types(jnp.float32, weights.dtype))
    return jax.lax.scan(one, (zero, zero), (hidden, targets, weights))[0]


def _sums_forward(project, label_smoothing: float, params, hidden, targets, weights):
    def one(carry, chunk):
        sums, d_params = carry
        hidden, targets, weights = chunk
        grad = jax.value_and_grad(
            functools.partial(_chunk_sums, project, label_smoothing, targets), argnums=(0, 1, 2), has_aux=True
        )
        (loss, correct), (new, d_hidden, d_weights) = grad(params, hidden, weights)
        carry = jax.tree.map(jnp.add, (sums, d_params), ((loss, correct), new))
        return carry, (d_hidden, d_weights)

    zero = jnp.zeros((), jnp.promote_types(jnp.float32, weights.dtype))
    zeros = (zero, zero), jax.tree.map(jnp.zeros_like, params)
    (sums, d_params), (d_hidden, d_weights) = jax.lax.scan(one, zeros, (hidden, targets, weights))
    return sums, (d_params, d_hidden, d_weights)


def _sums_backward(project, label_smoothing: float, gradients, cotangents):
    d_params, d_hidden, d_weights = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)
    return d_params, d_hidden, None, d_weights


_sums.defvjp(_sums_forward, _sums_backward)
