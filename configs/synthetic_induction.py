"""Induction heads as in Mamba's table 11 (Gu & Dao 2023): which token followed the trigger? 256 tokens of a vocabulary of 16.

    python train.py --config=configs/synthetic_induction.py:softmax

Published: attention with rotary positions (2 layers, width 128, 8 heads, 137K parameters) solves the training length and falls
to 83.6 % at twice that; 50 epochs of 8,192 steps of batch 8, Adam at 2e-4. Chance is 1/16. No time is published.
"""

from efficient_attn.config import experiment

RECIPES = {
    "softmax": {
        "model": dict(depth=2, width=128, mixer=dict(name="softmax", num_heads=8, rotation=dict(name="rotary"))),
        "optimizer": dict(learning_rate=2e-4, schedule="constant"),
        "train": dict(duration=f"{50 * 8192} steps"),
    },
    "softmax_absolute": {
        "model": dict(depth=2, width=128, positions=dict(name="learned"), mixer=dict(name="softmax", num_heads=8)),
        "optimizer": dict(learning_rate=2e-4, schedule="constant"),
        "train": dict(duration=f"{25 * 8192} steps"),
    },
}

TRAIN = dict(batch_size=8, eval_every="8192 steps", eval_batch_size=128)


def get_config(recipe: str = "softmax"):
    task = dict(name="induction_heads", length=256, num_examples=50 * 8192 * 8)
    return experiment(name="synthetic_induction", task=task, recipes=RECIPES, recipe=recipe, train=TRAIN)
