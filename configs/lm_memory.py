"""Memory from segment to segment on bytes of any text: small models, minutes on two CPU cores; sizes and schedule are ours.

    python train.py --config=configs/lm_memory.py:transformer_xl --config.task.path=FILE_OR_FOLDER

Row r of each batch continues row r of the batch before, and layers remember what the segments before left: Transformer-XL (Dai
et al. 2019), ERNIE-Doc's enhanced recurrence (Ding et al. 2021), the Compressive Transformer (Rae et al. 2020) and the
infinity-former (Martins et al. 2022). `transformer` is the same model without memory, on the same segments with the same
relative positions. Published at scale: Transformer-XL 24.0 and 18.3 (151M and 257M), Compressive Transformer 17.1 perplexity on
WikiText-103. Here: not run; expected time five to ten minutes a run on two CPU cores.

transformer_xl_short and transformer_short are the short models of lm_text with and without memory, which
configs/tables/extrapolation.py compares.

Evaluation reads the split as `train.eval_batch_size` contiguous streams, each from an empty memory.
"""

from configs.lm_text import TRAIN, TRANSFORMER, short
from efficient_attn.config import experiment

MEMORY = {
    "transformer": dict(name="softmax", bias=dict(name="transformer_xl")),
    "transformer_xl": dict(name="transformer_xl", memory_length=128),
    "ernie_doc": dict(name="ernie_doc", memory_length=128),
    "compressive_transformer": dict(
        name="compressive_transformer", memory_length=128, compressed_length=64, compression_rate=4
    ),
    "infinite_former": dict(name="infinite_former", memory_length=128, num_basis=64, num_samples=128),
}  # fmt: skip


def recipe(mixer):
    model = dict(
        depth=4, width=128, feed_forward_width=512, feed_forward="relu", tied=True, prenorm=False, final_norm=False,
        mixer=dict(mixer, num_heads=4),
    )  # fmt: skip
    return {"model": model, "optimizer": TRANSFORMER}


RECIPES = {
    **{name: recipe(mixer) for name, mixer in MEMORY.items()},
    "transformer_xl_short": short(dict(name="transformer_xl", num_heads=4, memory_length=64)),
    "transformer_short": short(dict(name="softmax", num_heads=4, bias=dict(name="transformer_xl"))),
}


def get_config(recipe: str = "transformer_xl"):
    task = dict(name="lm_text", context=128, order="streams")
    return experiment(name="lm_memory", task=task, recipes=RECIPES, recipe=recipe, train=TRAIN)
