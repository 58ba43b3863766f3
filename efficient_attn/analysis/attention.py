"""Where each head looks: mean attention weights, and which of a few patterns they follow."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from efficient_attn.analysis.base import AnalysisError, Run, Table
from efficient_attn.mixers import Attention
from efficient_attn.mixers.attention import to_read_weights
from efficient_attn.mixers.context import Context

WINDOWS = 8
DOMINANT = 0.5


def attention(run: Run) -> Table:
    """For each layer and head, the mean weight on the token itself, the one before, the last L/16, the first, and any one column.

    The pattern is the first of these that holds more than half of the weight (columns: of the strongest single key, averaged over
    queries); heads that do so nowhere are "spread". Rows are queries of the second half of a window, so that there is a past.
    The maps are means over the windows, square roots of weights, so that small ones can be seen.
    """
    weights = attention_weights(run, run.windows(run.context, count=WINDOWS)[:, :-1])
    rows = [
        (f"{layer}.{head}", *_classify(maps[:, head]))
        for layer, maps in enumerate(weights.values())
        for head in range(maps.shape[1])
    ]
    notes = (f"{WINDOWS} windows of {run.context} tokens at most; layers without attention weights are left out.",)
    columns = ("layer.head", "pattern", "self", "previous", "local", "first", "column", "entropy")
    numbered = [(i, *row) for i, row in enumerate(rows)]
    plot = ("head number", ("self", "previous", "local", "first", "column"))
    shown = {row[1]: row[2] for row in numbered}
    maps = {
        f"{layer}.{head} {shown[f'{layer}.{head}']}": np.sqrt(mean[head])
        for layer, mean in enumerate(maps.mean(axis=0) for maps in weights.values())
        for head in range(len(mean))
    }
    return Table("Attention patterns", ("head number", *columns), numbered, plot, notes=notes, log_x=False, maps=maps)


def attention_weights(run: Run, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Weights [B, H, L, L] of each attention layer, by its path: attention applied to the identity matrix as values.

    Raises `AnalysisError` where no layer forms weights.
    """
    found: dict[str, Any] = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, Attention) and context.method_name == "_attend":
            methods, places, q, k, _ = args
            of_scores, identity = to_read_weights(methods, k)
            path = "/".join(context.module.path)
            found.setdefault(path, call(of_scores, places, q, k, identity, **kwargs))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        run.plan.model.apply(run.variables, jnp.asarray(tokens), Context())
    if not found:
        raise AnalysisError("no layer of this model forms attention weights")
    return {path: np.moveaxis(np.asarray(w, np.float32), 2, 1) for path, w in found.items()}


def _classify(maps: np.ndarray) -> tuple:
    """maps [B, L, L] of one head: the pattern's name and the masses it goes by."""
    L = maps.shape[1]
    queries = np.arange(L // 2, L)
    late = maps[:, queries]
    distance = queries[:, None] - np.arange(L)[None]
    masses = {
        "self": _mass(late, distance == 0),
        "previous": _mass(late, distance == 1),
        "local": _mass(late, (distance >= 0) & (distance <= max(1, L // 16))),
        "first": _mass(late, np.broadcast_to(np.arange(L) == 0, distance.shape)),
        "column": float(late.mean(axis=1).max(axis=-1).mean()),
    }
    entropy = float(-(late * np.log(np.maximum(late, 1e-30))).sum(axis=-1).mean())
    pattern = next((name for name, mass in masses.items() if mass > DOMINANT), "spread")
    return pattern, *masses.values(), entropy


def _mass(maps: np.ndarray, where: np.ndarray) -> float:
    return float((maps * where).sum(axis=-1).mean())
