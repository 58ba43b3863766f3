"""Dicts that are constructor arguments: look the constructor up, check the keys, fill in the defaults."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

INJECTED = frozenset({"parent", "name", "dtype", "function"})
"""Constructor arguments that the code passes and no configuration may set."""


class ConfigError(Exception):
    """A configuration is wrong. The message names the field, what was expected, and what to do."""


def lookup(table: Mapping[str, Any], name: Any, field: str) -> Any:
    """`table[name]`, or a `ConfigError` that lists the table and the nearest name."""
    if isinstance(name, str) and name in table:
        return table[name]
    raise ConfigError(f"{field}={shown(name)} is unknown{suggest(name, table)}; one of: {', '.join(sorted(table))}")


def shown(value: Any) -> str:
    """A value in an error: in one line, and not too much of it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def suggest(name: Any, known: Iterable[str]) -> str:
    """' (did you mean ...?)', or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclasses.dataclass(frozen=True)
class Argument:
    """One configurable constructor argument; `default` is `inspect.Parameter.empty` where there is none."""

    name: str
    type: Any
    default: Any


def arguments_of(constructor: Callable) -> dict[str, Argument]:
    """The configurable arguments of a constructor, in order."""
    target = constructor.__init__ if inspect.isclass(constructor) else constructor
    hints = typing.get_type_hints(constructor if inspect.isclass(constructor) else target)
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: Argument(p.name, hints.get(p.name, Any), p.default) for p in parameters if p.name not in INJECTED}


_INFINITY = float("inf")
_LARGEST = 2**32
BOUNDS: Mapping[str, tuple[float, float, bool]] = {
    "depth": (1, 1000, True),
    **dict.fromkeys(("look_back", "look_ahead"), (0, 1000, True)),
    **dict.fromkeys(("width", "num_heads", "num_kv_heads", "head_dim", "state_dim", "blocks"), (1, _INFINITY, True)),
    **dict.fromkeys(("batch_size", "accumulate", "log_every", "replicas"), (1, _INFINITY, True)),
    **dict.fromkeys(("window", "dilation", "block_size", "num_blocks", "stride", "query_block", "rank"), (1, _INFINITY, True)),
    **dict.fromkeys(("query_height", "query_width", "max_length", "conv_width", "trained_length"), (1, _INFINITY, True)),
    **dict.fromkeys(("columns", "expand", "num_experts", "groups", "dt_rank", "dim"), (1, _INFINITY, True)),
    **dict.fromkeys(("num_landmarks", "pinv_iterations", "projected_length", "packed_length"), (1, _INFINITY, True)),
    **dict.fromkeys(("chunk_size", "rounds", "num_clusters", "cluster_size", "iterations", "neighbours"), (1, _INFINITY, True)),
    **dict.fromkeys(("memory_length", "eval_memory_length", "compressed_length"), (1, _INFINITY, True)),
    **dict.fromkeys(("eval_compressed_length", "compression_rate", "num_basis", "num_samples"), (1, _INFINITY, True)),
    **dict.fromkeys(("ridge_penalty", "prior_width", "basis_widths", "scale_base", "gamma", "rate"), (0, _INFINITY, False)),
    **dict.fromkeys(("A_min", "A_max", "beta_fast", "beta_slow", "short_factor", "long_factor"), (0, _INFINITY, False)),
    **dict.fromkeys(("dt_floor", "norm_eps", "seed"), (0, _INFINITY, True)),
    "contraction": (0, 1, False),
    "base": (1, _INFINITY, False),
    **dict.fromkeys(("auxiliary_weight", "kl_weight"), (0, _INFINITY, True)),
    **dict.fromkeys(("num_features", "redraw_every", "conv_kernel", "feed_forward_chunk"), (0, _INFINITY, True)),
    **dict.fromkeys(("memory", "memory_height", "memory_width"), (0, _INFINITY, True)),
    **dict.fromkeys(("global_tokens", "num_random", "radius", "clip", "copies"), (0, _INFINITY, True)),
    **dict.fromkeys(("feed_forward_width", "eval_batch_size", "max_eval_batches", "patience", "prefetch"), (0, _INFINITY, True)),
    **dict.fromkeys(("loss_chunk", "spike_factor", "max_divergences"), (0, _INFINITY, True)),
    **dict.fromkeys(("weight_decay", "clip_norm", "early_stop", "lr_mult", "commitment", "span_loss"), (0, _INFINITY, True)),
    **dict.fromkeys(("dropout", "embed_dropout", "label_smoothing", "ema", "b1", "b2", "norm_momentum", "decay"), (0, 1, True)),
    **dict.fromkeys(("learning_rate", "eps", "dt_min", "dt_max", "embed_stddev", "stddev"), (0, _INFINITY, False)),
}
"""Argument -> (low, high, whether low itself is allowed); `high` never is."""


def check_bounds(name: str, value: Any, field: str) -> None:
    """Raise `ConfigError` for a number, or one of several, outside the bounds of all arguments of its name."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            check_bounds(name, item, field)
    if name not in BOUNDS or isinstance(value, bool | str) or not isinstance(value, int | float):
        return
    low, high, inclusive = BOUNDS[name]
    high = min(high, 2**31) if isinstance(value, int) else high  # what a device's integers hold
    if not ((low <= value if inclusive else low < value) and value < high):
        upper = "" if high == _INFINITY else f" and less than {high}"
        raise ConfigError(f"{field}.{name}={value} must be {'at least' if inclusive else 'more than'} {low}{upper}")


