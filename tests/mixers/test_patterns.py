"""Mixers that are a pattern: each against its definition written out in NumPy, and what the papers claim of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build, state_size
from efficient_attn.mixers.bigbird import BigBird
from kernels.attention import masks

L, E, H = 22, 8, 4
LAST = (L - 1) // 4  # the last block of four


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


pytestmark = pytest.mark.usefixtures("quick_compile")


# name -> (the mixer, its definition: does query i of head h see key j, causality apart?)
BOTH_FORMS = {
    "window": (dict(name="local", window=3), lambda h, i, j: abs(i - j) <= 2),
    "window_dilated": (dict(name="local", window=3, dilation=2), lambda h, i, j: abs(i - j) in (0, 2, 4)),
    "blocks": (dict(name="block_local", block_size=4), lambda h, i, j: i // 4 == j // 4),
    "blocks_back": (dict(name="block_local", block_size=4, look_back=1), lambda h, i, j: i // 4 - j // 4 in (0, 1)),
    "blocks_exact": (
        dict(name="block_local", block_size=4, look_back=2, look_ahead=1, exact=True),
        lambda h, i, j: -1 <= i // 4 - j // 4 <= 2 and -4 <= i - j <= 8,
    ),
    "image_1d": (
        dict(name="image_local_1d", query_block=4, memory=3),
        lambda h, i, j: i // 4 * 4 - 3 <= j < i // 4 * 4 + 4,
    ),
    "image_2d": (
        dict(name="image_local_2d", width=11, query_height=1, query_width=4, memory_height=1, memory_width=2),
        lambda h, i, j: 0 <= i // 11 - j // 11 <= 1 and -2 <= j % 11 - i % 11 // 4 * 4 < 6,
    ),
    "strided": (dict(name="sparse_transformer", stride=5), lambda h, i, j: abs(i - j) <= 5 or (i - j) % 5 == 0),
    "strided_heads": (
        dict(name="sparse_transformer", stride=5, integration="heads"),
        lambda h, i, j: abs(i - j) <= 5 if h < 2 else (i - j) % 5 == 0,
    ),
    "strided_first": (dict(name="sparse_transformer", stride=5, integration="first"), lambda h, i, j: abs(i - j) <= 5),
    "strided_second": (
        dict(name="sparse_transformer", stride=5, integration="second"),
        lambda h, i, j: (i - j) % 5 == 0,
    ),
    "fixed": (
        dict(name="sparse_transformer", kind="fixed", stride=6, width=2, distinct=False),
        lambda h, i, j: i // 6 == j // 6 or j % 6 in (4, 5),
    ),
    "fixed_distinct": (
        dict(name="sparse_transformer", kind="fixed", stride=6, width=2),
        lambda h, i, j: i // 6 == j // 6 or j % 6 // 2 == (2, 1, 0, 2)[h],
    ),
    "fixed_heads": (
        dict(name="sparse_transformer", kind="fixed", stride=6, width=2, integration="heads"),
        lambda h, i, j: i // 6 == j // 6 if h < 2 else j % 6 // 2 == (0, 2)[h - 2],
    ),
}
ONE_FORM = {
    "longformer": (
        dict(name="longformer", window=6, dilation=(1, 1, 2, 3)),
        lambda h, i, j: (i - j) % (1, 1, 2, 3)[h] == 0 and abs(i - j) <= 3 * (1, 1, 2, 3)[h],
    ),
    "longformer_causal": (
        dict(name="longformer", window=6, dilation=(1, 1, 2, 3), causal=True),
        lambda h, i, j: (i - j) % (1, 1, 2, 3)[h] == 0 and 0 <= i - j <= 6 * (1, 1, 2, 3)[h],
    ),
    "blockbert": (
        dict(name="blockbert", num_blocks=3, heads_per_shift=(2, 1, 1)),
        lambda h, i, j: j // 8 == (i // 8 + (0, 0, 1, 2)[h]) % 3,
    ),
    "bigbird_itc": (
        dict(name="bigbird", block_size=4, num_random=0),
        lambda h, i, j: abs(i // 4 - j // 4) <= 1 or {i // 4, j // 4} & {0, LAST},
    ),
    "bigbird_etc": (
        dict(name="bigbird", block_size=4, num_random=0, global_tokens=3),
        lambda h, i, j: abs(i // 4 - j // 4) <= 1 or min(i, j) < 3,
    ),
    "etc": (dict(name="etc", global_tokens=3, radius=2, clip=0), lambda h, i, j: abs(i - j) <= 2 or min(i, j) < 3),
    "long_range_arena_sparse": (
        dict(name="sparse_transformer", kind="fixed", stride=6, width=2, distinct=False, one_sided=True, global_tokens=1),
        lambda h, i, j: 0 in (i, j) or (j <= i and (i // 6 == j // 6 or j % 6 in (4, 5))),
    ),
}
CASES = [(name, causal) for name in BOTH_FORMS for causal in (False, True)]
CASES += [(name, mixer.get("causal", False)) for name, (mixer, _) in ONE_FORM.items()]


def case(name: str, causal: bool, **options):
    """The module and bool [H, L, L], what it sees by the definition."""
    mixer, rule = {**BOTH_FORMS, **ONE_FORM}[name]
    seen = [[[bool(rule(h, i, j)) and (j <= i or not causal) for j in range(L)] for i in range(L)] for h in range(H)]
    return build({**mixer, "num_heads": H, "causal": causal}, **options), np.array(seen)


def initialised(module, seed: int = 0, length: int = L):
    """Parameters off their initial values, and an input, in the module's type."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, length, E)), module.dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, Context())
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.4, size=p.shape), module.dtype), shapes), x


