"""Recipes of low-rank and kernel attention on Long Range Arena, with their sources.

`lra_low_rank`: Linformer, Performer and the Linear Transformer of google-research/long-range-arena (Tay et al. 2020, table 1).
`small_low_rank`: those and Nyström attention in the small protocol of mlpen/Nystromformer (`recipes.small_transformer`).

Published test accuracy in % (Tay et al., table 1; then Skyformer, table 1, and FlashAttention, table 3, for the small protocol):

                              ListOps        Text           Retrieval      Image          Pathfinder
    linformer                 35.7           53.9           52.3           38.6           76.3
    performer                 18.0           65.4           53.8           42.8           77.1
    linear_attention          16.1           65.9           53.1           42.3           75.3
    linformer_small           37.5, 35.6     58.9, 55.9     78.2, 77.7     38.0, 37.8     60.9, 67.6
    performer_small           38.0, 36.8     64.2, 63.6     80.0, 82.2     41.4, 42.1     66.3, 69.9
    linear_attention_small    -, 38.8        -, 63.2        -, 80.7        -, 42.6        -, 72.5
    nystrom_small             38.5, -        64.8, -        80.5, -        41.3, -        69.5, -

Xiong et al. (2021) print 37.2, 65.5, 79.6, 41.6 and 70.9 for Nyström attention. Skyformer trains 50,000 steps, with 128
landmarks and no convolution, 128 projected positions, and 128 features of FAVOR+; the configs of mlpen/Nystromformer, which these
recipes follow, have 32 to 256 landmarks with a convolution, 256 positions, and 256 features of the ReLU kernel.
"""

from collections.abc import Mapping
from typing import Any

from configs.recipes import lra_transformer, small_transformer

Recipe = dict[str, Any]


def lra_low_rank(base: Mapping[str, Any], *, max_length: int, **changes: Mapping[str, Any]) -> dict[str, Recipe]:
    """Recipes by the mechanism's name; the arguments are those of `recipes.lra_sparse`.

    Linformer there has 16 positions and one projection for all heads, keys and values of a layer. Performer there is the ReLU
    kernel of queries and keys themselves, without random features; on ListOps FAVOR+ with 2 features, drawn anew at every pass.
    """
    mixers = {
        "linformer": dict(name="linformer", projected_length=16, sharing="key-value", max_length=max_length),
        "performer": dict(name="performer", kernel="relu", num_features=0),
        "linear_attention": dict(name="linear_attention"),
    }
    recipes = {}
    for name, mixer in mixers.items():
        own = dict(changes.get(name, {}))
        mixer |= own.pop("mixer", {})
        recipes[name] = lra_transformer(**{**base, **own}, mixer=mixer)
    return {name: _without_dropout(recipe) for name, recipe in recipes.items()}


def small_low_rank(protocol: Mapping[str, Any], *, max_length: int) -> dict[str, Recipe]:
    """Recipes in the small protocol: linformer-256, performer-256 with the ReLU kernel, linear, and nystrom-128 there.

    Linformer's projection is shared among layers; there each head has its own.
    """
    mixers = {
        "linformer_small": dict(name="linformer", projected_length=256, sharing="layerwise", max_length=max_length),
        "performer_small": dict(name="performer", kernel="relu", num_features=256),
        "linear_attention_small": dict(name="linear_attention"),
        "nystrom_small": dict(name="nystrom", num_landmarks=128, conv_kernel=35, pinv_init="original"),
    }
    return {name: _without_dropout(small_transformer(**protocol, mixer=mixer)) for name, mixer in mixers.items()}


def _without_dropout(recipe: Recipe) -> Recipe:
    """The recipe without dropout of attention weights, for mechanisms that form none."""
    mixer = recipe["model"]["mixer"]
    if mixer["name"] == "linformer":
        return recipe
    mixer = {key: value for key, value in mixer.items() if key != "dropout"}
    return {**recipe, "model": {**recipe["model"], "mixer": mixer}}
