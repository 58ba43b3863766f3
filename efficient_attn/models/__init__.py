"""Models: a trunk of blocks under the head that a task asks for."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from efficient_attn.arguments import ConfigError, arguments_of, check_arguments, lookup
from efficient_attn.mixers import MIXERS
from efficient_attn.models import moe
from efficient_attn.models.blocks import NORMS, POOLINGS, REMAT_POLICIES
from efficient_attn.models.decoder import LanguageModel
from efficient_attn.models.encoder import Classifier, Matcher
from efficient_attn.models.feed_forward import FEED_FORWARDS
from efficient_attn.models.han import HAN
from efficient_attn.models.trunk import RESIDUALS, by_depth, mixers_by_depth
from efficient_attn.tasks.base import Task

HEADS: Mapping[str, type[nn.Module]] = {"classify": Classifier, "match": Matcher, "lm": LanguageModel}
"""The model for each kind of task."""

ARCHITECTURES: Mapping[str, Mapping[str, type[nn.Module]]] = {"trunk": HEADS, "han": {"classify": HAN}}
"""Models by `config.model.architecture`, "trunk" where it is not given: those with a stack of mixers, and others."""

FROM_TASK = ("vocab_size", "num_outputs", "length")
"""Constructor arguments that the task decides."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def constructor(architecture: str, head: str) -> type[nn.Module]:
    """The model of an architecture for a kind of task. Raises `ConfigError` where there is none."""
    heads = lookup(ARCHITECTURES, architecture, "model.architecture")
    if head not in heads:
        raise ConfigError(f"model.architecture={architecture!r} has no model for {head!r} tasks; it has: {', '.join(heads)}")
    return heads[head]


def build(model: Mapping[str, Any], task: Task) -> nn.Module:
    """The module `config.model` describes for this task. Raises `ConfigError`."""
    arguments = dict(model)
    dtype = lookup(DTYPES, arguments.pop("dtype", "float32"), "model.dtype")
    from_task = {field: getattr(task, field) for field in FROM_TASK}
    architecture = arguments.pop("architecture", "trunk")
    model_class = constructor(architecture, task.head)
    check_arguments(model_class, {**arguments, **from_task}, "model")
    if architecture != "trunk":
        return model_class(**arguments, **from_task, dtype=dtype)
    depth = arguments.get("depth", arguments_of(model_class)["depth"].default)
    mixers = mixers_by_depth(arguments["mixer"], depth)
    if task.head == "lm" and not all(m.get("causal") for m in mixers):
        without = [m["name"] for m in mixers if not lookup(MIXERS, m.get("name"), "model.mixer.name").causal]
        if without:
            raise ConfigError(f"a language model needs causal mixers, and {without[0]!r} has no causal form")
        raise ConfigError("a language model needs causal mixers: set causal=True in model.mixer")
    if arguments.get("pooling") == "cls" and any(m.get("causal") for m in mixers):
        raise ConfigError("model.pooling='cls' reads the first position, which causal mixers tell nothing; use 'mean' or 'last'")
    draws = arguments.get("position_sampling", {}).get("name", "none") != "none"
    if arguments.get("pooling") == "cls" and (draws or arguments.get("positions", {}).get("per_layer")):
        raise ConfigError("model.pooling='cls' goes with no position_sampling and no positions per layer; use 'mean'")
    if "experts" in arguments:
        routings = [moe.routing(experts) for experts in by_depth(arguments["experts"], depth, "model.experts")]
        if any(routings) and not arguments.get("feed_forward_width"):
            raise ConfigError("model.experts makes mixtures of feed-forward networks: set model.feed_forward_width")
        if any(routings) and arguments.get("feed_forward_chunk"):
            raise ConfigError("model.feed_forward_chunk goes with no model.experts: mixtures route all positions together")
    for field, table in TABLES.items():
        if field in arguments:
            lookup(table, arguments[field], f"model.{field}")
    module = model_class(**arguments, **from_task, dtype=dtype)
    if module.residual == "reversible":
        _check_reversible(module)
    return module


TABLES = {
    "norm": NORMS,
    "feed_forward": FEED_FORWARDS,
    "remat": REMAT_POLICIES,
    "pooling": POOLINGS,
    "residual": RESIDUALS,
}
"""Constructor arguments that name an entry of a table."""


def _check_reversible(module: nn.Module) -> None:
    """Raise `ConfigError` for what a reversible stack does not go with."""
    if getattr(module, "has_memory", False):
        raise ConfigError("model.residual='reversible' goes with no mixer that carries a memory from segment to segment")
    needs = {
        "feed_forward_width": (bool(module.feed_forward_width), "more than 0: the streams take mixer and network in turn"),
        "prenorm": (module.prenorm, "True: a norm of the sum cannot be inverted"),
        "remat": (module.remat == "none", "'none': nothing is kept that could be recomputed"),
        "bias": (module.bias.get("name") == "none", "none: set model.mixer.bias, which is each layer's own"),
        "positions": (not module.positions.get("per_layer"), "added once, not per_layer"),
    }
    for field, (is_met, needed) in needs.items():
        if not is_met:
            raise ConfigError(f"model.residual='reversible' needs model.{field} to be {needed}; it is {getattr(module, field)!r}")
