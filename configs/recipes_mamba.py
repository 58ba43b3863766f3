"""Recipes of Mamba: the Mamba paper's own for its synthetic tasks, and ours for Long Range Arena and for short runs on CPUs.

The Mamba paper has no Long Range Arena table, and what others print disagrees (test accuracy in %):

                                            ListOps   Text   Retrieval   Image   Pathfinder   Path-X
    MetaLA (arXiv 2411.10741, table 7)        38.0    83.0     72.1       69.8      69.3       67.3
    xLSTM, as LION quotes it (its table 7)    32.5     -       90.2       68.9      99.2        -

None of them prints the hyper-parameters of these runs, so those here are ours: depth, width and schedule of the task's S5 recipe,
and bidirectional layers with RMS norms.
"""

from collections.abc import Mapping
from typing import Any

NO_DECAY = (r".*/(A_log|D|dt_bias|bias|scale)", {"weight_decay": 0.0})
"""What the released code keeps from decaying: A_log, D and the step sizes' bias; here norms and the convolution's bias too."""

TASKS: Mapping[str, Mapping[str, Any]] = {
    "listops": dict(task=dict(max_tokens=2048), depth=8, width=128, batch=50, epochs=40),
    "text": dict(task=dict(max_bytes=4096), depth=6, width=256, batch=50, epochs=35, dropout=0.1),
    "retrieval": dict(task={}, depth=6, width=128, batch=32, epochs=20),
    "image": dict(task=dict(as_tokens=False), depth=6, width=256, batch=50, epochs=200, dropout=0.1),
    "pathfinder": dict(task={}, depth=6, width=192, batch=64, epochs=200),
    "pathx": dict(task={}, depth=6, width=128, batch=32, epochs=75, dt_min=1e-4),
}


def lra_mamba(task: str) -> dict[str, dict[str, Any]]:
    """The recipe `mamba` of one task of `TASKS`."""
    settings = dict(TASKS[task])
    arguments = settings.pop("task")
    return {"mamba": {"task": arguments, **_bidirectional(**settings)}}


def _bidirectional(
    *, depth: int, width: int, batch: int, epochs: int, dropout: float = 0.0, dt_min: float = 0.001
) -> dict[str, Any]:
    return {
        "model": dict(
            depth=depth, width=width, norm="rms", dropout=dropout, embed_stddev=1.0, mixer=dict(name="mamba", dt_min=dt_min)
        ),
        "optimizer": dict(
            learning_rate=1e-3, schedule="cosine", warmup="1 epochs", weight_decay=0.05, clip_norm=1.0,
            rules=(NO_DECAY, (r".*", {})),
        ),
        "train": dict(batch_size=batch, duration=f"{epochs} epochs"),
    }  # fmt: skip


def synthetic(mixer: Mapping[str, Any], *, width: int, learning_rate: float, **model: Any) -> dict[str, Any]:
    """Two residual layers with RMS norms and Adam at a constant rate without weight decay, as in the paper's appendix E.1."""
    return {
        "model": dict(depth=2, width=width, norm="rms", mixer=dict(mixer), **model),
        "optimizer": dict(learning_rate=learning_rate, schedule="constant"),
    }


def short(mixer: Mapping[str, Any], *, task: Mapping[str, Any], width: int, steps: int, learning_rate: float) -> dict[str, Any]:
    """Minutes on two CPU cores: two narrow layers, embeddings of unit variance, a short warm-up and a cosine to 0."""
    return {
        "task": dict(task),
        "model": dict(depth=2, width=width, norm="rms", embed_stddev=1.0, mixer=dict(mixer)),
        "optimizer": dict(learning_rate=learning_rate, schedule="cosine", warmup="50 steps", clip_norm=1.0),
        "train": dict(batch_size=32, duration=f"{steps} steps", eval_every=f"{steps // 10} steps", eval_batch_size=128),
    }


def lm_text() -> dict[str, Any]:
    """Mamba without feed-forward layers, twice as deep as the Transformer for about its parameters (section 3.4)."""
    return {
        "model": dict(depth=8, width=128, norm="rms", tied=True, mixer=dict(name="mamba")),
        "optimizer": dict(
            learning_rate=2e-3, schedule="cosine", warmup="100 steps", b2=0.95, weight_decay=0.1, clip_norm=1.0,
            rules=(NO_DECAY, (r".*", {})),
        ),
    }  # fmt: skip
