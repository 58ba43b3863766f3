"""Multi-query associative recall in miniature (Arora et al. 2023, "Zoology"): 4 key-value pairs are shown, then asked for.

    python train.py --config=configs/quickstart.py                  two layers of softmax attention: >= 99 % on unseen test draws
    python train.py --config=configs/quickstart.py:identity         the same model without mixing: stays at chance, 1/64

Expected time: about one minute on two CPU cores. 128 tokens (63 keys, 64 values), length 64; examples drawn as they are read.
"""

from efficient_attn.config import experiment


def model(mixer: dict) -> dict:
    return dict(depth=2, width=64, embed_stddev=1.0, positions=dict(name="learned"), mixer=mixer)


OPTIMIZER = dict(learning_rate=3e-3, schedule="cosine", warmup="100 steps", weight_decay=0.1, clip_norm=1.0)

RECIPES = {
    "softmax": {"model": model(dict(name="softmax", num_heads=1)), "optimizer": OPTIMIZER},
    "identity": {"model": model(dict(name="identity")), "optimizer": OPTIMIZER},
}

TRAIN = dict(
    batch_size=64, duration="1500 steps", eval_every="200 steps", checkpoint_every="200 steps", log_every=50, early_stop=0.9995
)


def get_config(recipe: str = "softmax"):
    task = dict(name="multi_query_recall", length=64, vocab_size=128, num_pairs=4, num_examples=200_000)
    return experiment(name="quickstart", task=task, recipes=RECIPES, recipe=recipe, train=TRAIN)
