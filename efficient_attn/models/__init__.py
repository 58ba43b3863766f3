"""Models: a trunk of blocks under the head that a task asks for."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from efficient_attn.arguments import ConfigError, check_arguments, lookup
from efficient_attn.models import moe
from efficient_attn.models.blocks import NORMS, POOLINGS, REMAT_POLICIES
from efficient_attn.models.decoder import LanguageModel
from efficient_attn.models.encoder import Classifier, Matcher
from efficient_attn.models.feed_forward import FEED_FORWARDS
from efficient_attn.models.trunk import by_depth, mixers_by_depth
from efficient_attn.tasks.base import Task

HEADS: Mapping[str, type[nn.Module]] = {"classify": Classifier, "match": Matcher, "lm": LanguageModel}
"""The model for each kind of task."""

FROM_TASK = ("vocab_size", "num_outputs", "length")
"""Constructor arguments that the task decides."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def build(model: Mapping[str, Any], task: Task) -> nn.Module:
    """The module `config.model` describes for this task. Raises `ConfigError`."""
    arguments = dict(model)
    dtype = lookup(DTYPES, arguments.pop("dtype", "float32"), "model.dtype")
    from_task = {field: getattr(task, field) for field in FROM_TASK}
    check_arguments(HEADS[task.head], {**arguments, **from_task}, "model")
    mixers = mixers_by_depth(arguments["mixer"], arguments["depth"])
    if task.head == "lm" and not all(m.get("causal") for m in mixers):
        raise ConfigError("a language model needs causal mixers: set causal=True in model.mixer")
    if arguments.get("pooling") == "cls" and any(m.get("causal") for m in mixers):
        raise ConfigError("model.pooling='cls' reads the first position, which causal mixers tell nothing; use 'mean' or 'last'")
    draws = arguments.get("position_sampling", {}).get("name", "none") != "none"
    if arguments.get("pooling") == "cls" and (draws or arguments.get("positions", {}).get("per_layer")):
        raise ConfigError("model.pooling='cls' goes with no position_sampling and no positions per layer; use 'mean'")
    if "experts" in arguments:
        routings = [moe.routing(experts) for experts in by_depth(arguments["experts"], arguments["depth"], "model.experts")]
        if any(routings) and not arguments.get("feed_forward_width"):
            raise ConfigError("model.experts makes mixtures of feed-forward networks: set model.feed_forward_width")
    for field, table in (("norm", NORMS), ("feed_forward", FEED_FORWARDS), ("remat", REMAT_POLICIES), ("pooling", POOLINGS)):
        if field in arguments:
            lookup(table, arguments[field], f"model.{field}")
    return HEADS[task.head](**arguments, **from_task, dtype=dtype)
