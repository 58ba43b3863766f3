"""Mamba: against an independent implementation, its published initial values, both directions, and the short convolution."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.mixers import Context, build, state_size
from efficient_attn.mixers.causal_conv import causal_conv
from efficient_attn.mixers.mamba import Mamba
from kernels.scan.selective import PREFERENCE

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation


def from_torch(w: dict, prefix: str = "w.") -> dict:
    """Our parameters from those of a Mamba mixer in Hugging Face's names."""

    def kernel(name):
        return dict(kernel=w[f"{prefix}{name}.weight"].T)

    s6 = dict(
        conv=dict(kernel=w[f"{prefix}conv1d.weight"][:, 0].T, bias=w[f"{prefix}conv1d.bias"]),
        x_proj=kernel("x_proj"),
        dt_proj=kernel("dt_proj"),
        dt_bias=w[f"{prefix}dt_proj.bias"],
        A_log=w[f"{prefix}A_log"],
        D=w[f"{prefix}D"],
    )
    return dict(in_proj=kernel("in_proj"), forward=s6, out_proj=kernel("out_proj"))


def load(oracle_dir, case: str):
    arrays = {name: jnp.asarray(x) for name, x in np.load(oracle_dir / f"{case}.npz").items()}
    return arrays, json.loads((oracle_dir / f"{case}.json").read_text())["hyper"]


@pytest.mark.parametrize("name", [*PREFERENCE, "portable"])
def test_oracle_of_one_layer(oracle_dir, name):
    a, hyper = load(oracle_dir, "mamba_s6_mixer")
    mamba = Mamba(
        state_dim=hyper["d_state"],
        expand=hyper["expand"],
        conv_width=hyper["d_conv"],
        dt_rank=hyper["dt_rank"],
        causal=True,
        implementation=name,
    )
    y = jax.jit(lambda p, x: mamba.apply({"params": p}, x, Context()))(from_torch(a), a["in.x"])
    np.testing.assert_allclose(y, a["out.y"], atol=TOLERANCE)


class Stack(nn.Module):
    """Residual blocks with the oracle's epsilon, which `models.blocks` does not use."""

    mixer: dict
    depth: int
    epsilon: float

    @nn.compact
    def __call__(self, x, ctx):
        for i in range(self.depth):
            x = x + build(self.mixer, name=f"mixer_{i}")(nn.RMSNorm(self.epsilon, name=f"norm_{i}")(x), ctx)
        return nn.RMSNorm(self.epsilon, name="norm_f")(x)


def test_oracle_of_a_model(oracle_dir):
    """The whole sequence at once, and token by token from the cache."""
    a, hyper = load(oracle_dir, "mamba_model_2layer")
    mixer = dict(
        name="mamba",
        causal=True,
        state_dim=hyper["state_size"],
        expand=hyper["expand"],
        conv_width=hyper["conv_kernel"],
        dt_rank=hyper["time_step_rank"],
        use_bias=hyper["use_bias"],
        use_conv_bias=hyper["use_conv_bias"],
    )
    model = Stack(mixer, hyper["num_hidden_layers"], hyper["layer_norm_epsilon"])
    params = {"norm_f": dict(scale=a["w.norm_f.weight"])}
    for i in range(hyper["num_hidden_layers"]):
        params[f"norm_{i}"] = dict(scale=a[f"w.layers.{i}.norm.weight"])
        params[f"mixer_{i}"] = from_torch(a, f"w.layers.{i}.mixer.")
    x = a["w.embeddings.weight"][a["in.ids"]]
    y = jax.jit(lambda x: model.apply({"params": params}, x, Context()))(x)
    np.testing.assert_allclose(y, a["out.y"], atol=TOLERANCE)

    step = jax.jit(lambda v, x: model.apply(v, x, Context(decode=True), mutable=["cache"]))
    cache = model.init(jax.random.key(0), x, Context(decode=True))["cache"]
    outputs = []
    for t in range(x.shape[1]):
        y, updated = step({"params": params, "cache": cache}, x[:, t : t + 1])
        cache = updated["cache"]
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), a["out.y"], atol=TOLERANCE)