def apply(module, variables, x, ctx=None):
    return jax.jit(module.apply)(variables, x, ctx or Context())


def dense(params, x, seen: np.ndarray, suffix: str = "") -> np.ndarray:
    """Multi-head attention on the pairs seen [H, L, L], in float64 NumPy: heads [B, L, H, D] before the output layer."""
    x = np.asarray(x, np.float64)
    q, k, v = (
        np.einsum("ble,ehd->blhd", x, np.float64(params[name + suffix]["kernel"])) + np.float64(params[name + suffix]["bias"])
        for name in ("query", "key", "value")
    )
    weights = np.where(seen[None], np.exp(np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[-1])), 0)
    return np.einsum("bhls,bshd->blhd", weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300), v)


def output_layer(params, heads: np.ndarray) -> np.ndarray:
    return np.einsum("blhd,hde->ble", heads, np.float64(params["out"]["kernel"])) + np.float64(params["out"]["bias"])


@pytest.mark.parametrize("name, causal", CASES)
def test_the_mixer_is_dense_attention_on_the_pairs_of_its_definition(x64, name, causal):
    module, seen = case(name, causal, dtype=jnp.float64)
    position = np.arange(L)
    stated = [mask.allowed(position[:, None], position[None]) for mask in masks.of_heads(module.mask(L))]
    np.testing.assert_array_equal(np.broadcast_to(np.stack(stated), seen.shape), seen)
    variables, x = initialised(module)
    expected = output_layer(variables["params"], dense(variables["params"], x, seen))
    np.testing.assert_allclose(apply(module, variables, x), expected, rtol=0, atol=1e-10)


def factorised(kind: str, width: int) -> tuple[list, list[np.ndarray]]:
    """Layers of the first and the second pattern, and bool [L, L], what they see."""
    shared = dict(name="sparse_transformer", num_heads=1, kind=kind, stride=5, width=width, causal=True)
    layers = [build({**shared, "integration": part}) for part in ("first", "second")]
    i, j = np.arange(L)[:, None], np.arange(L)[None]
    return layers, [masks.of_heads(layer.mask(L))[0].allowed(i, j) for layer in layers]


@pytest.mark.parametrize("kind, width", [("strided", 1), ("fixed", 1), ("fixed", 2)])
def test_two_factorised_layers_connect_all_positions(kind, width):
    """Every j <= i is at most one step of each pattern away (Child et al. 2019, section 4.2), and neither alone suffices."""
    _, (first, second) = factorised(kind, width)
    first, second = first | np.eye(L, dtype=bool), second | np.eye(L, dtype=bool)
    np.testing.assert_array_equal(second @ first, np.tri(L, dtype=bool))
    assert (first @ first).sum() < np.tri(L).sum() > (second @ second).sum()


