"""JAX's own attention as named baselines: `jax.nn.dot_product_attention` in XLA, dense, and in cuDNN, fused."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.biases import Dense
from kernels.attention.call import Call, Spec, spec_of
from kernels.attention.masks import And, Causal, Full, Window
from kernels.attention.reference import allowed_pairs


def why_not_xla(spec: Spec) -> str | None:
    """The reason why the library's XLA form cannot run this call."""
    return _first(_missing(spec) | {"its softmax is float32 whatever the inputs are": spec.dtype == "float64"})


def why_not_cudnn(spec: Spec) -> str | None:
    """The reason why cuDNN cannot run this call. Below compute capability 9.0 heads end at 128, as JAX says when it compiles."""
    by_table = spec.bias is not None or _options(spec) is None
    odd = spec.q_length % 2 or spec.kv_length % 2
    reasons = {
        f"it runs on NVIDIA GPUs, not on {spec.platform}": spec.platform not in ("gpu", "cuda"),
        f"it takes float16 and bfloat16, not {spec.dtype}": spec.dtype not in ("float16", "bfloat16"),
        f"head sizes must be multiples of 8 up to 256, not {spec.head_dim}": spec.head_dim % 8 or spec.head_dim > 256,
        f"lengths must be even where scores are biased or masked by a table, not {spec.q_length} and {spec.kv_length}": (
            by_table and odd
        ),
    }
    return _first(_missing(spec) | reasons)


def attend_xla(call: Call) -> tuple[jax.Array, None]:
    """The library's dense attention; memory O(B H L S)."""
    return _by_table(call, "xla"), None


def attend_cudnn(call: Call) -> tuple[jax.Array, None]:
    """cuDNN's fused attention. Full, causal and causal sliding-window masks are its own; others go as a table, O(B H L S)."""
    options = _options(spec_of(call, return_lse=False, platform=jax.default_backend()))
    if options is None:
        return _by_table(call, "cudnn"), None
    bias = None if call.bias is None else call.bias.table
    out = jax.nn.dot_product_attention(
        call.q, call.k, call.v, bias=bias, scale=call.scale, implementation="cudnn", **options
    )  # fmt: skip
    return out, None


def _first(reasons: dict[str, Any]) -> str | None:
    return next((reason for reason, applies in reasons.items() if applies), None)


def _missing(spec: Spec) -> dict[str, bool]:
    """What the library lacks in either form."""
    sizes = spec.head_dim, spec.v_head_dim
    return {
        "it has no soft-cap": spec.softcap,
        "it has no dropout": spec.dropout,
        "its log-sum-exp is not differentiable": spec.return_lse,
        f"it takes no bias but a Dense table, not {spec.bias}": spec.bias not in (None, Dense.__name__),
        f"queries and values must have one head size, not {sizes[0]} and {sizes[1]}": sizes[0] != sizes[1],
    }


def _options(spec: Spec) -> dict[str, Any] | None:
    """How to say the mask in the library's own terms, which align the first query with the first key; None where it has none."""
    if spec.segment_ids or spec.traced_positions or (spec.q_length != spec.kv_length and spec.mask != Full()):
        return None
    return OWN_MASKS[type(spec.mask)](spec.mask) if type(spec.mask) in OWN_MASKS else None


def _causal_window(mask: And) -> dict[str, Any] | None:
    window = mask.right if mask.left == Causal() else mask.left
    if Causal() not in mask.parts or not isinstance(window, Window) or window.dilation > 1:
        return None
    return {"is_causal": True, "local_window_size": (window.size - 1, 0)}


OWN_MASKS = {Full: lambda mask: {}, Causal: lambda mask: {"is_causal": True}, And: _causal_window}


def _by_table(call: Call, implementation: str) -> jax.Array:
    """Every pair's mask in memory. Rows without an allowed key, which the library averages, are set to 0."""
    allowed = allowed_pairs(call)
    table = None if call.bias is None else call.bias.table
    if table is not None:
        allowed = allowed & (table > -jnp.inf)
    out = jax.nn.dot_product_attention(
        call.q, call.k, call.v, bias=table, mask=allowed, scale=call.scale, implementation=implementation
    )  # fmt: skip
    has_key = jnp.moveaxis(allowed.any(axis=-1, keepdims=True), 1, 2)
    return jnp.where(has_key, out, 0)
