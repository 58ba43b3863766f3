"""Path-256: Pathfinder at 256 x 256 pixels, a sequence of 65,536.

    python train.py --config=configs/lra_path256.py --config.task.num_examples=16 --config.train.batch_size=1     a small try

Published test accuracy: block-sparse FlashAttention 63.1 (Dao et al. 2022, table 6, with pretraining on Path-64); the LRA
repository publishes this recipe for the transformer, whose result is chance. No time is published, and no S5 recipe, so there is
none here.
"""

from configs.recipes import lra_transformer
from efficient_attn.config import experiment

RECIPES = {
    "transformer": lra_transformer(
        depth=2, heads=4, width=32, mlp=32, batch=32, epochs=100, lr=1e-3, schedule="cosine", warmup=5_000,
        weight_decay=0.0, dropout=0.1, attention_dropout=0.1, positions="learned",
    ),
}  # fmt: skip


def get_config(recipe: str = "transformer"):
    task = dict(name="pathfinder", resolution=256, as_tokens=True)
    return experiment(name="lra_path256", task=task, recipes=RECIPES, recipe=recipe)
