"""Long Range Arena in miniature, for tables that two CPU cores can train: one small trunk, the mixers in turn. None is published.

Two layers of width 32 with feed-forward networks of 64, learned positions, mean pooling, no dropout; AdamW at 3e-3 with a warm-up
of 50 steps and a cosine to 0. Only the mixer differs between two recipes of a task, so that their difference is the mixer's.
"""

from collections.abc import Mapping
from typing import Any

MIXERS: Mapping[str, Mapping[str, Any]] = {
    "transformer": dict(name="softmax", num_heads=2),
    "local": dict(name="block_local", num_heads=2, block_size=16),
    "linear_attention": dict(name="linear_attention", num_heads=2),
    "s4d": dict(name="s4d", state_dim=32),
    "s5": dict(name="s5", state_dim=32, C_init="trunc_standard_normal"),
    "mamba": dict(name="mamba", state_dim=8),
}

TASKS: Mapping[str, Mapping[str, Any]] = {
    "listops": dict(
        task=dict(max_depth=5, max_args=5, min_length=20, max_length=100, max_tokens=100, num_examples=30_000),
        batch=32, steps=1000,
    ),
    "text": dict(task=dict(max_bytes=512, num_valid=1_000, num_test=4_000), batch=16, steps=600),
}  # fmt: skip


def lra_cpu(task: str) -> dict[str, dict[str, Any]]:
    """Recipes NAME_cpu of one task of `TASKS`."""
    settings = TASKS[task]
    return {f"{name}_cpu": {"task": settings["task"], **_recipe(mixer, **settings)} for name, mixer in MIXERS.items()}


def _recipe(mixer: Mapping[str, Any], *, task: Mapping[str, Any], batch: int, steps: int) -> dict[str, Any]:
    return {
        "model": dict(
            depth=2, width=32, feed_forward_width=64, pooling="mean", embed_stddev=1.0, positions=dict(name="learned"),
            mixer=dict(mixer),
        ),
        "optimizer": dict(learning_rate=3e-3, schedule="cosine", warmup="50 steps", weight_decay=0.01, clip_norm=1.0),
        "train": dict(batch_size=batch, eval_batch_size=4 * batch, duration=f"{steps} steps", eval_every=f"{steps // 5} steps"),
    }  # fmt: skip