def test_reach_of_two_layers_is_the_product_of_their_patterns():
    """Gradients through two layers are non-zero exactly where a path of their patterns leads."""
    layers, seen = factorised("fixed", 2)
    (first, x), (second, _) = (initialised(layer, seed) for seed, layer in enumerate(layers))

    @jax.jit
    @jax.jacrev
    def reach(x):
        y = layers[1].apply(second, layers[0].apply(first, x, Context()), Context())
        return y.sum(axis=(0, 2))

    has_choice = [pairs.sum(axis=1, keepdims=True) > 1 for pairs in seen]  # a query matters where it has two keys or more
    steps = [pairs | (np.eye(L, dtype=bool) & choice) for pairs, choice in zip(seen, has_choice)]
    np.testing.assert_array_equal(np.any(reach(x) != 0, axis=(1, 3)), steps[1] @ steps[0])


def blocks_drawn(mixer: BigBird, length: int) -> np.ndarray:
    """bool [H, blocks, blocks]: the blocks that only the random part sees."""
    first = np.arange(0, length, mixer.block_size)
    seen = [m.allowed(first[:, None], first[None]) for m in masks.of_heads(mixer.pattern(length))]
    return np.stack(seen) & ~mixer.without_random(length).allowed(first[:, None], first[None])


def test_bigbird_draws_blocks_that_are_not_seen_already():
    mixer = BigBird(num_heads=H, block_size=4, num_random=2)
    drawn = blocks_drawn(mixer, 46)  # 12 blocks, the last one cut short
    np.testing.assert_array_equal(drawn.sum(axis=2), [[0, *[2] * 10, 0]] * H)
    assert all(np.any(drawn[0] != drawn[h]) for h in range(1, H))
    np.testing.assert_array_equal(drawn, blocks_drawn(BigBird(num_heads=H, block_size=4, num_random=2), 46))
    assert np.any(drawn != blocks_drawn(BigBird(num_heads=H, block_size=4, num_random=2, seed=1), 46))
    few = blocks_drawn(mixer, 18)  # blocks 0 ... 4: the middle one sees all of them, those beside it all but one
    np.testing.assert_array_equal(few[0].sum(axis=1), [0, 1, 0, 1, 0])


def test_blockbert_deals_heads_out_evenly_and_takes_any_length():
    module = build(dict(name="blockbert", num_heads=5, num_blocks=3))
    assert module._shifts() == [0, 0, 1, 1, 2]
    for length in (1, 2, 3, 5, 7):
        seen = [m.allowed(np.arange(length)[:, None], np.arange(length)[None]) for m in masks.of_heads(module.mask(length))]
        assert np.stack(seen).any(axis=2).all()


GLOBAL = dict(name="longformer", num_heads=2, window=4, dilation=(1, 2), global_tokens=3)


@pytest.mark.parametrize("length", [2, 17])
def test_global_tokens_see_through_projections_of_their_own(x64, length):
    """Two dense attentions in NumPy; the tokens of a sequence shorter than `global_tokens` are all global."""
    module = build(GLOBAL, dtype=jnp.float64)
    variables, x = initialised(module, length=length)
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    near = np.stack([(abs(i - j) <= 2 * d) & ((i - j) % d == 0) | (j < 3) for d in (1, 2)])
    heads = dense(variables["params"], x, near)
    heads[:, :3] = dense(variables["params"], x, np.ones_like(near), "_global")[:, :3]
    np.testing.assert_allclose(apply(module, variables, x), output_layer(variables["params"], heads), rtol=0, atol=1e-10)


def test_global_tokens_of_packed_and_padded_documents():
    module = build(GLOBAL)
    variables, x = initialised(module, length=17)
    packed = apply(module, variables, x, Context(segment_ids=jnp.array([[0] * 7 + [1] * 10] * 2)))
    for part in (slice(0, 7), slice(7, 17)):
        np.testing.assert_allclose(packed[:, part], apply(module, variables, x[:, part]), rtol=0, atol=1e-5)
    mask = jnp.arange(17)[None] < jnp.array([[17], [10]])
    padded = apply(module, variables, x.at[1, 10:].set(100.0), Context(mask=mask))
    np.testing.assert_allclose(padded[1, :10], apply(module, variables, x[:, :10])[1], rtol=0, atol=1e-5)


