"""Selective copying as in Mamba's table 1 (Gu & Dao 2023): 16 data tokens among 4,096 positions, to be repeated in order.

    python train.py --config=configs/synthetic_copying.py:s5

Published: time-invariant state spaces fail without gates (S4 18.3 %), selective ones solve it (S6 97.0 %, in
the mamba block 99.8 %); 2 layers, width 64, 400,000 steps of batch 64, constant learning rate 1e-4. No time is published. S5
and S4D are not among the paper's rows.

The *_short recipes hide 8 tokens among 56 positions and need a few minutes on two CPU cores:

    python train.py --config=configs/synthetic_copying.py:mamba_short
"""

from configs.recipes_mamba import short, synthetic
from efficient_attn.config import experiment

OPTIMIZER = dict(learning_rate=1e-4, schedule="constant")

SHORT = dict(
    task=dict(length=64, num_tokens=8, num_examples=3500 * 32), width=64, steps=3500, learning_rate=2e-3
)  # fmt: skip

RECIPES = {
    "softmax": {
        "model": dict(
            depth=2, width=64, feed_forward_width=256, mixer=dict(name="softmax", num_heads=4, rotation=dict(name="rotary"))
        ),
        "optimizer": OPTIMIZER,
    },
    "s4": {"model": dict(depth=2, width=64, mixer=dict(name="s4")), "optimizer": OPTIMIZER},
    "s4d": {"model": dict(depth=2, width=64, mixer=dict(name="s4d")), "optimizer": OPTIMIZER},
    "s5": {
        "model": dict(depth=2, width=64, mixer=dict(name="s5", state_dim=128, C_init="trunc_standard_normal")),
        "optimizer": OPTIMIZER,
    },
    "mamba": synthetic(dict(name="mamba"), width=64, learning_rate=1e-4),
    "mamba_short": short(dict(name="mamba"), **SHORT),
    "s4d_short": short(dict(name="s4d"), **SHORT),
    "s5_short": short(dict(name="s5", C_init="trunc_standard_normal"), **SHORT),
}  # fmt: skip

TRAIN = dict(batch_size=64, duration="400000 steps", eval_every="5000 steps")


def get_config(recipe: str = "s5"):
    task = dict(name="selective_copying")
    return experiment(name="synthetic_copying", task=task, recipes=RECIPES, recipe=recipe, train=TRAIN)
