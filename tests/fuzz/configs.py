"""Random changes to the real configurations, as a program would make them and as flags."""

import copy
import functools
import importlib
import json
import math
import pathlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from efficient_attn import cli, replicas
from efficient_attn.arguments import ConfigError
from efficient_attn.config import normal_form
from efficient_attn.plan import describe, example_batch, make_plan
from efficient_attn.steps import train_step
from tests.fuzz.judge import Case

ROOT = pathlib.Path(__file__).parents[2]
CLEAR = None  # only the project's own errors
SECONDS = 60.0
VALUES = (
    0, 1, 2, 3, 7, -1, 63, 64, 1000, 10**6, 10**9, 2**31, 2**63, 0.0, 0.5, 1.5, -0.5, 4.0, 1e-9, 1e9, math.nan, math.inf,
    True, False, None, "", "s5", "softmax", "64", "5 steps", "1 epochs", "-3 steps", "x" * 300, "ü\n", "nan", [], [1], [1, 2],
    {}, {"name": "s5"}, {"name": "rotary"}, {"name": "no such"}, {"nom": 1}, [{"name": "softmax"}, {"name": "s5"}], [3, {}],
)  # fmt: skip


@functools.cache
def recipes() -> tuple[str, ...]:
    """FILE:RECIPE of every configuration."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if hasattr(module, "get_config"):
            names = getattr(module, "RECIPES", None) or _named(module)
            found += [f"{path.stem}:{name}" for name in names]
    return tuple(found)


def _named(module) -> list[str]:
    """The recipes that the error for a wrong name lists."""
    try:
        module.get_config("no such recipe")
    except ConfigError as error:
        return str(error).rpartition("one of: ")[2].split(", ")
    raise AssertionError(f"{module.__name__} takes any recipe")


@functools.cache
def base(recipe: str) -> dict[str, Any]:
    name, _, variant = recipe.partition(":")
    return normal_form(importlib.import_module(f"configs.{name}").get_config(variant))


def shrunk(recipe: str) -> dict[str, Any]:
    """The configuration with few layers: what is wrong with twelve is wrong with one."""
    config = copy.deepcopy(base(recipe))
    if isinstance(config["model"].get("depth"), int):
        config["model"]["depth"] = min(config["model"]["depth"], 1 if isinstance(config["model"].get("mixer"), dict) else 8)
    return config


def leaves(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every dict entry and list item below `node`."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from leaves(value, (*path, key))


def parent(config: dict, path: tuple) -> Any:
    return functools.reduce(lambda node, key: node[key], path[:-1], config)


def mutate(rng: random.Random, config: dict[str, Any]) -> str:
    """Change one field somewhere below the sections; says how."""
    path = rng.choice([p for p in leaves(config) if p[0] not in ("name", "recipe")])
    node, key, name = parent(config, path), path[-1], ".".join(map(str, path))
    kind = rng.choices(("value", "like", "delete", "rename", "add"), (6, 3, 1, 1, 1))[0]
    if kind == "like" and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = rng.choice([-node[key], node[key] + 1, node[key] * 2, float(node[key]), str(node[key]), node[key] / 2])
    elif kind == "delete":
        del node[key]
        return f"del {name}"
    elif kind == "rename" and isinstance(node, dict):
        node[key[:-1] + "x"] = node.pop(key)
        return f"{name} -> {key[:-1]}x"
    elif kind == "add" and isinstance(node, dict):
        node["added"] = rng.choice(VALUES)
        return f"{name} and added={node['added']!r}"
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    return f"{name}={node[key]!r}"


def accept(config: Any) -> str:
    """Plan the run; an accepted one must print, and its step must trace: nothing may be left to be found by the compiler."""
    plan = make_plan(config)
    describe(plan)
    count = plan.train.replicas
    rows = example_batch(plan.task, plan.train.batch_size)
    batch = rows if count == 1 else jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x), count, *x.shape[1:]), x.dtype), rows)
    step = functools.partial(train_step, plan.model, plan.tx, **plan.step_options)
    jax.eval_shape(replicas.train(step, count), plan.state, batch)
    return "right"


def as_flags(argv: list[str]) -> str:
    """As train.py takes them: parsed into a fresh set of flags, then planned; what is refused must be told in one line."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    old, sys.argv = sys.argv, argv
    try:
        cli.check_config_file(argv)
        values(argv)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(cli.explain(error)) from error
    finally:
        sys.argv = old
    return accept(values.config)


def case(rng: random.Random) -> Case:
    recipe = rng.choice(recipes())
    config = shrunk(recipe)
    if rng.random() < 0.7:
        how = [mutate(rng, config) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        return Case(f"{recipe} {'; '.join(how)}", lambda: accept(config))
    overrides = []
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice([p for p in leaves(config) if p[0] not in ("name", "recipe")])
        name = ".".join(map(str, path))
        name = name[:-1] + "x" if rng.random() < 0.15 else name
        value = rng.choice(VALUES)
        overrides.append(
            f"--config.{name}={value if isinstance(value, str) else json.dumps(value) if rng.random() < 0.5 else value}"
        )
    file, _, variant = recipe.partition(":")
    depth = [f"--config.model.depth={config['model']['depth']}"] if isinstance(config["model"].get("depth"), int) else []
    argv = ["train.py", f"--config={ROOT / 'configs' / file}.py:{variant}", *depth, *overrides]
    return Case(" ".join([recipe, *overrides]), lambda: as_flags(argv))
