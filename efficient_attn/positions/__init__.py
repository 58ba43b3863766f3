"""How positions reach the model: added to embeddings, applied to queries and keys, to scores, or drawn while training.

A table for each, from the name in a configuration's dict(name=..., arguments) to the constructor of these arguments. Rotations
and biases are position methods, which wrap attention: `base.Biased` says how.
"""

from collections.abc import Mapping
from typing import Any

from efficient_attn.arguments import check_arguments, lookup
from efficient_attn.positions import learned_biases, rotary, sampling, scaling, truncation
from efficient_attn.positions.absolute import Learned, NoPositions, Sinusoidal
from efficient_attn.positions.base import Biased, Places, Sizes

__all__ = ["BIASES", "EMBEDDINGS", "ROTATIONS", "SAMPLINGS", "Biased", "Places", "Sizes", "build"]

EMBEDDINGS: Mapping[str, type] = {"none": NoPositions, "sinusoidal": Sinusoidal, "learned": Learned}
"""Modules added to token embeddings: `config.model.positions = dict(name=...)`."""

ROTATIONS: Mapping[str, type] = {
    "none": rotary.NoRotation,
    "rotary": rotary.Rotary,
    "xpos": rotary.XPos,
    "linear": scaling.Linear,
    "ntk": scaling.NTK,
    "dynamic_ntk": scaling.DynamicNTK,
    "ntk_by_parts": scaling.NTKByParts,
    "yarn": scaling.YaRN,
    "llama3": scaling.Llama3,
    "longrope": scaling.LongRoPE,
    "giraffe_power": scaling.GiraffePower,
    "giraffe_truncated": scaling.GiraffeTruncated,
    "rerope": truncation.ReRoPE,
    "leaky_rerope": truncation.LeakyReRoPE,
    "self_extend": truncation.SelfExtend,
}
"""What attention does to queries and keys: `config.model.mixer.rotation = dict(name=...)`."""

BIASES: Mapping[str, type] = {
    "none": learned_biases.NoBias,
    "alibi": learned_biases.ALiBi,
    "t5": learned_biases.T5,
    "kerple_log": learned_biases.KerpleLog,
    "kerple_power": learned_biases.KerplePower,
    "sandwich": learned_biases.Sandwich,
    "distance_aware": learned_biases.DistanceAware,
    "shaw": learned_biases.Shaw,
    "transformer_xl": learned_biases.TransformerXL,
}
"""What attention does to scores: `config.model.mixer.bias = dict(name=...)`, or `config.model.bias` for one in all layers."""

SAMPLINGS: Mapping[str, type] = {"none": sampling.NoSampling, "shifted": sampling.Shifted, "randomised": sampling.Randomised}
"""Positions while training: `config.model.position_sampling = dict(name=...)`."""


def build(table: Mapping[str, type], given: Mapping[str, Any], field: str, **injected: Any) -> Any:
    """What the dict(name=..., arguments) `given` in `field` describes. Raises `ConfigError` for an unknown name or argument."""
    arguments = dict(given)
    constructor = lookup(table, arguments.pop("name", None), f"{field}.name")
    check_arguments(constructor, arguments, f"{field} (name={given['name']!r})")
    return constructor(**arguments, **injected)
