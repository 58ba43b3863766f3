"""Multi-query associative recall as published (Arora et al. 2023, "Zoology", figure 2; HazyResearch/zoology).

    python train.py --config=configs/synthetic_recall.py --config.optimizer.learning_rate=1e-3

Published: two layers of softmax attention reach >= 99 % at every length and width (the paper sweeps the learning rate over
1e-4, 4.6e-4, 2.2e-3, 1e-2); models of fixed state need widths that grow with the length. No time is published for one run.
"""

from efficient_attn.config import experiment

OPTIMIZER = dict(learning_rate=2.2e-3, schedule="cosine", weight_decay=0.1)

RECIPES = {
    "softmax": {
        "model": dict(
            depth=2, width=64, positions=dict(name="learned"), mixer=dict(name="softmax", num_heads=1, dropout=0.1)
        ),
        "optimizer": OPTIMIZER,
    },
    "s5": {
        "model": dict(depth=2, width=64, mixer=dict(name="s5", state_dim=64, C_init="trunc_standard_normal")),
        "optimizer": OPTIMIZER,
    },
    "identity": {"model": dict(depth=2, width=64, mixer=dict(name="identity")), "optimizer": OPTIMIZER},
}  # fmt: skip

TRAIN = dict(batch_size=512, duration="64 epochs", early_stop=0.99)


def get_config(recipe: str = "softmax"):
    task = dict(name="multi_query_recall", length=64, num_pairs=4)
    return experiment(name="synthetic_recall", task=task, recipes=RECIPES, recipe=recipe, train=TRAIN)
