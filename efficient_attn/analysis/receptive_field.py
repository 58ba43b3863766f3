"""From how far back the last prediction takes what it says: gradients with respect to the embedded tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from efficient_attn.analysis.base import Run, Table
from efficient_attn.mixers.context import Context

WINDOWS = 16


def receptive_field(run: Run) -> Table:
    """The norm of the last token's loss gradient with respect to each embedded token, by distance in powers of two.

    share: of the sum of norms, within that range. reached: the fraction of positions with a gradient that is not zero.
    """
    windows = run.windows(run.context, count=WINDOWS)
    norms = np.concatenate([np.asarray(_norms(run, jnp.asarray(w[None]))) for w in windows])[:, ::-1]
    total, rows, start = norms.sum(axis=1, keepdims=True), [], 0
    while start < norms.shape[1]:
        stop = min(norms.shape[1], max(1, 2 * start))
        part = norms[:, start:stop]
        share = float((part.sum(axis=1, keepdims=True) / total).mean())
        rows.append((start, stop - 1, float(part.mean()), share, float((part > 0).mean())))
        start = stop
    notes = (f"{len(windows)} windows of {run.context} tokens; distance 0 is the last input token.",)
    columns = ("distance from", "to", "mean gradient norm", "share", "reached")
    return Table("Receptive field", columns, rows, ("to", ("share", "reached")), notes=notes, log_x=False)


def _norms(run: Run, tokens: Int[Array, "B T"]) -> Float[Array, "B t"]:
    """Gradient norms [B, L] of the loss of the last token of each row."""

    def loss(shift):
        def add_shift(call, args, kwargs, context):
            out = call(*args, **kwargs)
            is_input = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
            return out + shift.astype(out.dtype) if is_input else out

        with nn.intercept_methods(add_shift):
            logits = run.plan.model.apply(run.variables, tokens[:, :-1], Context())
        log_p = jax.nn.log_softmax(logits[:, -1].astype(jnp.float32))
        return -jnp.sum(jnp.take_along_axis(log_p, tokens[:, -1:], axis=1))

    zero = jnp.zeros((len(tokens), tokens.shape[1] - 1, run.plan.model.width))
    return jnp.linalg.norm(jax.jit(jax.grad(loss))(zero), axis=-1)
