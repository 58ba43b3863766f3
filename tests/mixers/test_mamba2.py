"""Mamba-2: against an independent implementation, its published initial values, and both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.mixers import Context, state_size
from efficient_attn.mixers.mamba2 import Mamba2
from tests.mixers.test_mamba import TOLERANCE, load

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("case", ["mamba2_ssd_mixer", "mamba2_ssd_mixer_groups_ragged"])
@pytest.mark.parametrize("name", ["chunked", "reference"])
def test_oracle(oracle_dir, name, case):
    a, hyper = load(oracle_dir, case)
    mamba = Mamba2(
        state_dim=hyper["d_state"],
        head_dim=hyper["head_dim"],
        groups=hyper["groups"],
        expand=hyper["expand"],
        conv_width=hyper["d_conv"],
        norm_eps=hyper["rms_eps"],
        causal=True,
        implementation=name,
    )
    params = dict(
        in_proj=dict(kernel=a["w.in_proj.weight"].T),
        forward=dict(
            conv=dict(kernel=a["w.conv1d.weight"][:, 0].T, bias=a["w.conv1d.bias"]),
            A_log=a["w.A_log"],
            D=a["w.D"],
            dt_bias=a["w.dt_bias"],
        ),
        norm=dict(scale=a["w.norm.weight"]),
        out_proj=dict(kernel=a["w.out_proj.weight"].T),
    )
    y = jax.jit(lambda x: mamba.apply({"params": params}, x, Context()))(a["in.x"])
    np.testing.assert_allclose(y, a["out.y"], atol=TOLERANCE)


def test_published_initial_values():
    p = Mamba2(causal=True).init(jax.random.key(0), jnp.zeros((1, 4, 4096)), Context())["params"]
    assert p["in_proj"]["kernel"].shape == (4096, 2 * 8192 + 2 * 128 + 128)
    A, steps = np.exp(p["forward"]["A_log"]), jax.nn.softplus(p["forward"]["dt_bias"])
    assert 1 <= A.min() < 2 and 15 < A.max() <= 16 and A.shape == (128,)
    assert 0.00099 < steps.min() < 0.002 and 0.05 < steps.max() < 0.1001
    np.testing.assert_array_equal(p["forward"]["D"], 1)


def test_steps_are_clipped():
    """With no step allowed the state stays empty: what is left is the skip connection, the same at any distance."""
    mamba = Mamba2(state_dim=4, head_dim=4, dt_upper=0.0, conv_width=1, causal=True)
    x = jax.random.normal(jax.random.key(0), (1, 9, 8))
    variables = mamba.init(jax.random.key(1), x, Context())
    one_by_one = [mamba.apply(variables, x[:, t : t + 1], Context()) for t in range(9)]
    np.testing.assert_allclose(mamba.apply(variables, x, Context()), jnp.concatenate(one_by_one, axis=1), atol=1e-6)


def test_the_second_direction_is_the_first_on_the_flipped_sequence():
    mamba = Mamba2(state_dim=4, head_dim=4)
    x = jax.random.normal(jax.random.key(0), (2, 21, 8))
    p = mamba.init(jax.random.key(1), x, Context())["params"]
    swapped = {**p, "forward": p["backward"], "backward": p["forward"]}
    flipped = jnp.flip(mamba.apply({"params": swapped}, jnp.flip(x, axis=1), Context()), axis=1)
    np.testing.assert_allclose(mamba.apply({"params": p}, x, Context()), flipped, atol=1e-5)


def test_state_does_not_grow_with_the_length():
    mixer = dict(name="mamba2", causal=True, state_dim=4, head_dim=8)
    assert state_size(mixer, 10, 8) == state_size(mixer, 10_000, 8) == 4 * (2 * 8 * 4 + 3 * (16 + 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(head_dim=5), r"expand \* width = 16 is not divisible by head_dim=5"),
        (dict(head_dim=4, A_min=2.0, A_max=1.0), "A_min=2.0 must be at most A_max=1.0"),
        (dict(head_dim=4, groups=3), r"4 heads .* must be a multiple of groups=3"),
    ],
)
def test_errors_name_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(**arguments).init(jax.random.key(0), jnp.zeros((1, 4, 8)), Context())
    with pytest.raises(ValueError, match="only a causal Mamba-2 decodes"):
        Mamba2(head_dim=4).init(jax.random.key(0), jnp.zeros((1, 4, 8)), Context(decode=True))
