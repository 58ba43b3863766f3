"""What every entry of MIXERS must do: shapes, padding, causality, documents, decoding, its own claims."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import MIXERS, Attention, Context, Entry, build, state_size
from efficient_attn.mixers.context import Paging
from kernels.attention import masks

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, E = 2, 19, 8
ARGUMENTS = {
    "softmax": dict(num_heads=2, num_kv_heads=1, rotation=dict(name="rotary")),
    "s5": dict(state_dim=8, blocks=2),
    "s4": dict(state_dim=8),
    "s4d": dict(state_dim=8),
    "dss": dict(state_dim=4),
    "lru": dict(state_dim=8),
    "s4nd": dict(state_dim=8, columns=5),
    "local": dict(num_heads=2, num_kv_heads=1, window=11, rotation=dict(name="rotary")),
    "block_local": dict(num_heads=2, num_kv_heads=1, block_size=6, look_back=1, rotation=dict(name="rotary")),
    "image_local_1d": dict(num_heads=2, num_kv_heads=1, query_block=4, memory=8, rotation=dict(name="rotary")),
    "image_local_2d": dict(
        num_heads=2, num_kv_heads=1, width=1, query_height=4, query_width=1, memory_height=8, rotation=dict(name="rotary")
    ),
    "blockbert": dict(num_heads=2),
    "sparse_transformer": dict(num_heads=2, kind="fixed", stride=4, width=1),
    "longformer": dict(num_heads=2, window=4, dilation=(1, 2)),
    "bigbird": dict(num_heads=2, block_size=2, num_random=1),
    "etc": dict(num_heads=2, global_tokens=2, radius=3, clip=2),
    "gaussian": dict(num_heads=2, stddev=4.0),
    "synthesizer": dict(num_heads=2, mode="factorized_random", max_length=65, rank=3),
    "mamba": dict(state_dim=4),
    "mamba2": dict(state_dim=4, head_dim=4, groups=2),
    "linear_attention": dict(num_heads=2),
    "performer": dict(num_heads=2, num_features=16),
    "rfa": dict(num_heads=2, num_features=64),
    "rfa_gate": dict(num_heads=2, num_features=64),
    "luna": dict(num_heads=2, packed_length=3),
    "scatterbrain": dict(num_heads=2, num_features=16, block_size=4),
    "nystrom": dict(num_heads=2, num_landmarks=4, conv_kernel=3),
    "linformer": dict(num_heads=2, max_length=65, projected_length=4),
    "combiner": dict(num_heads=2, num_kv_heads=1, factorisation="axial_rowmajor", size=4, rotation=dict(name="rotary")),
    "adaptive_span": dict(num_heads=2, num_kv_heads=1, max_span=11, init_span=5.0, dynamic=True, rotation=dict(name="rotary")),
    "bp_transformer": dict(num_heads=2, num_kv_heads=1, neighbours=2, rotation=dict(name="rotary")),
    "h_transformer_1d": dict(num_heads=2, num_kv_heads=1, block_size=4, rotation=dict(name="rotary")),
    "reformer": dict(num_heads=2, chunk_size=5, rounds=2, num_buckets=4),
    "routing": dict(num_heads=2, num_clusters=3, block_size=4),
    "sinkhorn": dict(num_heads=2, block_size=5, max_length=65, iterations=3),
    "smyrf": dict(num_heads=2, cluster_size=5, rounds=2),
    "scfa": dict(num_heads=2, num_buckets=2),
    "infinite_former": dict(num_heads=2, num_basis=4),
}
CAUSAL = [name for name, entry in MIXERS.items() if entry.causal]
BIDIRECTIONAL = [name for name, entry in MIXERS.items() if entry.bidirectional]
DECODES = [name for name, entry in MIXERS.items() if entry.decode]


def mixer_dict(name: str, causal: bool) -> dict:
    return dict(name=name, causal=causal, **ARGUMENTS.get(name, {}))


def visible(module, t: int) -> np.ndarray:
    """bool [L]: what position t sees in some head, by the pattern that the module states; everything where it states none."""
    position, causal = np.arange(L), module.causal
    stated = module.mask(L) if isinstance(module, Attention) else masks.Causal() if causal else masks.Full()
    return np.any([mask.allowed(position[t], position) for mask in masks.of_heads(stated)], axis=0)


def check_seen(name: str, seen: np.ndarray, expected: np.ndarray) -> None:
    """In each row of `seen` exactly what is expected; where the content decides, nothing else and more than one position."""
    if MIXERS[name].content_based:
        assert not np.any(seen & ~expected[None]) and np.all(seen.sum(axis=-1) > 1)
    else:
        np.testing.assert_array_equal(seen, np.broadcast_to(expected, seen.shape))


@functools.cache
def make(name: str, causal: bool):
    """The module, its jitted `apply`, parameters (moved off symmetric initial values) and an input, for all tests to share."""
    module = build(mixer_dict(name, causal))
    x = jax.random.normal(jax.random.key(0), (B, L, E))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    keys = iter(jax.random.split(jax.random.key(2), 1000))
    variables = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(next(keys), p.shape), variables)
    return module, jax.jit(module.apply), variables, x


LENGTHS = [1, 65, *(pytest.param(length, marks=pytest.mark.exhaustive) for length in (2, 63))]


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_and_finite_gradients(name, length):
    module = build(mixer_dict(name, causal=MIXERS[name].causal))
    x = jax.random.normal(jax.random.key(0), (B, length, E))

    @jax.jit
    def run(key, x):
        def loss(variables, x):
            y = module.apply(variables, x, Context())
            return jnp.sum(y**2), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(module.init(key, x, Context()), x)

    gradients, y = run(jax.random.key(1), x)
    assert y.shape == x.shape and y.dtype == x.dtype
    gradients = jax.tree.leaves(gradients)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert any(np.any(g != 0) for g in gradients)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_form_has_no_gradient_from_the_future(name):
    module, _, variables, x = make(name, causal=True)
    t = 11
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(module.apply(variables, x, Context())[:, t])))(x)
    if MIXERS[name].by_fft:
        gradient = jnp.where(jnp.abs(gradient) <= 1e-6 * jnp.max(jnp.abs(gradient)), 0, gradient)
    np.testing.assert_array_equal(gradient[:, t + 1 :], 0.0)
    if name != "identity":
        check_seen(name, np.any(gradient != 0, axis=-1), visible(module, t))


@pytest.mark.parametrize("name", [n for n in BIDIRECTIONAL if n != "identity"])
def test_bidirectional_form_sees_both_sides(name):
    module, _, variables, x = make(name, causal=False)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(module.apply(variables, x, Context())[:, 9])))(x)
    expected = visible(module, 9)
    assert expected[:9].any() and expected[10:].any()
    check_seen(name, np.any(gradient != 0, axis=-1), expected)


@pytest.mark.parametrize("name", MIXERS)
def test_padding_never_leaks(name):
    for causal in {MIXERS[name].causal, not MIXERS[name].bidirectional}:
        _, apply, variables, x = make(name, causal)
        mask = jnp.arange(L)[None, :] < jnp.array([[L], [12]])
        other = x.at[1, 12:].set(100.0)
        y, z = (apply(variables, v, Context(mask=mask)) for v in (x, other))
        np.testing.assert_array_equal(y[0], z[0])
        np.testing.assert_allclose(y[1, :12], z[1, :12], rtol=0, atol=1e-6)
        if MIXERS[name].length_dependent:
            continue
        short = apply(variables, x[:, :12], Context())
        np.testing.assert_allclose(y[1, :12], short[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_nothing_flows_out_of_gaps(name):
    for causal in {MIXERS[name].causal, not MIXERS[name].bidirectional}:
        _, apply, variables, x = make(name, causal)
        mask = jnp.ones((2, L), bool).at[1, 3:7].set(False)
        other = x.at[1, 3:7].set(50.0)
        y, z = (apply(variables, v, Context(mask=mask)) for v in (x, other))
        np.testing.assert_allclose(jnp.where(mask[..., None], y, 0), jnp.where(mask[..., None], z, 0), rtol=0, atol=1e-6)


FORMS = [(name, causal) for causal, names in ((True, CAUSAL), (False, BIDIRECTIONAL)) for name in names]


@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_packed_documents_are_independent(name, causal):
    _, apply, variables, x = make(name, causal)
    segment_ids = jnp.array([[0] * 7 + [1] * 12] * B)
    positions = jnp.array([[*range(7), *range(12)]] * B)
    entry = MIXERS[name]
    if refusal := entry.refuses_documents or (not causal and entry.bidirectional_refuses_documents):
        with pytest.raises(ValueError, match=re.escape(refusal)):
            apply(variables, x, Context(segment_ids=segment_ids))
        return
    packed = apply(variables, x, Context(segment_ids=segment_ids, positions=positions))
    if MIXERS[name].length_dependent:
        other = apply(variables, x.at[:, :7].set(100.0), Context(segment_ids=segment_ids, positions=positions))
        np.testing.assert_allclose(packed[:, 7:], other[:, 7:], rtol=0, atol=1e-6)
        return
    for part in (slice(0, 7), slice(7, L)):
        alone = apply(variables, x[:, part], Context())
        np.testing.assert_allclose(packed[:, part], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DECODES)
def test_decoding_equals_the_parallel_form(name):
    """Token by token and in chunks, from any prefix, together with a row that stands elsewhere; also in blocks, where it can."""
    module, apply, variables, x = make(name, causal=True)
    parallel = apply(variables, x, Context())
    tables = jnp.asarray(np.random.default_rng(0).permutation(np.arange(1, 11)).reshape(B, 5), jnp.int32)
    for paging in (None, Paging(tables, num_blocks=11, block_size=4)):
        shapes = jax.eval_shape(module.init, jax.random.key(0), x, Context(decode=True, paging=paging))
        if paging is not None and "blocks" not in shapes:
            continue
        state = {key: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get(key, {})) for key in STATE}
        assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(state["cache"]))
        check_decoding(module, variables, x, parallel, state, paging)


STATE = ("cache", "blocks")
FED = [((0,), 5), *[((0, 1), 1)] * 10, ((0, 1), 4), ((1,), 5)]
"""Which rows take how many tokens next; in the end both have had all of them."""


def check_decoding(module, variables, x, parallel, state, paging) -> None:
    """Feed `FED` from an empty state, whose cache has a row in axis 0 for each of the batch and starts with zeros."""

    @jax.jit
    def step(state, x, rows):
        own = None if paging is None else paging.replace(tables=paging.tables[rows])
        collections = {**variables, **state, "cache": jax.tree.map(lambda leaf: leaf[rows], state["cache"])}
        y, new = module.apply(collections, x, Context(decode=True, paging=own), mutable=STATE)
        cache = jax.tree.map(lambda leaf, part: leaf.at[rows].set(part), state["cache"], dict(new).get("cache", {}))
        return y, {"cache": cache, "blocks": dict(new).get("blocks", {})}

    start = [0, 0]
    for rows, size in FED:
        chunk = jnp.stack([x[row, start[row] : start[row] + size] for row in rows])
        y, state = step(state, chunk, jnp.array(rows))
        for i, row in enumerate(rows):
            expected = parallel[row, start[row] : start[row] + size]
            np.testing.assert_allclose(y[i], expected, rtol=0, atol=2e-5)
            start[row] += size
    assert start == [L, L]


def test_state_size_is_the_decode_cache():
    assert state_size(mixer_dict("s5", True), 10, E) == state_size(mixer_dict("s5", True), 1000, E) == 4 * 8
    kv = 2 * 4 * (E // 2)  # keys and values, float32, one head of size E / 2
    assert state_size(mixer_dict("softmax", True), 100, E) - state_size(mixer_dict("softmax", True), 10, E) == 90 * kv
    assert state_size(mixer_dict("identity", True), 100, E) == 0


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_follows_float32(name):
    _, apply, variables, x = make(name, causal=MIXERS[name].causal)
    low = build(mixer_dict(name, MIXERS[name].causal), dtype=jnp.bfloat16)
    y, z = apply(variables, x, Context()), jax.jit(low.apply)(variables, x.astype(jnp.bfloat16), Context())
    assert z.dtype == jnp.bfloat16
    is_far = np.any(np.abs(z.astype(jnp.float32) - y) > 0.05 * float(jnp.max(jnp.abs(y))), axis=-1)
    assert np.all(np.isfinite(z.astype(jnp.float32))) and np.mean(is_far) <= (0.2 if MIXERS[name].content_based else 0.0)


def test_errors_name_what_is_wrong():
    with pytest.raises(ConfigError, match=r"softmaxx.*did you mean 'softmax'.*identity, .*s5, .*softmax"):
        build(dict(name="softmaxx"))
    with pytest.raises(ConfigError, match=r"no argument 'num_head' \(did you mean 'num_heads'\?\)"):
        build(dict(name="softmax", num_head=2))
    with pytest.raises(ValueError, match="width 8 is not divisible by num_heads=3"):
        build(dict(name="softmax", num_heads=3)).init(jax.random.key(0), jnp.zeros((1, 4, 8)), Context())
    with pytest.raises(ValueError, match="only causal"):
        build(dict(name="softmax", causal=False)).init(jax.random.key(0), jnp.zeros((1, 4, 8)), Context(decode=True))


@functools.cache
def recall_of_two_pairs(steps: int):
    """The task, a batch to start from, `steps` batches to train on, and all examples of its test split as one."""
    from efficient_attn.tasks.pipeline import train_batches
    from efficient_attn.tasks.synthetic import MultiQueryRecall

    task = MultiQueryRecall(length=12, vocab_size=16, num_pairs=2, num_eval=256, num_examples=20_000)
    batches = train_batches(task.source("train"), batch_size=64, seed=0)
    first, *train = itertools.islice(batches, steps + 1)
    batches.close()
    return task, first, train, task.source("test").batch(np.arange(256))


def recall_accuracy(mixer: dict, steps: int = 500) -> float:
    """Test accuracy of two layers, width 32, after a short training on recall of 2 pairs among 16 tokens."""
    import optax

    from efficient_attn import models
    from efficient_attn.steps import eval_step, init_state, train_step

    task, first, batches, test = recall_of_two_pairs(steps)
    model = models.build(dict(depth=2, width=32, positions=dict(name="learned"), mixer=mixer), task)
    tx = optax.adam(1e-2)
    state = jax.jit(lambda b: init_state(model, tx, 0, b, ema=False))(first)
    step = jax.jit(lambda s, b: train_step(model, tx, s, b))
    for batch in batches:
        state, _ = step(state, batch)
    correct, count = jax.jit(lambda v, b: eval_step(model, v, b)[0])(state.evaluated(), test)["accuracy"]
    return float(correct / count)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_recall_margin(name, record_property):
    """Attention recalls; what claims a reason not to does not say so in vain. `--junitxml=FILE` keeps the accuracies."""
    claim = MIXERS[name].recall
    accuracy = recall_accuracy(mixer_dict(name, causal=True))
    record_property("claim", claim)
    record_property("accuracy", accuracy)
    chance = 0.5  # a guess between the two values that were shown
    if isinstance(claim, float):
        assert accuracy >= chance + claim
    else:
        assert len(claim) > 20 and accuracy < chance + 0.2


def test_a_function_of_q_k_v_is_an_entry(monkeypatch):
    """The values alone, averaged over heads' keys: not attention, but a function of q, k and v."""

    def first_value(q, k, v, **options):
        return jnp.broadcast_to(v[:, :1], (*q.shape[:3], v.shape[-1]))

    entry = Entry(Attention, cost="1", function=first_value)
    monkeypatch.setattr("efficient_attn.mixers.MIXERS", {**MIXERS, "first": entry})
    module = build(dict(name="first", num_heads=2))
    x = jax.random.normal(jax.random.key(0), (B, L, E))
    y, _ = module.init_with_output(jax.random.key(1), x, Context())
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), atol=1e-6)


def test_decoding_refuses_padding():
    with pytest.raises(ValueError, match="decoding takes no mask"):
        Context(mask=jnp.ones((1, 4), bool), decode=True)
