"""Recipes of content-based attention on Long Range Arena, with their sources.

`lra_content`: Reformer and the Sinkhorn Transformer of google-research/long-range-arena (Tay et al. 2020, table 1).
`small_content`: Reformer in the small protocol of mlpen/Nystromformer (`recipes.small_transformer`).

Published test accuracy in % (Tay et al., table 1; then Skyformer, table 1, and FlashAttention, table 3, for the small protocol):

                              ListOps        Text           Retrieval      Image          Pathfinder
    reformer                  37.3           56.1           53.4           38.1           68.5
    sinkhorn                  33.7           61.2           53.8           41.2           67.5
    reformer_small            37.7, 36.5     62.9, 63.8     79.0, 78.5     48.9, 39.6     66.5, 69.4

FlashAttention's table also has SMYRF (36.1, 64.1, 79.0, 39.6, 70.5) without its hyper-parameters, so there is no recipe of it.
Skyformer trains 50,000 steps.
"""

from collections.abc import Mapping
from typing import Any

from configs.recipes import lra_transformer, small_transformer

Recipe = dict[str, Any]


def lra_content(base: Mapping[str, Any], *, max_length: int, **changes: Mapping[str, Any]) -> dict[str, Recipe]:
    """Recipes by the mechanism's name; the arguments are those of `recipes.lra_sparse`.

    Reformer there has one hash of 10 buckets, cuts every sequence into 10 chunks, and lets tokens of a chunk see each other and
    themselves whatever their buckets; its keys are not of length one, the hash is one for all steps, and padding is attended.
    Sinkhorn there sorts by a softmax without balancing, and the model pools by the mean. Here both are as their papers have
    them but for the sizes, and for buckets that do not matter inside chunks.
    """
    published = {
        "reformer": dict(mixer=dict(rounds=1, num_buckets=10, chunk_size=max_length // 10 + 1, across_buckets=True)),
        "sinkhorn": dict(mixer=dict(block_size=50, max_length=max_length), pooling="mean"),
    }
    recipes = {}
    for name, shared in published.items():
        own = dict(changes.get(name, {}))
        mixer = {"name": name, **shared.pop("mixer"), **own.pop("mixer", {})}
        recipes[name] = lra_transformer(**{**base, **shared, **own}, mixer=mixer)
    return recipes


def small_content(protocol: Mapping[str, Any]) -> dict[str, Recipe]:
    """reformer-2 there: transformers' layer with 2 hashes and its default chunks of 64, one looked back to.

    That layer joins the sorted ends to a circle, through all rounds; here the first chunk of a round has none before it.
    """
    mixer = dict(name="reformer", rounds=2, chunk_size=64, across_buckets=True, correct_duplicates=False)
    return {"reformer_small": small_transformer(**protocol, mixer=mixer)}
