"""text8: 100 MB of Wikipedia in 27 characters, bits per character; 90, 5 and 5 million of train, validation and test.

    python train.py --config=configs/lm_text8.py:transformer_xl
    python train.py --config=configs/lm_text8.py:transformer_xl --config.task.path=FILE        where there is no network

The recipes are those of `lm_enwik8.py`. Published on text8 is the 24-layer Transformer-XL alone (277M parameters, 1.08; Dai et
al. 2019), and 1.18 of the 12-layer transformer of Al-Rfou et al. 2019. Losses are nats: divide by log 2. Expected time: not run.
"""

from configs.recipes_memory import recipes
from efficient_attn.config import experiment

RECIPES = recipes()


def get_config(recipe: str = "transformer_xl"):
    task = dict(name="lm_text", corpus="text8", context=512, order="streams")
    return experiment(name="lm_text8", task=task, recipes=RECIPES, recipe=recipe)
