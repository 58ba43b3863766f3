"""Every implementation of attend against the reference, the reference against a plain softmax, and what holds of all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.attention import Dropout, biases, chunked, explain, masks
from kernels.attention.api import IMPLEMENTATIONS
from tests.kernels import attention_cases

FAST = sorted(set(IMPLEMENTATIONS) - attention_cases.TESTED_APART - {"reference"})
NAMES = [*FAST, "reference"]


def attend(*args, **options):
    """The op, compiled anew, so that tile sizes set by a test are those used."""
    static = ("mask", "softcap", "scale", "return_lse", "implementation")
    return jax.jit(lambda *a, **o: attention.attend(*a, **o), static_argnames=static)(*args, **options)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of at most 16 x 32, so that short sequences have many."""
    monkeypatch.setattr(chunked, "TILE_SIZES", attention_cases.SMALL_TILES)


def distance_bias(score, q_pos, kv_pos, head, params):
    """A bias with learned arrays, additive and multiplicative, one number a head and one for all."""
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
    options: object = lambda case, rng: {}

    def arguments(self, dtype, B=2):
        rng = np.random.default_rng(0)
        shapes = (B, self.L, self.H, self.D), (B, self.S, self.G, self.D), (B, self.S, self.G, self.Dv)
        q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
        return q, k, v, self.options(self, rng)

    def cotangents(self, dtype, B=2):
        rng = np.random.default_rng(1)
        shape = (B, self.L, self.H)
        return jnp.asarray(rng.normal(size=(*shape, self.Dv)), dtype), jnp.asarray(rng.normal(size=shape), dtype)


def ids(rng, *shape):
    return jnp.asarray(np.sort(rng.integers(0, 3, shape), axis=-1))


CASES = {
    "one query": Case(1, 40, options=lambda c, rng: {"mask": masks.Causal()}),
    "grouped heads": Case(63, 65, H=4, Dv=6, options=lambda c, rng: {"mask": masks.Causal()}),
    "more queries than keys": Case(50, 33, options=lambda c, rng: {"mask": masks.Causal()}),
    "window": Case(65, 65, options=lambda c, rng: {"mask": masks.Causal() & masks.Window(9)}),
    "all but a window, soft-cap": Case(65, 70, options=lambda c, rng: {"mask": ~masks.Window(20), "softcap": 2.0}),
    "padding": Case(
        50, 61, options=lambda c, rng: {"segment_ids": (jnp.ones((2, c.L), int), jnp.asarray(rng.random((2, c.S)) < 0.5, int))}
    ),
    "packed documents": Case(63, 63, G=1, options=lambda c, rng: {"mask": masks.Causal(), "segment_ids": ids(rng, 2, c.L)}),
    "dense bias of every head": Case(
        33, 65, options=lambda c, rng: {"bias": biases.Dense(jnp.asarray(rng.normal(size=(1, c.H, c.L, c.S))))}
    ),
    "dense bias, half of it minus infinity": Case(
        33, 65, options=lambda c, rng: {"bias": biases.Dense(jnp.where(rng.random((2, 1, 1, c.S)) < 0.5, -jnp.inf, 0.5))}
    ),
    "function bias, dropout": Case(
        63,
        65,
        H=4,
        options=lambda c, rng: {
            "bias": biases.Function(distance_bias, {"gain": jnp.ones(()), "slope": jnp.asarray(rng.random(c.H))}),
            "mask": masks.Causal() | masks.Window(3),
            "dropout": Dropout(0.3, jax.random.key(1)),
        },
    ),
    "positions": Case(
        50,
        61,
        options=lambda c, rng: {
            "mask": masks.Causal(),
            "q_positions": jnp.asarray(rng.integers(0, 61, (2, c.L))),
            "kv_positions": jnp.asarray(rng.permutation(c.S)),
        },
    ),
}