TYPE_NAMES: Mapping[Any, str] = {
    int: "an integer (below 2^32)", float: "a finite number", bool: "True or False", str: "a string", type(None): "None",
    Mapping: "a dict", Sequence: "a list",
}  # fmt: skip
"""What the annotations of configurable arguments are made of. Others (dtypes, functions) no configuration sets."""


def check_type(argument: Argument, value: Any, field: str) -> None:
    """Raise `ConfigError` for a value that the argument's annotation does not allow; its default always is."""
    if not _fits(value, argument.type) and not (type(value) is type(argument.default) and value == argument.default):
        raise ConfigError(f"{field}.{argument.name}={shown(value)} must be {_describe(argument.type)}")


def _options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    if len(options := _options(annotation)) > 1:
        return any(_fits(value, option) for option in options)
    kind = typing.get_origin(annotation) or annotation
    if kind not in TYPE_NAMES:
        return True
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, int) and abs(value) < _LARGEST
    if kind is float:
        return isinstance(value, int | float) and abs(value) < _INFINITY
    if kind is Sequence:
        items = typing.get_args(annotation) or (Any,)
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(item, items[0]) for item in value)
    return isinstance(value, kind)


def _describe(annotation: Any) -> str:
    kinds = [(typing.get_origin(option) or option, typing.get_args(option)) for option in _options(annotation)]
    return " or ".join(
        TYPE_NAMES[kind] + (f" of which each is {_describe(items[0])}" if kind is Sequence and items else "")
        for kind, items in kinds
        if kind in TYPE_NAMES
    )


def check_arguments(constructor: Callable, given: Mapping[str, Any], field: str) -> None:
    """Raise `ConfigError` for an argument the constructor does not have, one of a wrong type or size, or one it does not get."""
    known = arguments_of(constructor)
    unknown = [key for key in given if key not in known]
    if len(unknown) == 1:
        raise ConfigError(f"{field} has no argument {unknown[0]!r}{suggest(unknown[0], known)}; it takes: {', '.join(known)}")
    if unknown:
        raise ConfigError(
            f"{field} has no arguments {', '.join(map(repr, unknown))}; it takes: {', '.join(known)}. Arguments go with the "
            "name: another mechanism is another recipe (--config=FILE:RECIPE), or a dict of its own"
        )
    for key, value in given.items():
        check_type(known[key], value, field)
        check_bounds(key, value, field)
    missing = [k for k, a in known.items() if a.default is inspect.Parameter.empty and k not in given]
    if missing:
        raise ConfigError(f"{field} needs {', '.join(missing)}")


def is_optional(annotation: Any) -> type | None:
    """The T of `T | None`, else None."""
    options = typing.get_args(annotation)
    if type(None) in options and len(options) == 2:
        return next(o for o in options if o is not type(None))
    return None
