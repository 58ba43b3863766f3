"""Recipes of hierarchical attention and Fourier mixing on Long Range Arena.

Published test accuracy in %, fnet as the S4 paper prints it (Gu et al. 2022, table 10), h_transformer_1d as LION does (table 7):

                         ListOps   Text   Retrieval   Image   Pathfinder
    fnet                   35.3    65.1     59.6       38.7     77.8
    h_transformer_1d       49.5    78.7     64.0       46.1     68.8

What is known of their hyper-parameters here is the block size of H-Transformer-1D, 16. Everything else is that of the Transformer
of google-research/long-range-arena (`recipes.lra_transformer`), for combiner and bp_transformer too, for which there is nothing
to compare with.

Adaptive span and Self-Extend belong to language models: `config.model.mixer = dict(name="adaptive_span", bias=dict(name=
"transformer_xl"), ...)`, and on a trained model with rotary positions `rotation=dict(name="self_extend", ...)` at evaluation.
"""

from collections.abc import Mapping
from typing import Any

from configs.recipes import lra_transformer

Recipe = dict[str, Any]


def lra_hierarchy(base: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> dict[str, Recipe]:
    """Recipes by the mechanism's name. base: arguments of `recipes.lra_transformer`. task: arguments of the task."""
    mixers = {
        "h_transformer_1d": dict(name="h_transformer_1d", block_size=16),
        "combiner": dict(name="combiner", factorisation="axial_rowmajor", size=32),
        "bp_transformer": dict(name="bp_transformer", neighbours=4),
    }
    recipes = {name: lra_transformer(**base, mixer=mixer) for name, mixer in mixers.items()}
    transformer = lra_transformer(**base)
    recipes["fnet"] = {**transformer, "model": {**transformer["model"], "mixer": dict(name="fnet")}}
    return {name: {"task": dict(task or {}), **recipe} for name, recipe in recipes.items()}


HAN: Recipe = {
    "model": dict(architecture="han", width=200, hidden=50, sentence_length=64),
    "optimizer": dict(learning_rate=1e-3, schedule="cosine", clip_norm=1.0),
    "train": dict(batch_size=64, duration="20 epochs"),
}
"""Yang et al. (2016, section 3.3): 200-dimensional words, GRUs of 50, batch 64. They train with momentum at a rate searched for,
on words and sentences; here Adam, on bytes and blocks of 64 of them."""
