"""Recipes of Transformer-XL on characters, as kimiyoung/transformer-xl trains its base model on enwik8."""

from collections.abc import Mapping
from typing import Any


def recipes() -> dict[str, dict[str, Any]]:
    """transformer_xl, and the same model without memory."""
    xl = dict(name="transformer_xl", memory_length=512, eval_memory_length=2100)
    return {
        "transformer_xl": _base(xl),
        "transformer": _base(dict(name="softmax", bias=dict(name="transformer_xl"))),
    }


def _base(mixer: Mapping[str, Any]) -> dict[str, Any]:
    """12 post-norm layers of width 512; Adam at 2.5e-4 without weight decay, gradients clipped at 0.25."""
    return {
        "model": dict(
            depth=12, width=512, feed_forward_width=2048, feed_forward="relu", prenorm=False, final_norm=False, tied=True,
            dropout=0.1, embed_dropout=0.1, mixer=dict(mixer, num_heads=8, head_dim=64, use_bias=False),
        ),
        "optimizer": dict(learning_rate=2.5e-4, schedule="cosine", clip_norm=0.25),
        "train": dict(
            batch_size=22, duration="400000 steps", eval_every="4000 steps", checkpoint_every="4000 steps", log_every=200
        ),
    }  # fmt: skip
