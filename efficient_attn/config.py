"""Configurations: a task, a recipe and the defaults of every constructor make one complete ConfigDict.

The values under `config.task`, `config.model`, `config.model.mixer`, `config.optimizer`, `config.train` and `config.sharding`
are the keyword arguments of the constructors they configure. A recipe spells out only what differs from their defaults;
`experiment` fills in the rest, so that every argument can be set from the command line and nothing is silently ignored.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from efficient_attn import models, optim, positions, tasks
from efficient_attn.arguments import ConfigError, arguments_of, check_arguments, is_optional, lookup
from efficient_attn.mixers import MIXERS
from efficient_attn.models import moe
from efficient_attn.sharding import ShardingConfig

Config = Mapping[str, Any] | ml_collections.ConfigDict
"""A configuration as the config files make it, or its normal form."""

MAY_CHANGE = (
    "train.duration", "train.eval_every", "train.checkpoint_every", "train.log_every", "train.eval_batch_size",
    "train.max_eval_batches", "train.early_stop", "train.patience", "train.tensorboard", "train.wandb", "train.prefetch",
    "train.on_divergence", "train.spike_factor", "train.max_divergences",
    "task.data_dir", "sharding",
)  # fmt: skip
"""Fields, and whole sections, that a resumed run may set otherwise than the run it continues."""


def may_change(field: str) -> bool:
    """Whether `field`, a dotted path, is one of `MAY_CHANGE` or in one of its sections."""
    return field in MAY_CHANGE or field.partition(".")[0] in MAY_CHANGE


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`: how the loop runs. Durations are '5000 steps', '40 epochs' or '2e6 examples'.

    replicas: seeds trained as one program, seed, seed + 1, ...: each has its own parameters, order of the data and dropout; the
        best step is that of their mean, and `early_stop` waits until all are there.
    batch_size: examples of one optimiser step of one replica, over all devices.
    accumulate: micro-batches one after the other that a step's gradient is summed over.
    duration: of the run.
    eval_every: between evaluations on the validation split; max_eval_batches bounds each one (0: all of the split).
    eval_batch_size: 0 means batch_size.
    checkpoint_every: between checkpoints, besides those at evaluations.
    log_every: steps between lines of metrics.jsonl.
    label_smoothing: mass spread evenly over all classes (Szegedy et al. 2016).
    loss_chunk: positions whose logits exist at a time (language models with large vocabularies); 0 for all at once.
    on_divergence: what to do at a step that is not finite, or too far from those before it: one of `divergence.POLICIES`.
    spike_factor: how many times the running median of gradient norms is too far; 0 is off.
    max_divergences: skipped steps, or rollbacks, after which the run stops all the same.
    early_stop: stop when the task's metric reaches this (accuracy >=, loss <=); 0 is off.
    patience: stop after this many evaluations without improvement; 0 is off.
    tensorboard, wandb: also write metrics there.
    prefetch: batches read ahead.
    """

    replicas: int = 1
    batch_size: int = 32
    accumulate: int = 1
    duration: str = "10 epochs"
    eval_every: str = "1 epochs"
    max_eval_batches: int = 0
    eval_batch_size: int = 0
    checkpoint_every: str = "1000 steps"
    log_every: int = 50
    label_smoothing: float = 0.0
    loss_chunk: int = 0
    on_divergence: str = "stop"
    spike_factor: float = 0.0
    max_divergences: int = 10
    early_stop: float = 0.0
    patience: int = 0
    tensorboard: bool = True
    wandb: bool = False
    prefetch: int = 4


TABLES: Mapping[str, Callable[[str], Callable]] = {
    "mixer": lambda name: lookup(MIXERS, name, "model.mixer.name").constructor,
    "experts": lambda name: lookup(moe.ROUTINGS, name, "model.experts.name"),
    "positions": lambda name: lookup(positions.EMBEDDINGS, name, "model.positions.name"),
    "rotation": lambda name: lookup(positions.ROTATIONS, name, "model.mixer.rotation.name"),
    "bias": lambda name: lookup(positions.BIASES, name, "bias.name"),
    "position_sampling": lambda name: lookup(positions.SAMPLINGS, name, "model.position_sampling.name"),
}
"""Fields that hold dict(name=..., arguments): which constructor the name stands for."""


SECTIONS = ("model", "optimizer", "train", "task", "sharding")
"""What a recipe may hold."""


