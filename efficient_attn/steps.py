"""The pure functions of training: state, loss, train step, eval step."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from efficient_attn.losses import Sums, chunked_cross_entropy, cross_entropy
from efficient_attn.mixers.context import MEMORY, Context

PyTree = Any
Batch = Mapping[str, Any]

TRANSIENT = ("losses", "intermediates", "cache")
"""Collections that a step may write and the state does not keep."""


@flax.struct.dataclass
class TrainState:
    """All that training changes, and the key its randomness comes from.

    step: optimiser steps taken, int32 []. variables: the model's mutable collections (batch statistics and the like).
    ema: running average of the parameters, or None. rng: key data, uint32 [2]; step t draws from fold_in(rng, t).
    """

    step: Any
    params: PyTree
    opt_state: PyTree
    variables: PyTree
    ema: PyTree | None
    rng: Any

    def evaluated(self) -> PyTree:
        """The variables that evaluation uses: averaged parameters where there are any, and no memory of the training streams."""
        kept = {name: value for name, value in self.variables.items() if name != MEMORY}
        return {"params": self.params if self.ema is None else self.ema, **kept}


def init_state(model: nn.Module, tx: optax.GradientTransformation, seed: Any, batch: Batch, *, ema: bool) -> TrainState:
    """The state before the first step, from the seed and the shapes of a batch."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    variables = dict(model.init({"params": init_key}, batch["inputs"], context(batch, train=False)))
    params = variables.pop("params")
    kept = {name: value for name, value in variables.items() if name not in TRANSIENT}
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(0), params, tx.init(params), kept, average, jax.random.key_data(train_key))


def empty_memory(model: nn.Module, variables: PyTree, batch: Batch) -> PyTree:
    """The memory of training streams that have not begun, one for each row of `batch` (arrays or their shapes).

    variables: the model's others, or their shapes.
    """

    def apply(variables, batch):
        rngs = {"dropout": jax.random.key(0)}
        ctx = context(batch, train=True)
        return model.apply(variables, batch["inputs"], ctx, rngs=rngs, mutable=[*variables, MEMORY, "losses"])[1][MEMORY]

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(apply, variables, batch))


def context(batch: Batch, *, train: bool) -> Context:
    return Context(mask=batch.get("mask"), segment_ids=batch.get("segment_ids"), train=train)


def loss_sums(output: Any, targets: Any, weights: Any, label_smoothing: float = 0.0, loss_chunk: int = 0) -> Sums:
    """Cross-entropy and accuracy of a model's logits, or with `loss_chunk` of its hidden states, so many positions at a time."""
    if loss_chunk:
        return chunked_cross_entropy(output, targets, weights, label_smoothing, chunk=loss_chunk)
    return cross_entropy(output, targets, weights, label_smoothing)


def train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    limit: Any = None,
    *,
    label_smoothing: float = 0.0,
    accumulate: int = 1,
    ema: float = 0.0,
    loss_chunk: int = 0,
) -> tuple[TrainState, Sums]:
    """One optimiser step on the mean loss over the weights of the whole batch.

    With `accumulate` > 1 the batch is run as that many micro-batches (rows i, i + n, ...) one after the other, and their
    gradients are added up: the same step, up to rounding, in less memory. Auxiliary losses that the model sows into
    `losses` are added to the loss, averaged over micro-batches. `loss_chunk` > 0 computes the logits of so many positions at a
    time (`chunked_cross_entropy`; language models).

    limit: None, or a scalar. A step whose gradient norm is not below it, or of which anything is not finite, then leaves all
        of the state but `step` as it was: its sums are zero, and `skipped` counts it.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    total = jnp.maximum(jnp.sum(batch["weights"]), 1e-8)

    def loss(params, variables, micro, key):
        output, updated = model.apply(
            {"params": params, **variables},
            micro["inputs"],
            context(micro, train=True),
            **_unprojected(loss_chunk),
            rngs={"dropout": key},
            mutable=[*variables, "losses"],
        )
        sums = loss_sums(output, micro["targets"], micro["weights"], label_smoothing, loss_chunk)
        objective = sums["loss"][0] / total
        sown = jax.tree.leaves(updated.pop("losses", {}))
        if sown:
            auxiliary = sum(jnp.sum(x) for x in sown)
            sums["aux_loss"] = (auxiliary, jnp.float32(1.0))
            objective = objective + auxiliary / accumulate
        return objective, (sums, dict(updated))

    gradients, variables, sums = _gradients(loss, state, batch, key, accumulate)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - ema)
    sums["grad_norm"] = (optax.tree.norm(gradients), jnp.float32(1.0))
    new = TrainState(state.step + 1, params, opt_state, variables, average, state.rng)
    return (new, sums) if limit is None else _unless_diverged(state, new, sums, limit)


def _unprojected(loss_chunk: int) -> dict[str, bool]:
    """What tells a model to leave its output layer to the loss."""
    return {"project": False} if loss_chunk else {}


def _unless_diverged(old: TrainState, new: TrainState, sums: Sums, limit: Any) -> tuple[TrainState, Sums]:
    """`new` and `sums` where the gradient norm is below `limit` and all is finite; else `old`, one step on, and zeros."""
    taken = (sums["grad_norm"][0] < limit) & all_finite((new, sums))
    state = jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, old).replace(step=new.step)
    sums = jax.tree.map(lambda x: jnp.where(taken, x, jnp.zeros_like(x)), sums)
    return state, {**sums, "skipped": (1.0 - taken.astype(jnp.float32), jnp.float32(1.0))}


def _gradients(loss, state: TrainState, batch: Batch, key, accumulate: int):
    """Gradient of the sum of `loss` over micro-batches, the variables after the last one, and the summed metrics.

    Each micro-batch takes its own rows of the memory along, and all others' variables in turn.
    """
    grad = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        gradients, (sums, variables) = grad(state.params, state.variables, batch, key)
        return gradients, variables, sums

    def one(carry, xs):
        gradients, variables = carry
        micro, memory, key = xs
        new, (sums, variables) = grad(state.params, {**variables, **memory}, micro, key)
        variables, memory = _split_memory(variables)
        return (jax.tree.map(jnp.add, gradients, new), variables), (sums, memory)

    def split(x):
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    variables, memory = _split_memory(state.variables)
    (gradients, variables), (sums, memory) = jax.lax.scan(
        one, (zeros, variables), (*jax.tree.map(split, (dict(batch), memory)), jax.random.split(key, accumulate))
    )  # fmt: skip
    memory = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), memory)
    return gradients, {**variables, **memory}, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def _split_memory(variables: PyTree) -> tuple[PyTree, PyTree]:
    """The variables that have no rows, and those that have one for each stream."""
    memory = {name: value for name, value in variables.items() if name == MEMORY}
    return {name: value for name, value in variables.items() if name != MEMORY}, memory


def eval_step(model: nn.Module, variables: PyTree, batch: Batch, *, loss_chunk: int = 0) -> tuple[Sums, PyTree]:
    """Sums of loss and accuracy on one batch, nothing dropped out, running batch statistics; and the streams' memory after it.

    The memory ({} where the model has none) joins the `variables` of the next batch, whose rows continue this one's.
    """
    ctx = context(batch, train=False)
    output, memory = model.apply(variables, batch["inputs"], ctx, **_unprojected(loss_chunk), mutable=[MEMORY])
    return loss_sums(output, batch["targets"], batch["weights"], loss_chunk=loss_chunk), dict(memory)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point number in `tree` is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
