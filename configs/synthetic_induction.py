"""Induction heads as in Mamba's table 11 (Gu & Dao 2023): which token followed the trigger? 256 tokens of a vocabulary of 16.

    python train.py --config=configs/synthetic_induction.py:softmax

Published: attention with rotary positions (2 layers, width 128, 8 heads, 137K parameters) solves the training length and falls
to 83.6 % at twice that; 50 epochs of 8,192 steps of batch 8, Adam at 2e-4. Chance is 1/16. No time is published. The
time-invariant s4d is a control that is not among the paper's rows. Published for mamba (2 layers, width 64, 74K parameters, 25
epochs, Adam at 1e-3): 100 % at every length from 64 to 2^20.

The *_short recipes train at length 64 and need a few minutes on two CPU cores: mamba_short is to solve many times that length,
the time-invariant s4d_short and s5_short are to stay near chance (1/15, as the trigger is no answer).

    python train.py --config=configs/synthetic_induction.py:mamba_short
"""

from configs.recipes_mamba import short, synthetic
from efficient_attn.config import experiment

SHORT = dict(task=dict(length=64, num_examples=2500 * 32), width=32, steps=2500, learning_rate=3e-3)

RECIPES = {
    "softmax": {
        "model": dict(depth=2, width=128, mixer=dict(name="softmax", num_heads=8, rotation=dict(name="rotary"))),
        "optimizer": dict(learning_rate=2e-4, schedule="constant"),
        "train": dict(duration=f"{50 * 8192} steps"),
    },
    "softmax_xpos": {
        "model": dict(depth=2, width=128, mixer=dict(name="softmax", num_heads=8, rotation=dict(name="xpos"))),
        "optimizer": dict(learning_rate=2e-4, schedule="constant"),
        "train": dict(duration=f"{50 * 8192} steps"),
    },
    "softmax_absolute": {
        "model": dict(depth=2, width=128, positions=dict(name="learned"), mixer=dict(name="softmax", num_heads=8)),
        "optimizer": dict(learning_rate=2e-4, schedule="constant"),
        "train": dict(duration=f"{25 * 8192} steps"),
    },
    "s4d": {
        "model": dict(depth=2, width=64, mixer=dict(name="s4d")),
        "optimizer": dict(learning_rate=2e-4, schedule="constant"),
        "train": dict(duration=f"{25 * 8192} steps"),
    },
    "mamba": {
        **synthetic(dict(name="mamba"), width=64, learning_rate=1e-3),
        "train": dict(duration=f"{25 * 8192} steps"),
    },
    "mamba_short": short(dict(name="mamba"), **SHORT),
    "s4d_short": short(dict(name="s4d"), **SHORT),
    "s5_short": short(dict(name="s5", C_init="trunc_standard_normal"), **SHORT),
}

TRAIN = dict(batch_size=8, eval_every="8192 steps", eval_batch_size=128)


def get_config(recipe: str = "softmax"):
    task = dict(name="induction_heads", length=256, num_examples=50 * 8192 * 8)
    return experiment(name="synthetic_induction", task=task, recipes=RECIPES, recipe=recipe, train=TRAIN)
