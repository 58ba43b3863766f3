"""`attend`: the one entry to every implementation of exact softmax attention."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import devices, mesh
from kernels.attention import chunked, library, masks, mosaic, portable, reference, ring, sharded
from kernels.attention.biases import Bias
from kernels.attention.call import Call, check_scores, spec_of
from kernels.attention.dropout import Dropout
from kernels.attention.mosaic import decode
from kernels.dispatch import Choice, Implementation, anything, choose, shown

Segments = Int[Array, "B L"] | tuple[Int[Array, "B L"], Int[Array, "B S"]]


def _on_one_device(call: Call):
    """Of the stretch that a device of a ring has: the fastest implementation."""
    return IMPLEMENTATIONS[_choose(call, True, None).name].run(call)


def _with_gradients(call: Call):
    """What lends `decode` its gradients: the fastest of the others."""
    platform = jax.default_backend()
    others = [name for name in preference(platform) if name not in ("ring", "decode")]
    choice = choose("attend", IMPLEMENTATIONS, others, spec_of(call, True, platform), None)
    return IMPLEMENTATIONS[choice.name].run(call)


IMPLEMENTATIONS = {
    "ring": Implementation(
        functools.partial(ring.attend, _on_one_device), ring.why_not, "stretches of keys go round the devices along seq"
    ),
    "reference": Implementation(reference.attend, anything, "dense float32: the specification, memory O(L S)"),
    "chunked": Implementation(chunked.attend, anything, "XLA, lazy softmax over tiles, memory O(L)"),
    "portable": Implementation(portable.attend, portable.why_not, "Pallas kernels, compiled on a GPU and interpreted on a CPU"),
    "decode": Implementation(
        functools.partial(decode.attend, _with_gradients), decode.why_not, "a Pallas Mosaic GPU kernel for few queries, as mosaic"
    ),
    "mosaic": Implementation(mosaic.attend, mosaic.why_not, "Pallas Mosaic GPU kernels for Hopper, interpreted on a CPU"),
    "xla": Implementation(library.attend_xla, library.why_not_xla, "jax.nn.dot_product_attention, memory O(L S)"),
    "cudnn": Implementation(library.attend_cudnn, library.why_not_cudnn, "jax.nn.dot_product_attention in cuDNN, fused"),
}
PREFERENCE = ("ring", "chunked", "reference")
GPU_KERNELS = ("mosaic", "portable")
"""From the fastest: what follows `ring` and `decode` on a GPU, each where its numerics have been checked on such a device."""


def attend(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G Dv"],
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 - frozen
    bias: Bias | None = None,
    segment_ids: Segments | None = None,
    q_positions: Int[Array, "L"] | Int[Array, "B L"] | None = None,
    kv_positions: Int[Array, "S"] | Int[Array, "B S"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"] | tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    """Exact softmax attention: softmax(bias(softcap(scale q k^T)) on allowed pairs) v.

    A pair is allowed where `mask` allows its positions and its segment ids are equal. A row without an allowed pair gives zeros,
    a log-sum-exp of -inf, and zero gradients. Softmax statistics and accumulators are float32 (float64 for float64 inputs).

    Args:
      q, k, v: queries, keys and values of one float type. Head h of H queries reads head h // (H / G) of G keys and values
        (grouped-query attention, Ainslie et al. 2023).
      mask: the pattern, a value of `kernels.attention.masks`.
      bias: what happens to a score, a value of `kernels.attention.biases`; gradients reach its arrays.
      segment_ids: ids [B, L] of packed documents where L = S, or a pair (ids of queries [B, L], ids of keys [B, S]). A padding
        mask `valid` [B, S] of keys is the pair (ones [B, L], valid.astype(int32)): only real keys share the queries' id.
      q_positions, kv_positions: integer positions [L] or [B, L], and [S] or [B, S], that `mask` and `bias` see; traced, so
        no tile is skipped on their account. By default the last query stands at the last key: queries at S - L ... S - 1,
        keys at 0 ... S - 1.
      softcap: c in c tanh(score / c), before the bias; None for none.
      scale: what scores are multiplied by; None is 1 / sqrt(D).
      dropout: dropout of attention weights, the same ones whatever the implementation; None for none.
      return_lse: also return the log-sum-exp of each row of scores, through which gradients flow too.
      implementation: a name in `IMPLEMENTATIONS`, or None for the first in `preference` that can; see `explain`.

    Under a mesh (`jax.set_mesh`, see `kernels.mesh`) each device computes its rows and heads, and where the mesh has an axis seq
    that divides L = S, its stretch of the sequence: `ring`.

    Returns:
      [B, L, H, Dv] in the type of q, and with `return_lse` the pair (that, lse [B, L, H]).

    Raises:
      ValueError: an argument does not fit the others, or the named implementation cannot run this call; the message names
        the argument, its value and what would be accepted.
    """
    arrays = (q, k, v, bias, segment_ids, q_positions, kv_positions, dropout)
    call = _call(*arrays, mask=mask, softcap=softcap, scale=scale)
    choice = _choose(call, return_lse, implementation)
    run = IMPLEMENTATIONS[choice.name].run
    is_split = choice.name != "ring" and mesh.shards((*mesh.ROWS, mesh.MODEL, mesh.SEQ)) > 1
    out, lse = sharded.attend(run, call) if is_split else run(call)
    return (out, lse) if return_lse else out


def explain(
    q,
    k,
    v,
    *,
    mask: masks.Mask = masks.Full(),  # noqa: B008 - frozen
    bias: Bias | None = None,
    segment_ids=None,
    q_positions=None,
    kv_positions=None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Choice:
    """Which implementation `attend` would run for these arguments (arrays or `jax.ShapeDtypeStruct`s), and why."""
    arrays = (q, k, v, bias, segment_ids, q_positions, kv_positions, dropout)
    call = jax.eval_shape(lambda *arrays: _call(*arrays, mask=mask, softcap=softcap, scale=scale), *arrays)
    return ring.told(_choose(call, return_lse, implementation), call)


def _choose(call: Call, return_lse: bool, implementation: str | None) -> Choice:
    if not isinstance(return_lse, bool):
        raise ValueError(f"attend: return_lse is {type(return_lse).__name__}; True or False is expected")
    spec = spec_of(call, return_lse, jax.default_backend())
    return choose("attend", IMPLEMENTATIONS, preference(spec.platform), spec, implementation, told=GPU_KERNELS)


def preference(platform: str) -> tuple[str, ...]:
    """The implementations that may run without being asked for, from the fastest."""
    if platform != "gpu":
        return PREFERENCE
    checked = devices.verified("attend", devices.here())
    return (*PREFERENCE[:1], *(name for name in ("decode", *GPU_KERNELS) if name in checked), *PREFERENCE[1:])


def _call(q, k, v, bias, segment_ids, q_positions, kv_positions, dropout, *, mask, softcap, scale) -> Call:
    """The arguments checked against each other and in normal form."""
    _check_operands(q, k, v)
    _check_options(mask, bias, softcap, scale, dropout)
    (B, L, _, D), S = q.shape, k.shape[1]
    if bias is not None:
        _check_bias(bias, {"B": B, "H": q.shape[2], "L": L, "S": S})
    q_segments, kv_segments = _pair(segment_ids)
    _check_integers("segment_ids (queries)", q_segments, [(B, L)])
    _check_integers("segment_ids (keys)", kv_segments, [(B, S)])
    _check_integers("q_positions", q_positions, [(L,), (1, L), (B, L)])
    _check_integers("kv_positions", kv_positions, [(S,), (1, S), (B, S)])
    given = q_positions is not None or kv_positions is not None
    problem = mask.problem(q.shape[2], *((None, None) if given else (L, S)))
    if problem is not None:
        raise ValueError(f"attend: mask: {problem}")
    return Call(
        q,
        k,
        v,
        bias,
        q_segments,
        kv_segments,
        None if q_positions is None else jnp.atleast_2d(q_positions),
        None if kv_positions is None else jnp.atleast_2d(kv_positions),
        dropout,
        mask=mask.masks[0] if isinstance(mask, masks.PerHead) and len(masks.of_heads(mask)) == 1 else mask,
        softcap=softcap,
        scale=float(D**-0.5 if scale is None else scale),
    )


def _pair(segment_ids) -> tuple:
    """The segment ids of queries and of keys."""
    if not isinstance(segment_ids, tuple):
        return segment_ids, segment_ids
    if len(segment_ids) != 2:
        raise ValueError(f"attend: segment_ids is a tuple of {len(segment_ids)}; give one array, or (those of queries, of keys)")
    return segment_ids


def _check_operands(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not hasattr(x, "shape"):
            raise ValueError(f"attend: {name} is {type(x).__name__}; an array of four axes is expected")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attend: {shapes}: each must have four axes, [B, L, H, D], [B, S, G, D] and [B, S, G, Dv]")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"attend: {shapes}: the first axis (batch) must be equal")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attend: {shapes}: keys and values must have equal length and heads, [B, S, G, ...]")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attend: {shapes}: queries and keys must have one head size D")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attend: {shapes}: the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads")
    if 0 in (q.shape[1], k.shape[1]):
        raise ValueError(f"attend: {shapes}: at least one query and one key are needed")
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(f"attend: q {q.dtype}, k {k.dtype}, v {v.dtype}: all three must have one floating type")


def _check_options(mask, bias, softcap, scale, dropout) -> None:
    if not isinstance(mask, masks.Mask):
        raise ValueError(
            f"attend: mask is {type(mask).__name__}; give a value of kernels.attention.masks, and what depends on data as "
            "segment_ids or biases.Dense"
        )
    if bias is not None and not isinstance(bias, Bias):
        raise ValueError(f"attend: bias is {type(bias).__name__}; give a value of kernels.attention.biases, e.g. Dense(table)")
    check_scores("attend", softcap, scale)
    if dropout is not None and not isinstance(dropout, Dropout):
        raise ValueError(f"attend: dropout is {type(dropout).__name__}; give kernels.attention.Dropout(rate, key)")
    if dropout is not None and (problem := dropout.problem()) is not None:
        raise ValueError(f"attend: dropout: {problem}")


def _check_bias(bias: Bias, sizes: dict[str, int]) -> None:
    """Every axis that runs along B, H, L or S has that size or 1."""
    leaves = jax.tree.leaves(bias)
    if len(leaves) != len(bias.axes()):  # None is no leaf
        raise ValueError(f"attend: bias {type(bias).__name__} holds {len(leaves)} arrays; {len(bias.axes())} are expected")
    for leaf, axes in zip(leaves, bias.axes(), strict=True):
        if not hasattr(leaf, "shape"):
            raise ValueError(f"attend: bias {type(bias).__name__} holds {shown(leaf)}; arrays are expected")
        expected = [sizes.get(name, size) for name, size in zip(axes, leaf.shape)]
        if len(axes) != leaf.ndim or any(size not in (1, due) for size, due in zip(leaf.shape, expected)):
            raise ValueError(
                f"attend: an array of bias {type(bias).__name__} has shape {leaf.shape}; its axes {axes} are {sizes}"
            )


def _check_integers(name: str, array, shapes: list[tuple[int, ...]]) -> None:
    if array is None:
        return
    if not hasattr(array, "shape"):
        raise ValueError(f"attend: {name} is {type(array).__name__}; an array of integers is expected")
    if array.shape not in shapes or not jnp.issubdtype(array.dtype, jnp.integer):
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"attend: {name} is {array.dtype} {array.shape}; integers of shape {expected} are expected")
