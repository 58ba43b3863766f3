"""Dicts that are constructor arguments: look the constructor up, check the keys, fill in the defaults."""

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

INJECTED = frozenset({"parent", "name", "dtype", "function"})
"""Constructor arguments that the code passes and no configuration may set."""


class ConfigError(Exception):
    """A configuration is wrong. The message names the field, what was expected, and what to do."""


def lookup(table: Mapping[str, Any], name: Any, field: str) -> Any:
    """`table[name]`, or a `ConfigError` that lists the table and the nearest name."""
    if isinstance(name, str) and name in table:
        return table[name]
    raise ConfigError(f"{field}={name!r} is unknown{suggest(name, table)}; one of: {', '.join(sorted(table))}")


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
BOUNDS: Mapping[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("depth", "width", "num_heads", "num_kv_heads", "head_dim", "state_dim", "blocks"), (1, _INFINITY, True)),
    **dict.fromkeys(("batch_size", "accumulate", "log_every", "replicas"), (1, _INFINITY, True)),
    **dict.fromkeys(("window", "dilation", "block_size", "num_blocks", "stride", "query_block", "rank"), (1, _INFINITY, True)),
    **dict.fromkeys(("query_height", "query_width", "max_length", "conv_width", "trained_length"), (1, _INFINITY, True)),
    **dict.fromkeys(("columns", "expand", "num_experts"), (1, _INFINITY, True)),
    **dict.fromkeys(("num_landmarks", "pinv_iterations", "projected_length", "packed_length"), (1, _INFINITY, True)),
    **dict.fromkeys(("chunk_size", "rounds", "num_clusters", "cluster_size", "iterations", "neighbours"), (1, _INFINITY, True)),
    **dict.fromkeys(("memory_length", "eval_memory_length", "compressed_length"), (1, _INFINITY, True)),
    **dict.fromkeys(("eval_compressed_length", "compression_rate", "num_basis", "num_samples"), (1, _INFINITY, True)),
    **dict.fromkeys(("ridge_penalty", "contraction", "prior_width"), (0, _INFINITY, False)),
    **dict.fromkeys(("auxiliary_weight", "kl_weight"), (0, _INFINITY, True)),
    **dict.fromkeys(("num_features", "redraw_every", "conv_kernel", "feed_forward_chunk"), (0, _INFINITY, True)),
    **dict.fromkeys(("look_back", "look_ahead", "memory", "memory_height", "memory_width"), (0, _INFINITY, True)),
    **dict.fromkeys(("global_tokens", "num_random", "radius", "clip", "copies"), (0, _INFINITY, True)),
    **dict.fromkeys(("feed_forward_width", "eval_batch_size", "max_eval_batches", "patience", "prefetch"), (0, _INFINITY, True)),
    **dict.fromkeys(("loss_chunk", "spike_factor", "max_divergences"), (0, _INFINITY, True)),
    **dict.fromkeys(("weight_decay", "clip_norm", "early_stop", "lr_mult", "commitment", "span_loss"), (0, _INFINITY, True)),
    **dict.fromkeys(("dropout", "embed_dropout", "label_smoothing", "ema", "b1", "b2", "norm_momentum", "decay"), (0, 1, True)),
    **dict.fromkeys(("learning_rate", "eps", "dt_min", "dt_max", "embed_stddev", "stddev"), (0, _INFINITY, False)),
}
"""Argument -> (low, high, whether low itself is allowed); `high` never is."""


def check_bounds(name: str, value: Any, field: str) -> None:
    """Raise `ConfigError` for a number outside the bounds of all arguments of its name."""
    if name not in BOUNDS or isinstance(value, bool | str) or not isinstance(value, int | float):
        return
    low, high, inclusive = BOUNDS[name]
    if not ((low <= value if inclusive else low < value) and value < high):
        upper = "" if high == _INFINITY else f" and less than {high}"
        raise ConfigError(f"{field}.{name}={value} must be {'at least' if inclusive else 'more than'} {low}{upper}")


def check_arguments(constructor: Callable, given: Mapping[str, Any], field: str) -> None:
    """Raise `ConfigError` for an argument the constructor does not have, or one it needs and does not get."""
    known = arguments_of(constructor)
    for key in given:
        if key not in known:
            raise ConfigError(f"{field} has no argument {key!r}{suggest(key, known)}; it takes: {', '.join(known)}")
        check_bounds(key, given[key], field)
    missing = [k for k, a in known.items() if a.default is inspect.Parameter.empty and k not in given]
    if missing:
        raise ConfigError(f"{field} needs {', '.join(missing)}")


def is_optional(annotation: Any) -> type | None:
    """The T of `T | None`, else None."""
    options = typing.get_args(annotation)
    if type(None) in options and len(options) == 2:
        return next(o for o in options if o is not type(None))
    return None