CASES |= {
    "by head, grouped, positions": Case(
        40,
        50,
        H=4,
        options=lambda c, rng: {
            "mask": masks.PerHead((masks.Causal(), masks.Window(5), masks.Blocks(16, ((0, 3), (1,), (), (2,))), masks.Causal())),
            "q_positions": jnp.asarray(rng.integers(0, 64, (2, c.L))),
        },
    ),
    "by head, one key head, packed documents, dropout": Case(
        50,
        50,
        H=3,
        G=1,
        options=lambda c, rng: {
            "mask": masks.Causal() & masks.PerHead((masks.Window(9), masks.Strided(7), masks.Full())),
            "segment_ids": ids(rng, 2, c.L),
            "dropout": Dropout(0.2, jax.random.key(2)),
        },
    ),
    "gathered keys, padding": Case(
        65,
        70,
        H=4,
        options=lambda c, rng: {
            "mask": masks.Blocks(8, [[(5 * i) % 9, (7 * i + 2) % 9, i] for i in range(9)]),
            "segment_ids": (jnp.ones((2, c.L), int), jnp.asarray(rng.random((2, c.S)) < 0.7, int)),
        },
    ),
}


def run(name, case, dtype, *, return_lse=False, times=1):
    """out (and lse), and the gradients by q, k, v and the bias's arrays; a list of arrays for each time."""
    q, k, v, options = case.arguments(dtype)
    weights, lse_weights = case.cotangents(dtype)

    def loss(q, k, v, bias):
        result = attention.attend(q, k, v, **{**options, "bias": bias}, return_lse=return_lse, implementation=name)
        out, lse = result if return_lse else (result, jnp.zeros_like(lse_weights))
        return (out * weights).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * lse_weights).sum(), (out, lse)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    results = [[np.asarray(x) for x in jax.tree.leaves(compiled(q, k, v, options.get("bias")))] for _ in range(times)]
    return results if times > 1 else results[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunked_equals_reference_with_all_gradients(small_tiles, quick_compile, case):
    with jax.enable_x64(True):
        ours = run("chunked", case, jnp.float64, return_lse=True)
        expected = run("reference", case, jnp.float64, return_lse=True)
    for x, y in zip(ours, expected, strict=True):
        assert np.isfinite(x[~np.isneginf(y)]).all()
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["packed documents", "dense bias of every head"])
@pytest.mark.parametrize("name", FAST)
def test_float32_is_as_exact_as_the_dense_form(small_tiles, name, case):
    """FlashAttention's criterion: error against float64 at most twice that of the dense float32 form, + 1e-6."""
    case = CASES[case]
    with jax.enable_x64(True):
        exact = run("reference", case, jnp.float64)
    results = zip(run(name, case, jnp.float32), run("reference", case, jnp.float32), exact, strict=True)
    for ours, dense, truth in results:
        assert abs(ours - truth).max() <= 2 * abs(dense - truth).max() + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_exact_as_a_dense_bfloat16_form(small_tiles, quick_compile, name):
    case = Case(40, 48)
    q, k, v, _ = case.arguments(jnp.bfloat16)
    exact = plain_softmax(*(x.astype(jnp.float32) for x in (q, k, v)))
    ours = attend(q, k, v, implementation=name)
    assert ours.dtype == jnp.bfloat16
    bound = 2 * abs(plain_softmax(q, k, v).astype(jnp.float32) - exact).max() + 1e-6
    assert abs(ours.astype(jnp.float32) - exact).max() <= bound


def plain_softmax(q, k, v):
    """Vaswani et al. 2017, eq. 1, as one would write it, without groups or masks."""
    scores = jnp.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    return jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", attention_cases.MASKS)
def test_every_mask_in_every_implementation(small_tiles, quick_compile, mask, name):
    mask, L, S, H = attention_cases.MASKS[mask]
    check_errors(name, mask, attention_cases.Sizes(L, S, H))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 2, 63, 127, pytest.param(1000, marks=pytest.mark.slow)])