def test_gradients_through_global_tokens(x64):
    """Central differences in float64, along a random direction of all parameters and the input."""
    module = build(GLOBAL, dtype=jnp.float64)
    point, direction = (initialised(module, seed, 9) for seed in (0, 1))

    @jax.jit
    def loss(step):
        variables, x = jax.tree.map(lambda p, d: p + step * d, point, direction)
        return jnp.sum(jnp.sin(module.apply(variables, x, Context())))

    step = 1e-5
    slope = (loss(step) - loss(-step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), slope, rtol=1e-6)


@pytest.mark.parametrize(
    "name, lookback", [("window_dilated", 4), ("blocks_back", 7), ("image_1d", 6), ("longformer_causal", 18)]
)
def test_decoding_keeps_no_more_than_the_window(name, lookback):
    """Chunk by chunk, equal to the parallel form, from a cache whose size does not grow with the length."""
    mixer = {**{**BOTH_FORMS, **ONE_FORM}[name][0], "num_heads": H, "causal": True}
    module = build({**mixer, "rotation": dict(name="rotary")})
    variables, x = initialised(module)
    parallel = apply(module, variables, x)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context(decode=True)), x)["cache"]
    assert shapes["last_keys"].shape == (2, min(lookback, L), H, E // H)
    assert state_size(mixer, 100, E) == state_size(mixer, 1000, E) == 4 * (2 * lookback * E + 1)
    cache, start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), 0
    step = jax.jit(lambda v, x: module.apply(v, x, Context(decode=True), mutable=["cache"]))
    for size in (5, 1, 1, 1, 1, 1, 5, 5, 1, 1):
        y, updated = step({**variables, "cache": cache}, x[:, start : start + size])
        np.testing.assert_allclose(y, parallel[:, start : start + size], rtol=0, atol=2e-5)
        cache, start = updated["cache"], start + size
    assert start == L


def test_errors_name_the_argument():
    x = jnp.zeros((1, 12, E))

    def init(**mixer):
        return build(mixer).init(jax.random.key(0), x, Context())

    with pytest.raises(ConfigError, match=r"heads_per_shift=\(1, 1\) must .* sum to num_heads=4"):
        init(name="blockbert", heads_per_shift=(1, 1))
    with pytest.raises(ConfigError, match=r"heads_per_shift=\(5, -1\) must .* none negative"):
        init(name="blockbert", heads_per_shift=(5, -1))
    with pytest.raises(ConfigError, match="integration='heads' needs num_heads of at least 2"):
        init(name="sparse_transformer", num_heads=1, integration="heads")
    with pytest.raises(ConfigError, match=r"kind='strid' is unknown \(did you mean 'strided'\?\); one of: fixed, strided"):
        init(name="sparse_transformer", kind="strid")
    with pytest.raises(ConfigError, match="integration='both' is unknown"):
        init(name="sparse_transformer", integration="both")
    with pytest.raises(ConfigError, match="bigbird: window=2 must be odd"):
        init(name="bigbird", window=2)
    for name, argument, low in (("local", "window", 1), ("bigbird", "block_size", 1), ("etc", "global_tokens", 0)):
        with pytest.raises(ConfigError, match=rf"\(name='{name}'\).{argument}={low - 1} must be at least {low}"):
            init(name=name, **{argument: low - 1})
    with pytest.raises(ValueError, match=r"Fixed.*width=9"):
        init(name="sparse_transformer", kind="fixed", stride=8, width=9)
    with pytest.raises(ValueError, match="12 positions are not whole rows of width=5"):
        init(name="image_local_2d", width=5)
    with pytest.raises(ConfigError, match="use global_tokens=0 where causal=True"):
        init(name="longformer", global_tokens=1, causal=True)
    with pytest.raises(ConfigError, match=r"global_tokens=0 .* and to decode"):
        build(dict(name="longformer", global_tokens=1)).init(jax.random.key(0), x, Context(decode=True))
    with pytest.raises(ConfigError, match=r"dilation=\(1, 2\) needs an entry for each of num_heads=4"):
        init(name="longformer", dilation=(1, 2))
    for name in ("bigbird", "blockbert", "etc"):
        with pytest.raises(ConfigError, match=f"'{name}' has no causal form"):
            build(dict(name=name, causal=True))
    with pytest.raises(ValueError, match="only causal"):
        build(dict(name="bigbird")).init(jax.random.key(0), x, Context(decode=True))
