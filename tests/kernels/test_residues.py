"""Strided patterns by residue class: the same function as the dense reference, from parts that are really smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Dropout, attend, residues
from kernels.attention.biases import ALiBi
from kernels.attention.call import Call
from kernels.attention.masks import Band, BlockLocal, Causal, Mask, PerHead, Strided, Window

pytestmark = pytest.mark.usefixtures("quick_compile")

MASKS = {
    "merged": Causal() & (Band(9, 0) | Strided(9)),
    "two-sided": Band(9, 9) | Strided(7),
    "strided alone": Causal() & Strided(5),
    "not the nearest, and dilated": (Causal() & ~Band(3, 3)) & Strided(4) | Window(2, 3),
    "two strides": Causal() & (Window(9) | Strided(8) | Strided(6)),
    "a band that lies between two strides": Band(5, -1) | Causal() & Strided(8),
    "heads": PerHead((Causal() & Strided(5), Causal() & Window(4), Causal() & Strided(5), Causal() & (Window(3) | Strided(7)))),
}


@pytest.fixture(autouse=True)
def however_short(monkeypatch):
    monkeypatch.setattr(residues, "SHORTEST", 1)


def operands(length: int, dtype) -> tuple[jax.Array, ...]:
    """q, k, v, and a weight for each output: two batch rows, four query heads on two of keys."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (4, 2, 2, 4)
    return tuple(jax.random.normal(key, (2, length, n, 8), dtype) for key, n in zip(keys, heads))


def results(implementation: str, mask: Mask, segment_ids, q, k, v, weights):
    """Output, log-sum-exp and the gradients of q, k and v, through both."""

    def run(q, k, v):
        return attend(q, k, v, mask=mask, segment_ids=segment_ids, return_lse=True, implementation=implementation)

    (out, lse), pullback = jax.vjp(run, q, k, v)
    return out, lse, *pullback((weights, 0.1 * weights[..., 0]))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("length", "packed"), [(1, False), (63, False), (64, False), (65, False), (64, True), (65, True)])
def test_parts_merge_to_the_reference(mask, length, packed):
    with jax.enable_x64(True):
        arrays = operands(length, jnp.float64)
        ids = jnp.where(jnp.arange(length)[None] < jnp.array([[length // 3], [length - 5]]), 0, -1) if packed else None
        got, want = (jax.jit(results, static_argnums=(0, 1))(name, mask, ids, *arrays) for name in ("chunked", "reference"))
    for a, b in zip(got, want):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        np.testing.assert_allclose(np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0), rtol=0, atol=1e-10)


def call(mask: Mask, **changes) -> Call:
    x = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)
    empty = dict.fromkeys(("bias", "q_segments", "kv_segments", "q_positions", "kv_positions", "dropout"))
    return Call(**{"q": x, "k": x, "v": x, **empty, "mask": mask, "softcap": None, "scale": 1.0, **changes})


def taken(call: Call) -> list[Call]:
    """The calls that it is made of."""
    calls = []

    def in_order(part: Call):
        calls.append(part)
        return part.q, part.q[..., 0]

    jax.eval_shape(lambda call: residues.attend(call, in_order), call)
    return calls


def test_strided_keys_become_short_sequences():
    by_class, rest = sorted(taken(call(Causal() & (Band(8, 0) | Strided(8)))), key=lambda part: part.q.shape[1])
    assert by_class.q.shape == (1, 8, 16, 8) and rest.q.shape == (1, 64, 2, 8)
    position = np.arange(64)
    whole, left = (mask.allowed(position[:, None], position[None]) for mask in (Causal() & (Band(8, 0) | Strided(8)), rest.mask))
    strided = by_class.mask.allowed(position[:8, None], position[None, :8])
    assert left.sum() + 8 * strided.sum() == whole.sum() and not strided.diagonal().any()


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": ALiBi(jnp.ones((2,)))},
        {"dropout": Dropout(0.1, jax.random.key(0))},
        {"q_positions": jnp.arange(64)[None], "kv_positions": jnp.arange(64)[None]},
        {"k": jax.ShapeDtypeStruct((1, 80, 2, 8), jnp.float32), "v": jax.ShapeDtypeStruct((1, 80, 2, 8), jnp.float32)},
        {"mask": Causal() & (BlockLocal(8) | Strided(8))},
        {"mask": Causal() & ~Strided(8)},
    ],
    ids=["bias", "dropout", "positions", "lengths", "a mask of absolute positions", "a negated stride"],
)
def test_what_goes_by_position_is_left_whole(changes):
    assert len(taken(call(**{"mask": Causal() & Strided(8), **changes}))) == 1