def test_lengths(quick_compile, length, name):
    """In tiles of the default sizes; 1000 is several of them, none of which it fills."""
    check_errors(name, masks.Causal(), attention_cases.Sizes(length, length))


@pytest.mark.parametrize("name", NAMES)
def test_large_scores_do_not_overflow(small_tiles, quick_compile, name):
    """Scores near 1e4, whose exponentials are infinite or zero: the softmax is one-hot, and gradients stay finite."""
    sizes = attention_cases.Sizes(33, 50, large=1e4)
    check_errors(name, masks.Causal(), sizes)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("L", "S"), [(1, 1), (2, 2), (63, 63), (65, 65), (127, 127), (1000, 1000), (40, 130), (130, 40)])
@pytest.mark.parametrize("mask", attention_cases.MASKS)
def test_every_mask_implementation_and_length(small_tiles, mask, L, S, name):
    mask, _, _, H = attention_cases.MASKS[mask]
    problem = mask.problem(H, L, S)
    if problem is not None:
        pytest.skip(problem)
    check_errors(name, mask, attention_cases.Sizes(L, S, H, G=1, Dv=6, B=2))


def check_errors(name, mask, sizes):
    reason = attention_cases.reason_against(name, sizes, mask=mask)
    if reason is not None:
        pytest.skip(reason)
    attention_cases.check_errors(name, mask, sizes)


