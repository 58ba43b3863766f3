"""The same text scored with windows that do and do not overlap: the protocol is part of the number."""

import numpy as np

from efficient_attn.analysis.base import Run, Table, scores


def windows(run: Run) -> Table:
    """Loss by protocol: windows of the trained length L, each token from what comes before it in its window.

    Non-overlapping windows give a token L/2 tokens of context on average, and their first ones almost none; sliding ones, of
    which only the last `stride` tokens count (all of the first window's), at least L - stride (Press et al. 2022, appendix B).
    """
    L = run.context
    columns = ("protocol", "stride", "tokens", "nats", "bits", "perplexity")
    rows = []
    for stride in dict.fromkeys((L, max(1, L // 2), max(1, L // 8))):
        losses = _sliding(run, stride)
        name = "non-overlapping" if stride == L else "sliding"
        rows.append((name, stride, len(losses), *scores(losses)))
    if run.has_memory:
        whole = (len(run.tokens) - 1) // L * L
        losses = run.losses(run.tokens[None, : whole + 1].astype(np.int32))
        rows.append(("segments with memory", L, losses.size, *scores(losses)))
    notes = (f"Windows of {L} tokens. Bits a token are bits a byte where tokens are bytes.",)
    return Table("Loss by protocol", columns, rows, plot=("stride", ("nats",)), lines="protocol", notes=notes)


def _sliding(run: Run, stride: int) -> np.ndarray:
    """Losses of consecutive tokens, each from the window that ends least after it; windows start without memory."""
    L = run.context
    losses = run.losses(run.windows(L, stride))
    return np.concatenate([losses[0], losses[1:, L - stride :].reshape(-1)])
