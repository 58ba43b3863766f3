"""Linformer: against an independent implementation, its limit of full attention, its projections and their sharing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.models.encoder import Classifier
from kernels.attention import attend

TOLERANCE = 1e-4


pytestmark = pytest.mark.usefixtures("quick_compile")


CASES = ["full", "one_kv_head", "share_kv", "short"]
"""Of the oracle: all of n positions, one head of keys and values, values = keys by the same projection, fewer positions."""


@pytest.mark.parametrize("case", CASES)
def test_oracle(oracle_dir, case):
    hyper = json.loads((oracle_dir / "linformer.json").read_text())["hyper"]
    arrays = {name: jnp.asarray(x) for name, x in np.load(oracle_dir / "linformer.npz").items()}
    assert sorted({name.split(".")[1] for name in arrays}) == CASES
    w = {name.removeprefix(f"w.{case}."): x for name, x in arrays.items() if name.startswith(f"w.{case}.")}
    heads, width, is_tied = hyper["heads"], hyper["dim"], "proj_v" not in w
    head_dim, to_k = width // heads, w["to_k.weight"]
    kv_heads = len(to_k) // head_dim

    def kernel(matrix, count):
        return {"kernel": matrix.T.reshape(width, count, head_dim)}

    params = dict(query=kernel(w["to_q.weight"], heads), key=kernel(to_k, kv_heads))
    params["value"] = kernel(to_k if is_tied else w["to_v.weight"], kv_heads)
    params["out"] = {"kernel": w["to_out.weight"].T.reshape(heads, head_dim, width)}
    names = dict(projection="proj_k") if is_tied else dict(key_projection="proj_k", value_projection="proj_v")
    params |= {ours: w[theirs][None] for ours, theirs in names.items()}
    sizes = dict(num_heads=heads, num_kv_heads=kv_heads, max_length=hyper["seq_len"], projected_length=hyper["k"])
    mixer = dict(name="linformer", sharing="key-value" if is_tied else "headwise", use_bias=False, **sizes)
    out = jax.jit(build(mixer).apply)({"params": params}, arrays[f"in.{case}.x"], Context())
    np.testing.assert_allclose(out + w["to_out.bias"][None, None], arrays[f"out.{case}.y"], rtol=0, atol=TOLERANCE)


def make(length=10, **arguments):
    module = build(dict(name="linformer", num_heads=2, **arguments))
    x = jax.random.normal(jax.random.key(0), (2, length, 8))
    return module, jax.jit(module.init)(jax.random.key(1), x, Context()), x


IDENTITY = {"learned": jnp.eye(10)[None], "convolution": jnp.ones((1, 1, 4)), "mean": None, "max": None}
"""Weights with which k = n positions are projected to themselves."""


@pytest.mark.parametrize("projection", IDENTITY)
def test_identity_projections_give_full_attention_with_all_gradients(projection):
    """Pooled also with padding, which `attend` leaves out; a learned projection sees it as keys of 0."""
    sizes = dict(name="linformer", num_heads=2, max_length=10, projected_length=10, projection=projection)
    is_learned = IDENTITY[projection] is not None
    own = dict.fromkeys(("key_projection", "value_projection"), IDENTITY[projection]) if is_learned else {}
    mask = jnp.arange(10)[None] < jnp.array([[10], [10 if is_learned else 7]])

    def function(mixer, own, dtype):
        module = build(mixer, dtype=dtype)
        apply = jax.jit(lambda params, x: module.apply({"params": {**params, **own}}, x.astype(dtype), Context(mask=mask)))
        return lambda params, x: jnp.where(mask[..., None], apply(params, x), 0)

    with jax.enable_x64(True):
        x, g = (jax.random.normal(jax.random.key(i), (2, 10, 8), jnp.float64) for i in range(2))
        softmax = dict(name="softmax", num_heads=2)
        params = jax.jit(build(softmax).init)(jax.random.key(2), x, Context())["params"]
        expected, expected_vjp = jax.vjp(function(softmax, {}, jnp.float64), params, x)
        out, vjp = jax.vjp(function(sizes, own, jnp.float64), params, x)
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)
        (ours, ours_x), (theirs, theirs_x) = vjp(g), expected_vjp(g)
        np.testing.assert_allclose(ours_x, theirs_x, rtol=1e-10, atol=1e-10)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)  # float32 parameters
        low, low_dense = (function(mixer, w, jnp.float32)(params, x) for mixer, w in ((sizes, own), (softmax, {})))
        error, dense_error = (float(jnp.max(jnp.abs(y - expected))) for y in (low, low_dense))
        assert error <= 2 * dense_error + 1e-6


@pytest.mark.parametrize("projection", ["mean", "max", "convolution"])
def test_blocks_are_pooled_over_real_positions(projection):
    """Blocks of 4 of 10 positions against loops over them; the second row has 6 real positions."""
    module, variables, x = make(max_length=12, projected_length=3, projection=projection, sharing="none")
    params = variables["params"]
    mask = jnp.arange(10)[None] < jnp.array([[10], [6]])

    def affine(formula, x, name):
        return jnp.einsum(formula, x, params[name]["kernel"]) + params[name]["bias"][None, None]

    q, k, v = (affine("ble,ehd->blhd", x, name) for name in ("query", "key", "value"))

    def pooled(a, row, weights):
        parts = []
        for start in range(0, 10, 4):
            part = a[row, start : start + 4][np.asarray(mask[row, start : start + 4])]
            if not len(part):
                continue
            convolved = 0 if weights is None else jnp.sum(part * jnp.moveaxis(weights, 0, 1)[: len(part)], axis=0)
            parts.append({"mean": part.mean(0), "max": part.max(0), "convolution": convolved}[projection])
        return jnp.stack(parts)[None]

    out = jax.jit(module.apply)(variables, x, Context(mask=mask))
    for row in range(2):
        rows = [pooled(a, row, params.get(f"{n}_projection")) for a, n in ((k, "key"), (v, "value"))]
        assert rows[0].shape[1] == (3, 2)[row]
        y = affine("blhd,hde->ble", attend(q[row : row + 1], *rows), "out")
        np.testing.assert_allclose(out[row : row + 1], y, rtol=0, atol=1e-5)


def test_sharing_decides_what_is_learned():
    def shapes(**arguments):
        module = build(dict(name="linformer", num_heads=2, max_length=12, projected_length=3, **arguments))
        init = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 10, 8)), Context()))
        params = init["params"]
        return {name: x.shape for name, x in params.items() if "projection" in name}

    assert shapes(sharing="none") == {"key_projection": (2, 12, 3), "value_projection": (2, 12, 3)}
    assert shapes(sharing="headwise") == {"key_projection": (1, 12, 3), "value_projection": (1, 12, 3)}
    assert shapes(sharing="key-value") == {"projection": (1, 12, 3)}
    assert shapes(sharing="key-value", projection="convolution") == {"projection": (1, 4, 4)}
    assert shapes(projection="mean") == {}


def model(*mixers, **arguments):
    mixers = tuple(dict(name="linformer", num_heads=2, max_length=12, projected_length=3) | mixer for mixer in mixers)
    arguments = dict(feed_forward_width=8) | arguments
    return Classifier(vocab_size=9, num_outputs=3, length=10, depth=2, width=8, mixer=mixers, **arguments)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layerwise_sharing_is_one_projection_of_all_layers(remat):
    """The model of layers of their own projections with equal values; its gradient is the sum of theirs."""
    inputs = jax.random.randint(jax.random.key(0), (2, 10), 0, 9)
    shared, own = (model(dict(sharing=sharing), remat=remat) for sharing in ("layerwise", "key-value"))
    params = jax.jit(shared.init)(jax.random.key(1), inputs, Context())["params"]
    projection = params["linformer_projection"]
    assert projection.shape == (1, 12, 3) and not any("projection" in name for name in params["layer_0"]["mixer"])

    def with_own(params):
        layers = {f"layer_{i}": dict(params[f"layer_{i}"]) for i in range(2)}
        for layer in layers.values():
            layer["mixer"] = {**layer["mixer"], "projection": params["linformer_projection"]}
        return {name: x for name, x in params.items() if "layer" not in name and "projection" not in name} | layers

    def loss(model, params):
        return jnp.sum(model.apply({"params": params}, inputs, Context()) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(shared, p)))(params)
    due, expected = jax.jit(jax.value_and_grad(lambda p: loss(own, with_own(p))))(params)
    np.testing.assert_allclose(value, due, rtol=1e-6)
    assert float(jnp.max(jnp.abs(gradient["linformer_projection"]))) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)


def test_layers_that_share_must_agree():
    def init(*mixers, **arguments):
        module = model(*mixers, **arguments)
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 10), jnp.int32), Context())

    layerwise = dict(sharing="layerwise")
    init(layerwise, dict(projected_length=4))
    with pytest.raises(ConfigError, match=r"linformer_projection need it in one shape; here \(1, 12, 3\) and \(1, 12, 4\)"):
        init(layerwise, layerwise | dict(projected_length=4))
    with pytest.raises(ConfigError, match="'reversible' gives each layer its own gradients; linformer_projection is shared"):
        init(layerwise, residual="reversible")
    with pytest.raises(ConfigError, match="goes with projection='learned', not 'convolution'"):
        init(layerwise | dict(projection="convolution"))


def test_equal_values_come_back_whatever_the_weights():
    """Rows of the softmax sum to 1, so that values that are all v give v where F sums to 1 over positions."""
    module, variables, x = make(max_length=10, projected_length=5, projection="mean")
    y = jax.jit(module.apply)(variables, jnp.broadcast_to(x[:, :1], x.shape), Context())
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), rtol=0, atol=1e-6)


def test_errors_name_what_does_not_fit():
    def init(**arguments):
        module = build(dict(name="linformer", num_heads=2, **arguments))
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 10, 8)), Context()))

    with pytest.raises(ValueError, match="a sequence of 10 positions is longer than max_length=8"):
        init(max_length=8)
    with pytest.raises(ConfigError, match=r"model.mixer.projection='svd' is unknown.*convolution, learned, max, mean"):
        init(projection="svd")
    with pytest.raises(ConfigError, match=r"model.mixer.sharing='heads' is unknown.*headwise, key-value, layerwise, none"):
        init(sharing="heads")
    with pytest.raises(ConfigError, match="a layer alone takes 'key-value'"):
        init(sharing="layerwise")
    with pytest.raises(ConfigError, match="'linformer' has no causal form"):
        init(causal=True)
    with pytest.raises(ConfigError, match="projected_length=0 must be at least 1"):
        init(projected_length=0)
    with pytest.raises(ConfigError, match=r"model.mixer.bias \(name='alibi'\) does not go with"):
        init(bias=dict(name="alibi"))