def test_reference_is_softmax_attention_head_by_head():
    """Grouped heads, bias, mask, segments and soft-cap written out with loops, for one row of the batch."""
    case = Case(5, 7, H=4)
    q, k, v, _ = case.arguments(jnp.float32)
    table = jnp.asarray(np.random.default_rng(3).normal(size=(1, 4, 5, 7)), jnp.float32)
    segments = (jnp.array([[0, 0, 1, 1, 1]] * 2), jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2))
    options = {"mask": masks.Causal(), "bias": biases.Dense(table), "segment_ids": segments, "softcap": 1.5, "scale": 0.7}
    out, lse = attend(q, k, v, **options, return_lse=True, implementation="reference")
    for head, i in np.ndindex(4, 5):
        allowed = [j for j in range(7) if j <= i + 2 and segments[0][0, i] == segments[1][0, j]]
        scores = np.array([1.5 * np.tanh(0.7 * q[0, i, head] @ k[0, j, head // 2] / 1.5) for j in allowed])
        scores = scores + np.array([table[0, head, i, j] for j in allowed])
        np.testing.assert_allclose(lse[0, i, head], np.log(np.exp(scores).sum()), atol=1e-5)
        expected = np.exp(scores) @ np.stack([v[0, j, head // 2] for j in allowed]) / np.exp(scores).sum()
        np.testing.assert_allclose(out[0, i, head], expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_an_allowed_key_are_zero(small_tiles, quick_compile, name):
    """By the mask (the first queries of more queries than keys) and by segments (a row whose keys are all padding)."""
    q, k, v, _ = Case(40, 24).arguments(jnp.float32)
    segments = (jnp.ones((2, 40), int), jnp.stack([jnp.ones(24, int), jnp.zeros(24, int)]))
    options = {"mask": masks.Causal(), "segment_ids": segments, "implementation": name}
    out = attend(q, k, v, **options)
    is_empty = np.arange(40)[None] < np.array([[16], [40]])
    assert (np.asarray(out)[is_empty] == 0).all() and (np.asarray(out)[~is_empty] != 0).all()
    gradients = jax.grad(lambda q, k, v: (attend(q, k, v, **options) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(d).all() for d in gradients)
    assert (np.asarray(gradients[0])[is_empty] == 0).all() and not np.asarray(gradients[2])[1].any()
    choice = explain(q, k, v, return_lse=True, implementation="reference")
    if not choice.others.get(name, "").startswith("cannot"):
        _, lse = attend(q, k, v, **options, return_lse=True)
        assert (np.isneginf(lse) == is_empty[..., None]).all()


@pytest.mark.parametrize("name", NAMES)
def test_future_keys_have_no_influence(small_tiles, quick_compile, name):
    """The gradient of one query's output by every later key and value is exactly zero, and by the others is not."""
    q, k, v, _ = Case(45, 45).arguments(jnp.float32)
    dk, dv = jax.grad(
        lambda k, v: attend(q, k, v, mask=masks.Causal(), implementation=name)[:, 20].sum(), argnums=(0, 1)
    )(k, v)  # fmt: skip
    for d in (dk, dv):
        assert not np.asarray(d[:, 21:]).any()
        assert np.asarray(d[:, :21]).any(axis=(0, 2, 3)).all()


def test_chunked_is_deterministic(small_tiles):
    runs = run("chunked", CASES["function bias, dropout"], jnp.float32, return_lse=True, times=2)
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def test_dropout_drops_its_rate_and_keeps_the_mean():
    dropout = Dropout(0.2, jax.random.key(0))
    weights = np.asarray(dropout.scale(*map(jnp.arange, (2, 3, 128, 128))))
    assert set(np.unique(weights)) == {np.float32(0), np.float32(1 / 0.8)}
    dropped = weights == 0
    standard_error = np.sqrt(0.2 * 0.8 / dropped.size)
    assert abs(dropped.mean() - 0.2) < 4 * standard_error
    for axis in range(4):  # neighbours along every axis, and other keys, are independent
        both = (
            np.take(dropped, range(1, dropped.shape[axis]), axis) & np.take(dropped, range(dropped.shape[axis] - 1), axis)
        ).mean()
        assert abs(both - 0.04) < 8 * standard_error
    other = np.asarray(Dropout(0.2, jax.random.key(1)).scale(*map(jnp.arange, (2, 3, 128, 128)))) == 0
    assert abs((other & dropped).mean() - 0.04) < 8 * standard_error


def test_explain_names_the_choice_and_the_reasons():
    x = jax.ShapeDtypeStruct((2, 9, 4, 8), jnp.float32)
    positions = jax.ShapeDtypeStruct((9,), jnp.int32)
    choice = explain(x, x, x, q_positions=positions, softcap=5.0)
    assert choice.name == "chunked"
    assert choice.others["xla"] == "cannot: it has no soft-cap"
    assert explain(x, x, x, implementation="xla").name == "xla"


X = jnp.zeros((2, 5, 4, 8))
BAD = {
    "heads": ((X, jnp.zeros((2, 5, 3, 8)), jnp.zeros((2, 5, 3, 8))), {}, "4 query heads must be a multiple of the 3"),
    "types": ((X, X.astype(jnp.bfloat16), X), {}, "k bfloat16, v float32: all three must have one floating type"),
    "no keys": ((X, jnp.zeros((2, 0, 4, 8)), jnp.zeros((2, 0, 4, 8))), {}, "at least one query and one key"),
    "bias": ((X, X, X), {"bias": biases.Dense(jnp.zeros((1, 3, 5, 5)))}, r"Dense has shape \(1, 3, 5, 5\)"),
    "soft-cap": ((X, X, X), {"softcap": 0.0}, "softcap=0.0; give a positive number"),
    "unknown": ((X, X, X), {"implementation": "flash"}, "'flash' does not exist; use one of"),
    "cannot": ((X, X, X), {"implementation": "xla", "softcap": 1.0}, "cannot run this call: it has no soft-cap; able: "),
}


@pytest.mark.parametrize(("operands", "options", "message"), BAD.values(), ids=BAD)
def test_errors_say_what_was_expected(operands, options, message):
    with pytest.raises(ValueError, match=message):
        attend(*operands, **options)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_dropout_rate_is_a_probability(rate):
    with pytest.raises(ValueError, match="use 0 <= rate < 1"):
        Dropout(rate, jax.random.key(0))
