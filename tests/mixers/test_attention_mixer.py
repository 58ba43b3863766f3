"""The attention mixer: how its own scale, rotation and bias come together, and T5's layer as its authors have it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Attention, Context, kv_cache
from efficient_attn.positions import BIASES, Places, Sizes
from kernels.attention import attend, biases, masks, paged

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", ["t5_bias_bidir", "t5_bias_causal"])
def test_layer_of_t5(oracle_dir, case, shared):
    """Its own weights in the mixer, with a table of the layer's own or one from the model."""
    arrays = {name: jnp.asarray(x) for name, x in np.load(oracle_dir / f"{case}.npz").items()}
    hyper = json.loads((oracle_dir / f"{case}.json").read_text())["hyper"]
    heads, size, x = hyper["heads"], hyper["d_kv"], arrays["in.x"]
    bias = dict(name="t5", num_buckets=hyper["num_buckets"], max_distance=hyper["max_distance"])
    module = Attention(
        num_heads=heads, head_dim=size, causal=hyper["causal"], scale=1.0, use_bias=False,
        bias=dict(name="none") if shared else bias,
    )  # fmt: skip
    inner = {"query": "q", "key": "k", "value": "v"}
    params = {name: {"kernel": arrays[f"w.{n}.weight"].T.reshape(-1, heads, size)} for name, n in inner.items()}
    params["out"] = {"kernel": arrays["w.o.weight"].T.reshape(heads, size, -1)}
    table = {"params": {"table": arrays["w.relative_attention_bias.weight"].T}}
    if shared:
        rest = {key: value for key, value in bias.items() if key != "name"}
        context = Context(bias=BIASES["t5"](**rest).apply(table, Sizes(heads, size, x.shape[-1], hyper["causal"])))
    else:
        params["position_bias"], context = table["params"], Context()
    np.testing.assert_allclose(module.apply({"params": params}, x, context), arrays["out.y"], atol=TOLERANCE)


def run(module, variables, x, context):
    return jax.jit(module.apply)(variables, x, context)


def inputs(**arguments):
    module = Attention(num_heads=2, causal=True, implementation="reference", **arguments)
    x = jax.random.normal(jax.random.key(0), (2, 9, 8))
    return module, jax.jit(module.init)(jax.random.key(1), x, Context()), x


@pytest.mark.parametrize("method", [{}, dict(bias=dict(name="shaw", clip=2)), dict(bias=dict(name="transformer_xl"))])
def test_scale_multiplies_all_terms(method):
    """A scale of c / sqrt(D) is queries (and what stands for them) multiplied by c."""
    module, variables, x = inputs(scale=3 / 2.0, **method)  # D = 4
    plain = Attention(num_heads=2, causal=True, implementation="reference", **method)
    tripled = jax.tree.map(lambda p: p, variables)
    tripled["params"]["query"] = jax.tree.map(lambda p: 3 * p, variables["params"]["query"])
    for name in ("u", "v"):
        if name in tripled["params"].get("position_bias", {}):
            tripled["params"]["position_bias"][name] = 3 * variables["params"]["position_bias"][name]
    np.testing.assert_allclose(
        run(module, variables, x, Context()), run(plain, tripled, x, Context()), atol=1e-5
    )  # fmt: skip
    assert np.abs(run(module, variables, x, Context()) - run(plain, variables, x, Context())).max() > 1e-3


def test_the_models_bias_and_the_mixers_own_add_up():
    module, variables, x = inputs(bias=dict(name="alibi"))
    shared = BIASES["alibi"]().apply({}, Sizes(2, 4, 8, True))
    twice, _, _ = inputs(function=lambda *qkv, bias, **options: attend(*qkv, bias=biases.chain(bias, bias), **options),
                         bias=dict(name="alibi"))  # fmt: skip
    both = run(module, variables, x, Context(bias=shared))
    np.testing.assert_allclose(both, run(twice, variables, x, Context()), atol=1e-6)
    assert np.abs(both - run(module, variables, x, Context())).max() > 1e-3


def test_rotation_of_other_mechanisms_queries_and_keys():
    x = jax.random.normal(jax.random.key(0), (2, 5, 2, 4))
    at = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    rotated = Attention(rotation=dict(name="rotary"))._rotate(x, at)
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])
    assert np.abs(rotated - x).max() > 0.1
    for arguments in (dict(rotation=dict(name="rerope", window=3)), dict(bias=dict(name="alibi"))):
        with pytest.raises(ConfigError, match="does not go with this mechanism"):
            Attention(**arguments)._rotate(x, at)


def test_a_bias_passes_through_a_pattern():
    """A window a head, documents and ALiBi: the same as the op given all three."""

    class Windows(Attention):
        shift_invariant = False

        def pattern(self, length):
            return masks.PerHead((masks.Window(2), masks.Window(4)))

    x = jax.random.normal(jax.random.key(0), (2, 9, 8))
    module = Windows(num_heads=2, bias=dict(name="alibi"), function=spy)
    segments = jnp.array([[0] * 4 + [1] * 5] * 2)
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    SEEN.clear()
    module.apply(variables, x, Context(segment_ids=segments))
    (options,) = SEEN
    assert isinstance(options["mask"], masks.PerHead) and isinstance(options["bias"], biases.ALiBi)
    np.testing.assert_array_equal(options["q_positions"][0], [0, 1, 2, 3, 0, 1, 2, 3, 4])


SEEN = []


def spy(q, k, v, **options):
    SEEN.append(options)
    return attend(q, k, v, **options)


def test_lengths_are_those_of_documents():
    groups = jnp.array([[4, 4, 4, 0, 0], [1, 1, 1, 1, -1]])
    lengths = [[3, 3, 3, 2, 2], [4, 4, 4, 4, 1]]
    for positions in (None, jnp.array([[0, 1, 2, 0, 1], [7, 8, 9, 10, 0]])):
        np.testing.assert_array_equal(Places.of_tokens(5, positions, groups, causal=True).q_length, lengths)
    np.testing.assert_array_equal(Places.of_cache(jnp.array([[3, 4], [7, 8]]), 20).kv_length, [[5], [9]])


def test_where_a_decode_kernel_is_a_default_it_reads_a_contiguous_cache_in_place(monkeypatch):
    """As blocks that follow one another, here by the kernel that is interpreted on CPUs."""
    module = Attention(num_heads=4, num_kv_heads=2, head_dim=8, causal=True)
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    variables = module.init(jax.random.key(1), x, Context(decode=True))
    index = {"cache_index": jnp.array([5, 2], jnp.int32)}
    keys = {name: jax.random.normal(jax.random.key(2 + i), (2, 2, 8, 8)) for i, name in enumerate(("cached_key", "cached_value"))}
    variables = {"params": variables["params"], "cache": keys | index}

    def step():
        return jax.jit(lambda: module.apply(variables, x[:, :1], Context(decode=True), mutable=["cache"])[0])()

    expected, calls, run = step(), [], paged.attend
    monkeypatch.setattr(kv_cache, "BLOCK", 4)
    monkeypatch.setattr(paged, "preference", lambda platform: ("portable",))
    monkeypatch.setattr(paged, "attend", lambda *arrays, **options: calls.append(options) or run(*arrays, **options))
    np.testing.assert_allclose(step(), expected, atol=1e-5)
    assert len(calls) == 1
