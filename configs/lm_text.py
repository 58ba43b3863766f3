"""Byte-level language modelling on any file or folder of text; by default the running Python's standard library.

    python train.py --config=configs/lm_text.py --config.task.path=FILE_OR_FOLDER

The model and schedule follow nanoGPT's recipe for a CPU (karpathy/nanoGPT, README: 4 layers, width 128, 4 heads, context 64,
batch 12, 2,000 steps, validation loss 1.88 nats a character on tiny-Shakespeare in about 3 minutes). Rotary positions and
bytes instead of learned positions and characters are our departures, as are context 128 and batch 32. Expected: below 1.95 nats
a byte on tiny-Shakespeare's validation part, in a time of about five minutes on two CPU cores.

The longformer recipe is that model with Longformer's autoregressive attention (Beltagy et al. 2020, section 4.1): windows that
grow with depth, dilation on two heads of the upper layers. The paper's own sizes are for sequences of 2,048 to 23,040.

The *_short recipes differ in position methods alone, or in the mixer: configs/tables/extrapolation.py scores them beyond their
64 bytes.
"""

from configs.recipes_mamba import lm_text
from efficient_attn.config import experiment

TRANSFORMER = dict(
    learning_rate=1e-3, schedule="cosine", warmup="100 steps", b2=0.99, weight_decay=0.1, clip_norm=1.0,
    rules=((r".*/(scale|bias)", dict(weight_decay=0.0)), (r".*", {})),
)  # fmt: skip

POSITIONS = {
    "sinusoidal": dict(positions=dict(name="sinusoidal")),
    "learned": dict(positions=dict(name="learned", stddev=1.0)),
    "rotary": dict(rotation=dict(name="rotary")),
    "alibi": dict(bias=dict(name="alibi")),
    "t5": dict(bias=dict(name="t5")),
}
"""What tells the *_short recipes' models where a token is."""


def short(mixer: dict, **model: dict) -> dict:
    """Two layers of width 64 trained on windows of 64 bytes. Tokens' vectors have unit variance, beside which sinusoids stand."""
    return {
        "task": dict(context=64),
        "model": dict(depth=2, width=64, feed_forward_width=256, embed_stddev=1.0, mixer=mixer, **model),
        "optimizer": TRANSFORMER | dict(learning_rate=3e-3),
        "train": dict(duration="800 steps", eval_every="200 steps", eval_batch_size=64),
    }  # fmt: skip


def short_by_position(positions: dict | None = None, **mixer: dict) -> dict:
    """The short transformer with a position method."""
    return short(dict(name="softmax", num_heads=4, **mixer), **(dict(positions=positions) if positions else {}))


RECIPES = {
    "transformer": {
        "model": dict(
            depth=4, width=128, feed_forward_width=512, tied=True,
            mixer=dict(name="softmax", num_heads=4, rotation=dict(name="rotary")),
        ),
        "optimizer": TRANSFORMER,
    },
    "longformer": {
        "model": dict(
            depth=4, width=128, feed_forward_width=512, tied=True,
            mixer=tuple(
                dict(name="longformer", num_heads=4, window=window, dilation=dilation, rotation=dict(name="rotary"))
                for window, dilation in ((16, 1), (32, 1), (64, (1, 1, 2, 2)), (64, (1, 1, 2, 2)))
            ),
        ),
        "optimizer": TRANSFORMER,
    },
    "s5": {
        "model": dict(
            depth=4, width=128, norm="layer", feed_forward_width=512, tied=True,
            mixer=dict(name="s5", state_dim=128, blocks=4, C_init="trunc_standard_normal", activation="gelu"),
        ),
        "optimizer": dict(
            learning_rate=2e-3, schedule="cosine", warmup="100 steps", b2=0.99, weight_decay=0.1, clip_norm=1.0,
            rules=(
                (r".*/mixer/(Lambda_re|Lambda_im|log_step|B)", dict(lr_mult=0.25, weight_decay=0.0)),
                (r".*/(scale|bias|D)", dict(weight_decay=0.0)),
                (r".*", {}),
            ),
        ),
    },
    "mamba": lm_text(),
    **{f"{name}_short": short_by_position(**where) for name, where in POSITIONS.items()},
    "mamba_short": short(dict(name="mamba", state_dim=8)),
}  # fmt: skip

TRAIN = dict(
    batch_size=32, duration="750 steps", eval_every="125 steps", checkpoint_every="250 steps", log_every=50, max_eval_batches=40
)


def get_config(recipe: str = "transformer"):
    task = dict(name="lm_text", context=128)
    return experiment(name="lm_text", task=task, recipes=RECIPES, recipe=recipe, train=TRAIN)
