"""Every sequence mixer, by the name that `config.model.mixer = dict(name=...)` uses.

A mixer is a Flax module `__call__(x: [B, L, E], ctx: Context) -> [B, L, E]` whose fields are the other keys of that dict.
To add one: write the module (or, for a function of q, k, v alone, the function) in a file of its own and enter it here;
the contract tests in `tests/mixers/test_contract.py` then hold it to what its entry claims.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from efficient_attn.arguments import ConfigError, check_arguments, lookup
from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.identity import Identity
from efficient_attn.mixers.s5 import S5

__all__ = ["MIXERS", "S5", "Attention", "Context", "Entry", "Identity", "build", "state_size"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A mechanism and what it claims, which the contract tests hold it to.

    constructor: the Flax module.
    cost: time in the sequence length L.
    function: for `Attention`, the function of q, k, v that it is built around.
    causal, bidirectional: which forms the mechanism has.
    decode: it continues token by token from the `cache` collection, equal to the parallel form.
    recall: how far above chance two layers get on associative recall in the contract test's short training,
        or the reason why the mechanism cannot.
    """

    constructor: Callable[..., nn.Module]
    cost: str
    causal: bool = True
    bidirectional: bool = True
    decode: bool = True
    recall: float | str = "not measured"
    function: Callable | None = None


MIXERS: Mapping[str, Entry] = {
    "softmax": Entry(Attention, cost="L^2", recall=0.3),
    "s5": Entry(S5, cost="L", recall="time-invariant: what it stores does not depend on the content"),
    "identity": Entry(Identity, cost="L", recall="mixes nothing: every position sees itself alone"),
}


def build(mixer: Mapping[str, Any], **injected: Any) -> nn.Module:
    """The module that a mixer dict describes. `injected` is what the model adds: `name`, `dtype`.

    Raises `ConfigError` for an unknown name or argument, or a form (causal or not) that the mechanism lacks.
    """
    arguments = dict(mixer)
    name = arguments.pop("name", None)
    entry = lookup(MIXERS, name, "model.mixer.name")
    check_arguments(entry.constructor, arguments, f"model.mixer (name={name!r})")
    causal = arguments.get("causal", False)
    if not (entry.causal if causal else entry.bidirectional):
        raise ConfigError(f"mixer {name!r} has no {'causal' if causal else 'bidirectional'} form")
    if entry.function is not None:
        injected["function"] = entry.function
    return entry.constructor(**arguments, **injected)


def state_size(mixer: Mapping[str, Any], length: int, width: int) -> int:
    """Bytes one sequence of `length` tokens leaves behind for decoding the next: its decode cache, in float32."""
    module = build(mixer)
    x = jax.ShapeDtypeStruct((1, length, width), np.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context(decode=True)), x)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables.get("cache", {})))