def test_published_initial_values():
    p = Mamba(causal=True).init(jax.random.key(0), jnp.zeros((1, 4, 512)), Context())["params"]
    s6 = p["forward"]
    assert s6["x_proj"]["kernel"].shape == (1024, 32 + 2 * 16)  # dt_rank = 512 / 16
    np.testing.assert_allclose(np.exp(s6["A_log"]), np.tile(np.arange(1, 17), (1024, 1)), rtol=1e-6)
    np.testing.assert_array_equal(s6["D"], 1)
    steps = np.asarray(jax.nn.softplus(s6["dt_bias"]))
    assert 0.001 <= steps.min() * 1.0001 < 0.0012 and 0.08 < steps.max() <= 0.1001
    np.testing.assert_allclose(np.log(steps).mean(), np.log(0.01), atol=0.1)
    for kernel, fan_in in ((s6["dt_proj"]["kernel"], 32), (s6["conv"]["kernel"], 4), (p["in_proj"]["kernel"], 512)):
        assert 0.95 * fan_in**-0.5 < np.abs(kernel).max() <= fan_in**-0.5
        np.testing.assert_allclose(np.std(kernel), (3 * fan_in) ** -0.5, rtol=0.05)


def test_smallest_initial_step_is_the_floor():
    p = Mamba(dt_min=1e-6, dt_floor=1e-3, causal=True).init(jax.random.key(0), jnp.zeros((1, 4, 64)), Context())["params"]
    np.testing.assert_allclose(jax.nn.softplus(p["forward"]["dt_bias"]).min(), 1e-3, rtol=1e-4)


def test_bidirectional_is_the_sum_of_two_causal_layers():
    """Vision Mamba: the second has its own convolution and S6, reads the sequence backwards, and shares the projections."""
    both, one = Mamba(state_dim=4), Mamba(state_dim=4, causal=True)
    x = jax.random.normal(jax.random.key(0), (2, 21, 6))
    p = both.init(jax.random.key(1), x, Context())["params"]
    shared = {name: p[name] for name in ("in_proj", "out_proj")}
    ahead, back = ({"params": {**shared, "forward": p[name]}} for name in ("forward", "backward"))
    expected = one.apply(ahead, x, Context()) + jnp.flip(one.apply(back, jnp.flip(x, axis=1), Context()), axis=1)
    np.testing.assert_allclose(both.apply({"params": p}, x, Context()), expected, atol=1e-5)


def test_state_does_not_grow_with_the_length():
    mixer = dict(name="mamba", causal=True, state_dim=4)
    assert state_size(mixer, 10, 8) == state_size(mixer, 10_000, 8) == 4 * (16 * 4 + 3 * 16)


def test_only_a_causal_layer_decodes():
    with pytest.raises(ValueError, match="only a causal Mamba decodes"):
        Mamba().init(jax.random.key(0), jnp.zeros((1, 4, 8)), Context(decode=True))


def convolution_by_hand(x, weights, bias, starts, reverse):
    taps, (_, L, _) = len(weights), x.shape
    document = np.cumsum(starts, axis=1)
    y = np.zeros_like(x) + bias
    for row in range(x.shape[0]):
        for t in range(L):
            for d in range(taps):
                source = t + d if reverse else t - d
                if 0 <= source < L and document[row, source] == document[row, t]:
                    y[row, t] += weights[taps - 1 - d] * x[row, source]
    return y


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taps", [1, 4])
def test_convolution_stays_within_its_document(taps, reverse):
    rng = np.random.default_rng(0)
    x, weights, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 17, 3), (taps, 3), (3,)))
    starts = rng.random((2, 17)) < 0.3
    y = causal_conv(*map(jnp.asarray, (x, weights, bias)), starts=jnp.asarray(starts), reverse=reverse)
    np.testing.assert_allclose(y, convolution_by_hand(x, weights, bias, starts, reverse), atol=1e-6)
    y = causal_conv(*map(jnp.asarray, (x, weights, bias)), reverse=reverse)
    np.testing.assert_allclose(y, convolution_by_hand(x, weights, bias, np.zeros_like(starts), reverse), atol=1e-6)
