"""enwik8: 100 MB of Wikipedia's XML, bits per byte; 90, 5 and 5 million bytes of train, validation and test.

    python train.py --config=configs/lm_enwik8.py:transformer_xl
    python train.py --config=configs/lm_enwik8.py:transformer_xl --config.task.path=FILE        where there is no network

transformer_xl is the 12-layer model (41M parameters) of Dai et al. 2019 as kimiyoung/transformer-xl trains it
(pytorch/run_enwik8_base.sh): published 1.06 bits per byte on the test split, with segments of 80, a memory of 2,100 and distances
clamped at 820. Here evaluation has the trained segments of 512 and a memory of 2,100, without clamping. The schedule is a cosine
to 0 over 400,000 steps, as there. transformer: the same without memory (ours, for comparison). Losses are nats a byte: divide by
log 2. Expected time: not run.
"""

from configs.recipes_memory import recipes
from efficient_attn.config import experiment

RECIPES = recipes()


def get_config(recipe: str = "transformer_xl"):
    task = dict(name="lm_text", corpus="enwik8", context=512, order="streams")
    return experiment(name="lm_enwik8", task=task, recipes=RECIPES, recipe=recipe)
