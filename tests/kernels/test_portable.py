"""The Pallas kernels: equal to the reference in every feature, deterministic, and visiting no tile too many.

Interpreted on a CPU; `JAX_PLATFORMS=cuda pytest tests/kernels -k portable` compiles them for the GPU that is there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.attention import Dropout, biases, explain, masks, portable
from kernels.attention.api import _call
from kernels.attention.call import Spans, spec_of
from kernels.attention.portable import lists, tiling
from kernels.attention.portable.tiling import Blocks

BLOCKS = {"forward": Blocks(16, 32, 4, 2), "dkv": Blocks(32, 16, 4, 2), "dq": Blocks(16, 16, 4, 2)}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that differ by pass, so that short sequences have many."""
    monkeypatch.setattr(tiling, "_blocks", lambda name, dtype, head_size: BLOCKS[name])


def gain_and_slope(score, q_pos, kv_pos, head, params):
    """One number for all heads, and one for each, which it looks up."""
    return score * (1 + params["gain"] ** 2) - params["slope"][head] * jnp.abs(q_pos - kv_pos)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call attend: sizes, and its options made from a random generator."""

    L: int
    S: int
    H: int = 2
    G: int = 2
    D: int = 4
    Dv: int = 4
    B: int = 1
    options: object = lambda case, rng: {}

    def arguments(self, dtype):
        rng = np.random.default_rng(0)
        shapes = (self.B, self.L, self.H, self.D), (self.B, self.S, self.G, self.D), (self.B, self.S, self.G, self.Dv)
        q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
        return q, k, v, self.options(self, rng)

    def cotangents(self, dtype):
        rng = np.random.default_rng(1)
        shape = (self.B, self.L, self.H)
        return jnp.asarray(rng.normal(size=(*shape, self.Dv)), dtype), jnp.asarray(rng.normal(size=shape), dtype)


HEADS = masks.PerHead((masks.Causal(), masks.Window(9), masks.Strided(7) & masks.Causal(), masks.Full()))
CASES = {
    "one position": Case(1, 1),
    "two queries of many keys, head size 20": Case(2, 65, D=20, Dv=40, options=lambda c, rng: {"mask": masks.Causal()}),
    "grouped heads, a window, soft-cap": Case(
        63, 127, H=4, Dv=6, options=lambda c, rng: {"mask": masks.Causal() & masks.Window(20), "softcap": 2.0, "scale": 0.7}
    ),
    "more queries than keys, dropout, several rows of the batch": Case(
        50, 33, B=2, H=4, G=1, options=lambda c, rng: {"mask": masks.Causal(), "dropout": Dropout(0.3, jax.random.key(1))}
    ),
    "a mask for each head, a table of every head": Case(
        63,
        65,
        B=2,
        H=4,
        options=lambda c, rng: {"mask": HEADS, "bias": biases.Dense(jnp.asarray(rng.normal(size=(1, 4, 63, 65))))},
    ),
    "a mask that looks up, a table of every row of the batch, packed documents": Case(
        65,
        65,
        B=2,
        options=lambda c, rng: {
            "mask": masks.random_blocks(16, 5, 2, seed=0) | masks.Window(3),
            "bias": biases.Dense(jnp.asarray(rng.normal(size=(2, 1, 65, 65)))),
            "segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (2, 65)), axis=1)),
        },
    ),
    "a bias of keys": Case(
        33,
        65,
        B=2,
        options=lambda c, rng: {"mask": masks.Causal(), "bias": biases.Dense(jnp.asarray(rng.normal(size=(2, 1, 1, 65))))},
    ),
    "a bias of queries, then a function": Case(
        63,
        65,
        H=4,
        options=lambda c, rng: {
            "mask": masks.Causal(),
            "bias": biases.Chain((
                biases.Dense(jnp.asarray(rng.normal(size=(1, 4, 63, 1)))),
                biases.Function(gain_and_slope, {"gain": jnp.ones(()), "slope": jnp.asarray(rng.random(4))}),
                biases.ALiBi(jnp.asarray(rng.random(4))),
            )),
        },
    ),
    "positions": Case(
        50,
        61,
        B=2,
        options=lambda c, rng: {
            "mask": masks.Causal(),
            "q_positions": jnp.asarray(rng.integers(0, 61, (2, c.L))),
            "kv_positions": jnp.asarray(rng.permutation(c.S)),
        },
    ),
}  # fmt: skip


def run(name, case, dtype, times=1):
    """out, lse, and the gradients by q, k, v and the bias's arrays; a list of arrays for each time."""
    q, k, v, options = case.arguments(dtype)
    weights, lse_weights = case.cotangents(dtype)

    def loss(q, k, v, bias):
        out, lse = attention.attend(q, k, v, **{**options, "bias": bias}, return_lse=True, implementation=name)
        return (out * weights).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * lse_weights).sum(), (out, lse)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    results = [[np.asarray(x) for x in jax.tree.leaves(compiled(q, k, v, options.get("bias")))] for _ in range(times)]
    return results if times > 1 else results[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference_with_all_gradients(small_tiles, quick_compile, case):
    if jax.default_backend() != "cpu":
        pytest.skip("float64 runs only in the interpreter, on a CPU")
    with jax.enable_x64(True):
        ours, expected = (run(name, case, jnp.float64) for name in ("portable", "reference"))
    for x, y in zip(ours, expected, strict=True):
        assert np.isfinite(x[~np.isneginf(y)]).all()
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


def test_float32_is_as_exact_as_the_dense_form_and_repeats_bit_for_bit(small_tiles, quick_compile):
    """FlashAttention's criterion: error against float64 at most twice that of the dense float32 form, + 1e-6."""
    case = CASES["a mask for each head, a table of every head"]
    with jax.enable_x64(True):
        exact = run("reference", case, jnp.float64)
    first, second = run("portable", case, jnp.float32, times=2)
    for ours, again, dense, truth in zip(first, second, run("reference", case, jnp.float32), exact, strict=True):
        np.testing.assert_array_equal(ours, again)
        at = np.isfinite(truth)
        assert abs(ours - truth)[at].max() <= 2 * abs(dense - truth)[at].max() + 1e-6


def needed(mask, H, L, S, q_tile, kv_tile):
    """[H, rows, columns]: whether any pair of a tile is allowed, by looking at every pair."""
    heads = masks.of_heads(mask)
    pairs = np.arange(S - L, S)[:, None], np.arange(S)[None]
    allowed = np.stack([np.broadcast_to(head.allowed(*pairs), (L, S)) for head in heads])
    ends = (0, -L % q_tile), (0, -S % kv_tile)
    tiles = np.pad(allowed, [(0, 0), *ends]).reshape(len(heads), -1, q_tile, (S + ends[1][1]) // kv_tile, kv_tile)
    return np.broadcast_to(tiles.any(axis=(2, 4)), (H, *tiles.any(axis=(2, 4)).shape[1:]))


@pytest.mark.parametrize("mask", [masks.Causal() & masks.Window(20), HEADS], ids=["window", "by head"])
def test_kernels_visit_the_tiles_that_the_pattern_needs(quick_compile, mask):
    """Counted inside each kernel; dkv counts those of all heads that share a key/value head."""
    case = Case(90, 127, H=4, G=2, B=2)
    call = _call(*case.arguments(jnp.float32)[:3], *[None] * 5, mask=mask, softcap=None, scale=None)
    visits = jax.jit(lambda call: portable.visits(call, BLOCKS))(call)
    expected = {name: needed(mask, 4, 90, 127, blocks.q, blocks.kv) for name, blocks in BLOCKS.items()}
    by_group = expected["dkv"].sum(axis=1).reshape(2, 2, -1).sum(axis=1)
    np.testing.assert_array_equal(visits["forward"], np.stack([expected["forward"].sum(axis=2)] * 2))
    np.testing.assert_array_equal(visits["dq"], np.stack([expected["dq"].sum(axis=2)] * 2))
    np.testing.assert_array_equal(visits["dkv"], np.stack([by_group] * 2))
    assert 0 < expected["forward"].mean() < 1


def test_kernels_visit_the_tiles_of_their_documents(quick_compile):
    """Each row of the batch by its own segment ids, known when it runs; one row is a single document."""
    case, rng = Case(90, 127, B=2), np.random.default_rng(0)
    kv_ids = np.stack([np.sort(rng.integers(0, 5, 127)), np.zeros(127)]).astype(np.int32)
    q_ids = kv_ids[:, -90:]
    arrays = *case.arguments(jnp.float32)[:3], None, (q_ids, kv_ids), None, None, None
    call = _call(*arrays, mask=masks.Full(), softcap=None, scale=None)
    visits = jax.jit(lambda call: portable.visits(call, BLOCKS))(call)
    for name, blocks in BLOCKS.items():
        expected = np.stack([needed(same_document(q, kv), 1, 90, 127, blocks.q, blocks.kv)[0] for q, kv in zip(q_ids, kv_ids)])
        assert expected[0].mean() < 0.6 and expected[1].all()
        by_line = expected.sum(axis=1 if name == "dkv" else 2)
        np.testing.assert_array_equal(visits[name], np.stack([by_line] * case.H, axis=1))


def same_document(q_ids, kv_ids):
    moved = len(kv_ids) - len(q_ids)
    return masks.Predicate(lambda q_pos, kv_pos: q_ids[q_pos - moved] == kv_ids[kv_pos])


def test_tiles_that_the_mask_rules_out_are_never_read(small_tiles, quick_compile):
    """NaN at early positions leaves those beyond the window finite, forward and backward, and reaches the others."""
    q, k, v, _ = Case(128, 128).arguments(jnp.float32)
    q, k, v = (x.at[:, :32].set(jnp.nan) for x in (q, k, v))

    def loss(q, k, v):
        out = attention.attend(q, k, v, mask=masks.Causal() & masks.Window(16), implementation="portable")
        return out[:, 64:].sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert np.isfinite(out[:, 64:]).all() and np.isnan(out[:, :32]).all()
    for gradient in gradients:
        assert np.isfinite(gradient[:, 64:]).all()


def test_a_batch_axis_of_vmap_is_a_batch(small_tiles, quick_compile):
    q, k, v, _ = Case(20, 40, B=2).arguments(jnp.float32)

    def one(q, k, v):
        return attention.attend(q[None], k[None], v[None], mask=masks.Causal(), implementation="portable")[0]

    batched = attention.attend(q, k, v, mask=masks.Causal(), implementation="reference")
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(q, k, v), batched, atol=1e-6)


def test_stored_patterns_are_stored_once():
    """Causal in tiles of one size has one partial pattern, whatever the number of tiles on the diagonal; 0 allows all."""
    case = Case(256, 256, H=2)
    mask = masks.PerHead((masks.Causal(), masks.Full()))
    call = _call(*case.arguments(jnp.float32)[:3], *[None] * 5, mask=mask, softcap=None, scale=None)
    listed = lists.by_row(call, tiling.plan(call, interpret=True, blocks=dict.fromkeys(BLOCKS, Blocks(32, 32, 4, 2))).dq)
    np.testing.assert_array_equal(listed.stored, np.stack([np.ones((32, 32)), np.tri(32)]))
    assert listed.visits.sum() == 8 * 9 // 2 + 64


def test_tiles_are_skipped_by_what_is_known_of_positions_before_tracing(quick_compile):
    """Of two stretches, keys after all queries are not visited, keys before them without a test, the same ones half."""
    starts = ((0, 1), (128, 1)), ((128, 1), (0, 1)), ((128, 1), (128, 1))
    q, k, v, _ = Case(128, 128).arguments(jnp.float32)
    call = _call(q, k, v, *[None] * 5, mask=masks.Causal(), softcap=None, scale=None)
    call = dataclasses.replace(call, q_positions=jnp.arange(128)[None], kv_positions=jnp.arange(128)[None])
    tilings = tiling.plan(call, interpret=True, blocks=dict.fromkeys(BLOCKS, Blocks(32, 32, 4, 2)))
    for which, (tiles, tested) in enumerate([(0, 0), (16, 0), (10, 4)]):
        spanned = dataclasses.replace(call, spans=Spans(jnp.int32(which), starts))
        for listed in (lists.by_row(spanned, tilings.forward), lists.by_column(spanned, tilings.dkv)):
            assert listed.heads == 1 and (listed.bounds[..., 2] - listed.bounds[..., 0]).sum() == tiles
            assert (listed.bounds[..., 2] - listed.bounds[..., 1]).sum() == tested


def test_block_sizes_follow_head_size_and_length():
    """The next larger head size of the table; never more than the length needs, never fewer than a product's 16."""
    table = tiling.BLOCKS["forward"]
    for D, L, expected in [(64, 4096, table[64].q), (65, 4096, table[128].q), (300, 4096, table[256].q), (8, 40, 64), (8, 3, 16)]:
        x = jax.ShapeDtypeStruct((1, L, 1, D), jnp.bfloat16)
        call = jax.eval_shape(lambda x: _call(x, x, x, *[None] * 5, mask=masks.Full(), softcap=None, scale=None), x)
        assert tiling.plan(call, interpret=True).forward.q_tile == expected


ON_GPU = {
    "gathers": ({"bias": biases.Bucketed(jnp.zeros((2, 32)))}, {}, "Bucketed indexes an array"),
    "params": (
        {"bias": biases.Function(gain_and_slope, {"gain": jnp.ones(3)}, gathers=False)}, {}, r"powers of two, not \[3\]",
    ),
    "head size": ({}, {"head_dim": 320}, "head sizes up to 256, not 320"),
    "float64": ({}, {"dtype": "float64"}, "no float64"),
    "another device": ({}, {"platform": "tpu"}, "interpreted on cpu, not for tpu"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "facts", "reason"), ON_GPU.values(), ids=ON_GPU)
def test_what_it_cannot_do_on_a_gpu(options, facts, reason):
    q, k, v, _ = Case(32, 32).arguments(jnp.float32)
    call = _call(q, k, v, options.get("bias"), *[None] * 4, mask=masks.Causal(), softcap=None, scale=None)
    spec = spec_of(call, False, "gpu")
    assert portable.why_not(dataclasses.replace(spec, bias=None, bias_gathers=False, bias_whole_axes=())) is None
    with pytest.raises(AssertionError, match=reason):
        assert portable.why_not(dataclasses.replace(spec, **facts)) is None


def test_positions_given_to_a_mask_that_only_the_host_can_evaluate():
    q, k, v, _ = Case(32, 32, H=4).arguments(jnp.float32)
    for options in ({"q_positions": jnp.arange(32)}, {"kv_positions": jnp.arange(32)}):
        assert explain(q, k, v, mask=masks.Causal(), **options, implementation="portable").name == "portable"
        with pytest.raises(ValueError, match="must be evaluated before positions are known"):
            attention.attend(q, k, v, mask=HEADS, **options, implementation="portable")
