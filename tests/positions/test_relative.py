"""Shaw's and Transformer-XL's relative attention: against arrays of independent implementations, and written out densely."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.positions import Places
from efficient_attn.positions.absolute import sinusoid
from efficient_attn.positions.relative import ShawTerms, TransformerXLTerms
from kernels.attention import Dropout, attend, biases, masks

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation
B, L, H, G, D, K = 2, 13, 4, 2, 6, 3


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(B, L, heads, D))) for heads in (H, G, G))
    return q, k, v, ShawTerms(*(jnp.asarray(rng.normal(size=(2 * K + 1, D))) for _ in range(2)))


def dense_shaw(q, k, v, terms, allowed, positions, keep=1.0):
    """Eq. 3 and 4 of the paper, every pair's vectors in memory; allowed [B, H, L, S], positions [B, L]."""
    label = jnp.clip(positions[:, None, :] - positions[:, :, None], -K, K) + K
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    scores = jnp.einsum("blhd,bshd->bhls", q, k) + jnp.einsum("blhd,blsd->bhls", q, terms.keys[label])
    scores = jnp.where(allowed, scores / np.sqrt(D), -jnp.inf)
    weights = jnp.where(allowed, jax.nn.softmax(scores, axis=-1), 0) * keep
    out = jnp.einsum("bhls,bshd->blhd", weights, v) + jnp.einsum("bhls,blsd->blhd", weights, terms.values[label])
    return out, jnp.moveaxis(jax.nn.logsumexp(scores, axis=-1), 1, 2)


def run(fn, arguments):
    """out, lse and gradients of both by q, k, v and the two tables."""

    def loss(q, k, v, terms):
        out, lse = fn(q, k, v, terms)
        return (jnp.sin(out) + jnp.cos(lse)[..., None]).sum(), (out, lse)

    return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arguments))


SEGMENTS = jnp.array([[0] * 5 + [1] * 8, [0] * 12 + [-1]])
GAPS = jnp.array([[0, 2, 3, 5, 9, 0, 1, 4, 5, 7, 8, 11, 20], [1, 3, 4, 5, 7, 8, 9, 10, 12, 15, 16, 19, 0]])
TWO_HEADS_LOCAL = masks.PerHead((masks.Causal(), masks.Causal(), masks.Window(2), masks.Window(6)))

CASES = {
    "causal": (masks.Causal(), None, None),
    "bidirectional": (masks.Full(), None, None),
    "packed, a window a head": (TWO_HEADS_LOCAL, SEGMENTS, None),
    "packed, positions with gaps": (masks.Causal(), SEGMENTS, GAPS),
}


@pytest.mark.parametrize(("mask", "segments", "positions"), CASES.values(), ids=CASES)
def test_shaw_equals_its_dense_form(quick_compile, mask, segments, positions):
    index = jnp.arange(L)[None]
    allowed = jnp.stack([jnp.broadcast_to(m.allowed(index[0][:, None], index), (L, L)) for m in masks.of_heads(mask)])[None]
    if segments is not None:
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    at = jnp.broadcast_to(index, (B, L)) if positions is None else positions
    with jax.enable_x64(True):
        places = Places.of_tokens(L, positions, segments, causal=mask == masks.Causal())
        options = dict(mask=mask, return_lse=True, segment_ids=segments)
        ours = run(lambda q, k, v, terms: terms.attend(attend, places, q, k, v, **options), inputs())
        expected = run(functools.partial(dense_shaw, allowed=allowed, positions=at), inputs())
    assert all(np.any(x) for x in expected)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10)


@pytest.mark.parametrize("clip", [K, L + 2])
def test_shaw_scores_are_those_of_a_table_of_labels(quick_compile, clip):
    """Without value vectors, with dropout, and with more labels than keys: attention with the bias `Labels`."""
    with jax.enable_x64(True):
        q, k, v, _ = inputs()
        keys = jnp.asarray(np.random.default_rng(1).normal(size=(2 * clip + 1, D)))
        terms, places = ShawTerms(keys, jnp.zeros_like(keys)), Places.in_order(L, L, causal=True)
        labels = biases.Labels(jnp.einsum("blhd,rd->bhlr", q, keys) / np.sqrt(D), biases.Clipped(clip))
        options = dict(mask=masks.Causal(), dropout=Dropout(0.3, jax.random.key(0)))
        ours = jax.jit(lambda *a: terms.attend(attend, places, *a, **options))(q, k, v)
        expected = jax.jit(lambda *a: attend(*a, bias=labels, **options))(q, k, v)
        np.testing.assert_allclose(ours, expected, atol=1e-10)


def test_shaw_drops_weights_of_value_vectors_too(quick_compile):
    with jax.enable_x64(True):
        dropout = Dropout(0.3, jax.random.key(0))
        keep = dropout.scale(*(jnp.arange(n) for n in (B, H, L, L))).astype(float)
        places = Places.in_order(L, L, causal=False)
        ours = run(lambda q, k, v, t: t.attend(attend, places, q, k, v, dropout=dropout, return_lse=True), inputs())
        everywhere, at = jnp.ones((1, 1, L, L), bool), jnp.broadcast_to(jnp.arange(L)[None], (B, L))
        expected = run(functools.partial(dense_shaw, allowed=everywhere, positions=at, keep=keep), inputs())
        for x, y in zip(ours, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-10)


