"""Multi-query associative recall as published (Arora et al. 2023, "Zoology", figure 2; HazyResearch/zoology).

    python train.py --config=configs/synthetic_recall.py --config.optimizer.learning_rate=1e-3

Published: two layers of softmax attention reach >= 99 % at every length and width (the paper sweeps the learning rate over
1e-4, 4.6e-4, 2.2e-3, 1e-2); models of fixed state need widths that grow with the length. No time is published for one run.
"""

from configs.recipes_mamba import NO_DECAY
from efficient_attn.config import experiment

OPTIMIZER = dict(learning_rate=2.2e-3, schedule="cosine", weight_decay=0.1)
POSITIONS = dict(name="learned")


def recipe(*mixers: dict, positions: dict | None = None, **optimizer) -> dict:
    """Two layers without feed-forward networks, the mixers in turn."""
    model = dict(depth=2, width=64, mixer=mixers if len(mixers) > 1 else mixers[0])
    return {"model": model | (dict(positions=positions) if positions else {}), "optimizer": OPTIMIZER | optimizer}


MAMBA = dict(rules=(NO_DECAY, (r".*", {})))

RECIPES = {
    "softmax": recipe(dict(name="softmax", num_heads=1, dropout=0.1), positions=POSITIONS),
    "local": recipe(dict(name="local", num_heads=1, window=8, dropout=0.1), positions=POSITIONS),
    "linear_attention": recipe(dict(name="linear_attention", num_heads=1), positions=POSITIONS),
    "mamba": recipe(dict(name="mamba"), **MAMBA),
    "mamba2": recipe(dict(name="mamba2", state_dim=64, head_dim=16), **MAMBA),
    "s4d": recipe(dict(name="s4d", state_dim=64)),
    "s5": recipe(dict(name="s5", state_dim=64, C_init="trunc_standard_normal")),
    "identity": recipe(dict(name="identity")),
}

TRAIN = dict(batch_size=512, duration="64 epochs", early_stop=0.99)


def get_config(recipe: str = "softmax"):
    task = dict(name="multi_query_recall", length=64, num_pairs=4)
    return experiment(name="synthetic_recall", task=task, recipes=RECIPES, recipe=recipe, train=TRAIN)
