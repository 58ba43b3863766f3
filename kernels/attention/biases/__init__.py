"""What happens to a score before the softmax: values that pair a static rule with the arrays it reads or learns.

A bias is a pytree whose leaves are its arrays; `base` says what every implementation asks of it. One of your own is `Function`,
or a subclass of `Bias` with `axes` and `score`.
"""

from kernels.attention.biases.base import At, Axes, Bias, Chain, Dense, Function, Windows, add_to, bounds, chain, cut, pad
from kernels.attention.biases.distance import ALiBi, DistanceAware, KerpleLog, KerplePower, Sandwich, alibi_slopes
from kernels.attention.biases.labels import Bucketed, Clipped, Labels, T5Buckets

__all__ = [
    "ALiBi",
    "At",
    "Axes",
    "Bias",
    "Bucketed",
    "Chain",
    "Clipped",
    "Dense",
    "DistanceAware",
    "Function",
    "KerpleLog",
    "KerplePower",
    "Labels",
    "Sandwich",
    "T5Buckets",
    "Windows",
    "add_to",
    "alibi_slopes",
    "bounds",
    "chain",
    "cut",
    "pad",
]