def test_shaw_refuses_what_it_would_not_apply_to_all_keys():
    q, k, v, terms = inputs()
    with pytest.raises(ValueError, match="goes with no other bias"):
        terms.attend(attend, Places.in_order(L, L, causal=True), q, k, v, softcap=1.0)


def test_shaw_memory_is_linear_in_length():
    """Temporary bytes of forward and backward for 4x the length: about 4x."""

    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        tables = ShawTerms(*(jax.ShapeDtypeStruct((9, 8), jnp.float32) for _ in range(2)))
        places = Places.in_order(length, length, causal=True)

        def loss(q, terms):
            return terms.attend(attend, places, q, q, q, mask=masks.Causal()).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, tables).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 5 * temporary_bytes(2048)


def test_shaw_against_nezha(oracle_dir):
    arrays = np.load(oracle_dir / "shaw_relative.npz")
    hyper = json.loads((oracle_dir / "shaw_relative.json").read_text())["hyper"]
    x = arrays["in.x"]
    q, k, v = (
        jnp.asarray(x @ arrays[f"w.{name}.weight"].T + arrays[f"w.{name}.bias"]).reshape(*x.shape[:2], hyper["heads"], -1)
        for name in ("query", "key", "value")
    )
    table = jnp.asarray(arrays["in.rel_table"])
    assert len(table) == 2 * hyper["clip_k"] + 1
    places = Places.in_order(hyper["N"], hyper["N"], causal=False)
    ours = ShawTerms(table, table).attend(attend, places, q, k, v)
    np.testing.assert_allclose(ours.reshape(x.shape), arrays["out.y"], atol=TOLERANCE)


def xl_inputs(E=8):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, n, heads, D))) for n, heads in ((L, H), (L + 4, G), (L + 4, G)))
    terms = TransformerXLTerms(*(jnp.asarray(rng.normal(size=shape)) for shape in ((H, D), (H, D), (E, H, D))), 100.0)
    return q, k, v, terms


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_xl_equals_a_table_of_labels(quick_compile, causal):
    """Four memories before the segment; the table holds (q_i + v) . W_R R_n for every distance n, as the paper computes it."""
    S = L + 4

    def labelled(q, k, v, terms):
        sin, cos = sinusoid(jnp.arange(1 - S, S)[None], len(terms.W_R), 100.0, q.dtype)
        R = jnp.einsum("ne,ehd->nhd", jnp.concatenate([sin, cos], axis=-1)[0], terms.W_R)
        table = jnp.einsum("blhd,nhd->bhln", q + terms.v[None, None], R) / np.sqrt(D)
        bias = biases.Labels(table, distance_label)
        return attend(q + terms.u[None, None], k, v, bias=bias, mask=mask, return_lse=True)

    def distance_label(q_pos, kv_pos):
        return q_pos - kv_pos + S - 1

    mask = masks.Causal() if causal else masks.Full()
    with jax.enable_x64(True):
        places = Places.in_order(L, S, causal=causal)
        ours = run(lambda q, k, v, t: t.attend(attend, places, q, k, v, mask=mask, return_lse=True), xl_inputs())
        for x, y in zip(ours, run(labelled, xl_inputs()), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-10)


def test_transformer_xl_against_its_own_layer(oracle_dir):
    """Queries of a segment, keys of memory and segment; weights and the layer's output."""
    arrays = np.load(oracle_dir / "transformer_xl_rel_attention.npz")
    hyper = json.loads((oracle_dir / "transformer_xl_rel_attention.json").read_text())["hyper"]
    heads, size, M, N = (hyper[name] for name in ("heads", "head_dim", "mem_len", "qlen"))
    w, both = np.moveaxis(arrays["in.w"], 0, 1), np.moveaxis(np.concatenate([arrays["in.mem"], arrays["in.w"]]), 0, 1)
    E = w.shape[-1]
    fused = (both @ arrays["w.qkv_net.weight"].T).reshape(len(both), M + N, 3, heads, size)
    q, k, v = (jnp.asarray(x) for x in np.moveaxis(fused, 2, 0))
    sin, cos = sinusoid(jnp.arange(M + N - 1, -1, -1)[None], E, 10_000.0)
    np.testing.assert_allclose(jnp.concatenate([sin, cos], axis=-1)[0], arrays["in.r_sinusoid"], atol=TOLERANCE)
    terms = TransformerXLTerms(
        jnp.asarray(arrays["w.r_w_bias"]), jnp.asarray(arrays["w.r_r_bias"]),
        jnp.asarray(arrays["w.r_net.weight"].T.reshape(E, heads, size)),
    )  # fmt: skip
    one_hot = jnp.broadcast_to(jnp.eye(M + N)[None, :, None], (len(both), M + N, heads, M + N))
    attention = functools.partial(terms.attend, attend, Places.in_order(N, M + N, causal=True), q[:, M:], k, mask=masks.Causal())
    np.testing.assert_allclose(
        np.moveaxis(attention(one_hot), (0, 1, 2, 3), (2, 0, 3, 1)), arrays["out.attn_prob"], atol=TOLERANCE
    )
    summed = w + np.asarray(attention(v)).reshape(w.shape) @ arrays["w.o_net.weight"].T
    normed = (summed - summed.mean(-1, keepdims=True)) / np.sqrt(summed.var(-1, keepdims=True) + 1e-5)
    ours = normed * arrays["w.layer_norm.weight"] + arrays["w.layer_norm.bias"]
    np.testing.assert_allclose(np.moveaxis(ours, 0, 1), arrays["out.y"], atol=TOLERANCE)