def experiment(
    *,
    name: str,
    task: Mapping[str, Any],
    recipes: Mapping[str, Mapping[str, Any]],
    recipe: str,
    train: Mapping[str, Any] | None = None,
    sharding: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ml_collections.ConfigDict:
    """The complete configuration of one of a file's recipes.

    name: the config file's; runs are named after it.
    recipes: by mechanism, each with sections of constructor arguments: `model`, `optimizer`, `train`, `task` and `sharding`.
    recipe: which one. Raises `ConfigError` if the file publishes none of that name.
    train, sharding: arguments common to all recipes.
    """
    chosen = lookup(recipes, recipe, f"recipe of configs/{name}.py")
    unknown = set(chosen) - {*SECTIONS}
    if unknown:
        raise ConfigError(f"recipe {recipe!r} has unknown sections {sorted(unknown)}; known: {', '.join(SECTIONS)}")
    sections = {
        "task": {**task, **chosen.get("task", {})}, "model": {"dtype": "float32", **chosen["model"]},
        "optimizer": chosen.get("optimizer", {}), "train": {**(train or {}), **chosen.get("train", {})},
        "sharding": {**(sharding or {}), **chosen.get("sharding", {})},
    }  # fmt: skip
    config = {"name": name, "recipe": recipe, "seed": seed, **_complete_sections(sections)}
    return ml_collections.ConfigDict(config, convert_dict=True).lock()


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration in normal form, with the defaults of arguments that did not exist when it was stored.

    Raises `ConfigError` where it holds an argument that exists no more.
    """
    return normal_form({**config, **_complete_sections({name: config.get(name, {}) for name in SECTIONS})})


def _complete_sections(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`SECTIONS` with the defaults of every argument that they leave out."""
    task, model = sections["task"], dict(sections["model"])
    task_class = lookup(tasks.TASKS, task.get("name"), "task.name")
    kept = {key: model.pop(key) for key in ("dtype", "architecture") if key in model}
    constructor = models.constructor(kept.get("architecture", "trunk"), task_class.head)
    if "mixer" in arguments_of(constructor):
        model["mixer"] = _with_causality(model.get("mixer"), causal=task_class.head == "lm")
    return {
        "task": {"name": task["name"], **_complete(task_class, _without_name(task), "task")},
        "model": {**kept, **_complete(constructor, model, "model")},
        "optimizer": _complete(optim.OptimizerConfig, sections["optimizer"], "optimizer"),
        "train": _complete(TrainConfig, sections["train"], "train"),
        "sharding": _complete(ShardingConfig, sections["sharding"], "sharding"),
    }  # fmt: skip


def _without_name(section: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k != "name"}


def _with_causality(mixer: Any, *, causal: bool) -> Any:
    """Mixers of a language model are causal unless they say otherwise, all others are not."""
    if isinstance(mixer, Mapping):
        return {"causal": causal, **mixer}
    if isinstance(mixer, tuple | list):
        return tuple(_with_causality(m, causal=causal) for m in mixer)
    raise ConfigError(f"model.mixer must be a dict(name=...) or a tuple of such dicts, got {mixer!r}")


def _complete(constructor: Callable, given: Mapping[str, Any], field: str) -> dict[str, Any]:
    """`given` and the defaults of all other arguments, nested dict(name=...) fields likewise."""
    from_task = {k: 1 for k in models.FROM_TASK if k in arguments_of(constructor)} if field == "model" else {}
    for key in sorted(TABLES.keys() & given.keys() & arguments_of(constructor).keys()):
        _check_named(given[key], f"{field}.{key}")
    check_arguments(constructor, {**from_task, **given}, field)
    complete = {}
    for key, argument in arguments_of(constructor).items():
        if key in from_task:
            continue
        value = given.get(key, argument.default)
        if key in TABLES:
            value = _complete_named(key, value, f"{field}.{key}")
        elif value is None and is_optional(argument.type):
            value = config_dict.placeholder(is_optional(argument.type))
        complete[key] = value
    return complete


def _check_named(value: Any, field: str) -> None:
    if isinstance(value, tuple | list):
        for i, one in enumerate(value):
            _check_named(one, f"{field}.{i}")
    elif not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"{field} must be dict(name=..., its arguments), got {value!r}")


def _complete_named(key: str, value: Any, field: str) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_complete_named(key, v, f"{field}.{i}") for i, v in enumerate(value))
    _check_named(value, field)
    constructor = TABLES[key](value["name"])
    return {"name": value["name"], **_complete(constructor, _without_name(value), field)}


def normal_form(config: Any) -> Any:
    """The configuration as JSON would give it back: dicts, lists, numbers and strings. What comparisons are made in."""
    if isinstance(config, config_dict.FieldReference):
        return normal_form(config.get())
    if isinstance(config, ml_collections.ConfigDict):
        return {k: normal_form(config[k]) for k in sorted(config.keys())}
    if isinstance(config, Mapping):
        return {str(k): normal_form(config[k]) for k in sorted(config)}
    if isinstance(config, tuple | list):
        return [normal_form(v) for v in config]
    return json.loads(json.dumps(config))


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) of every field in which two normal forms differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in sorted(old.keys() | new.keys()):
            found |= differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        return found
    return {} if old == new else {prefix: (old, new)}


def section(constructor: Callable, values: Mapping[str, Any], field: str) -> Any:
    """`constructor(**values)` after the same checks as at completion, for values that flags may have changed."""
    values = dict(values)
    check_arguments(constructor, values, field)
    return constructor(**values)
