"""RoPE and its variants against arrays of independent implementations, and against closed forms."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.positions import Places, rotary, scaling, truncation
from kernels.attention import attend, masks

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation


def _yarn(base, config, trained):
    names = {"beta_fast", "beta_slow", "truncate"} & config.keys()
    return scaling.YaRN(
        base=base, factor=config["factor"], trained_length=config["original_max_position_embeddings"],
        **{name: config[name] for name in names},
    )  # fmt: skip


MADE_FROM = {
    "default": lambda base, config, trained: rotary.Rotary(base=base),
    "linear": lambda base, config, trained: scaling.Linear(base=base, factor=config["factor"]),
    "dynamic": lambda base, config, trained: scaling.DynamicNTK(base=base, factor=config["factor"], trained_length=trained),
    "yarn": _yarn,
    "llama3": lambda base, config, trained: scaling.Llama3(
        base=base, factor=config["factor"], trained_length=config["original_max_position_embeddings"],
        low_freq_factor=config["low_freq_factor"], high_freq_factor=config["high_freq_factor"],
    ),
    "longrope": lambda base, config, trained: scaling.LongRoPE(
        base=base, factor=trained / config["original_max_position_embeddings"],
        trained_length=config["original_max_position_embeddings"],
        short_factor=config["short_factor"], long_factor=config["long_factor"],
    ),
}  # fmt: skip
"""A rope_type of the oracle's configurations -> the rotation, from (base, configuration, length in the configuration)."""


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    hyper = json.loads((oracle_dir / "rope_and_scaling.json").read_text())["hyper"]
    return np.load(oracle_dir / "rope_and_scaling.npz"), hyper


def made(hyper, variant):
    stated = hyper["variants"][variant]
    make = MADE_FROM[stated["config"]["rope_type"]]
    return make(hyper["theta"], stated["config"], stated["max_position_embeddings_in_config"])


def test_variants_of_the_oracle(oracle):
    """Frequencies, cos and sin with their magnitude, and turned queries and keys, of every variant that the arrays hold."""
    arrays, hyper = oracle
    positions = jnp.asarray(arrays["in.positions"])[None]
    length = positions[:, -1:] + 1
    variants = [name.split(".")[1] for name in arrays if name.endswith(".inv_freq")]
    assert set(variants) == set(hyper["variants"])
    for variant in variants:
        rotation = made(hyper, variant)
        frequencies = np.asarray(rotation.frequencies(hyper["head_dim"], length)).reshape(-1)
        np.testing.assert_allclose(frequencies, arrays[f"out.{variant}.inv_freq"], rtol=1e-5, err_msg=variant)
        angles = np.concatenate([np.asarray(positions)[0][:, None] * frequencies] * 2, axis=-1)
        for name, fn in (("cos", np.cos), ("sin", np.sin)):
            ours = rotation.magnitude(length) * fn(angles)
            np.testing.assert_allclose(ours, arrays[f"out.{variant}.{name}"], atol=TOLERANCE, err_msg=variant)
        for name in "qk":
            ours = rotation.rotate(jnp.asarray(np.moveaxis(arrays[f"in.{name}"], 1, 2)), positions, length)
            expected = np.moveaxis(arrays[f"out.{variant}.{name}"], 1, 2)
            np.testing.assert_allclose(ours, expected, atol=TOLERANCE, err_msg=variant)


def test_interleaved_pairs_of_the_oracle(oracle):
    arrays, hyper = oracle
    positions = jnp.asarray(arrays["in.positions"])[None]
    q = jnp.asarray(np.moveaxis(arrays["in.q"], 1, 2))
    ours = rotary.Rotary(base=hyper["theta"], interleaved=True).rotate(q, positions, positions[:, -1:] + 1)
    np.testing.assert_allclose(ours, np.moveaxis(arrays["out.interleaved.q"], 1, 2), atol=TOLERANCE)


def frequencies(rotation, head_dim=16, length=50):
    return np.asarray(rotation.frequencies(head_dim, jnp.full((1, 1), length))).reshape(-1)


def test_ntk_stretches_the_last_digit_exactly_and_is_a_change_of_base():
    """n / b'^(D/2-1) = (n/s) / b^(D/2-1) where b = base^(2/D): interpolation of the last digit, none of the first."""
    plain, ntk, s, D = rotary.Rotary(), scaling.NTK(factor=8.0), 8.0, 16
    np.testing.assert_allclose(frequencies(ntk)[-1], frequencies(plain)[-1] / s, rtol=1e-12)
    assert frequencies(ntk)[0] == frequencies(plain)[0] == 1
    np.testing.assert_allclose(frequencies(ntk), frequencies(rotary.Rotary(base=1e4 * s ** (D / (D - 2)))), rtol=1e-12)


def test_dynamic_ntk_goes_by_the_length():
    dynamic = scaling.DynamicNTK(factor=2.0, trained_length=50)
    np.testing.assert_allclose(frequencies(dynamic, length=20), frequencies(rotary.Rotary()), rtol=1e-6)
    for length in (75, 200):
        same = scaling.NTK(factor=2.0 * length / 50 - 1)
        np.testing.assert_allclose(frequencies(dynamic, length=length), frequencies(same), rtol=1e-5)


def test_longrope_goes_by_the_length():
    rotation = scaling.LongRoPE(
        factor=2.0, trained_length=50, short_factor=[1.0] * 8, long_factor=[float(n) for n in range(1, 9)]
    )
    np.testing.assert_allclose(frequencies(rotation, length=50), frequencies(rotary.Rotary()), rtol=1e-6)
    np.testing.assert_allclose(frequencies(rotation, length=51), frequencies(rotary.Rotary()) / np.arange(1, 9), rtol=1e-6)


def test_ntk_by_parts_interpolates_slow_pairs_and_keeps_fast_ones():
    rotation = scaling.NTKByParts(factor=4.0, trained_length=1000)
    ratio = frequencies(rotation, head_dim=64) / frequencies(rotary.Rotary(), head_dim=64)
    turns = 1000 * frequencies(rotary.Rotary(), head_dim=64) / (2 * math.pi)
    assert (np.diff(ratio) <= 0).all()
    np.testing.assert_allclose(ratio[turns > 45], 1)
    np.testing.assert_allclose(ratio[turns < 0.7], 0.25)
    yarn = scaling.YaRN(factor=4.0, trained_length=1000)
    np.testing.assert_array_equal(frequencies(yarn), frequencies(scaling.NTKByParts(factor=4.0, trained_length=1000)))
    assert yarn.magnitude(None) == 0.1 * math.log(4) + 1


def test_giraffe():
    theta = frequencies(rotary.Rotary())
    power = frequencies(scaling.GiraffePower(exponent=2.0))
    np.testing.assert_allclose(power, [t * (1 - i / 8) ** 2 for i, t in enumerate(theta)], rtol=1e-12)
    truncated = frequencies(scaling.GiraffeTruncated(low=theta[6], high=theta[2], middle=0.01))
    np.testing.assert_allclose(truncated, [*theta[:3], 0.01, 0.01, 0.01, 0, 0])


def inputs(L, heads=2, D=8, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(2, L, heads, D))) for _ in range(3))


def scores(rotation, places, q, k):
    """What the rotation makes of q . k: [B, H, L, S]."""
    return rotation.attend(lambda q, k, v: jnp.einsum("blhd,bshd->bhls", q, k), places, q, k, k)


def turned_scores(q, k, distance, gain=1.0, base=10_000.0):
    """Re sum_i q_i conj(k_i) exp(1j theta_i distance) gain_i, in complex NumPy; distance [L, S]."""
    half = q.shape[-1] // 2
    q, k = (np.asarray(x[..., :half]) + 1j * np.asarray(x[..., half:]) for x in (q, k))
    turn = np.exp(1j * np.asarray(distance)[..., None] * base ** (-np.arange(half) / half)) * gain
    return np.einsum("blhd,bshd,lsd->bhls", q, k.conj(), turn).real


def test_scores_depend_on_the_distance_alone():
    """The closed form of RoPE, unchanged by a shift of all positions (SHAPE), and equal for both layouts of pairs."""
    with jax.enable_x64(True):
        q, k, _ = inputs(11)
        places = Places.in_order(11, 11, causal=True)
        distance = np.arange(11)[:, None] - np.arange(11)[None]
        ours = scores(rotary.Rotary(), places, q, k)
        np.testing.assert_allclose(ours, turned_scores(q, k, distance), atol=1e-10)
        shifted = places.replace(q=places.q + 1000, kv=places.kv + 1000)
        np.testing.assert_allclose(scores(rotary.Rotary(), shifted, q, k), ours, atol=1e-10)
        order = np.arange(8).reshape(2, 4).T.reshape(-1)  # neighbours from halves
        mixed = scores(rotary.Rotary(interleaved=True), places, q[..., order], k[..., order])
        np.testing.assert_allclose(mixed, ours, atol=1e-10)


def test_xpos_decays_by_the_distance():
    with jax.enable_x64(True):
        q, k, _ = inputs(11)
        distance = np.arange(11)[:, None] - np.arange(11)[None]
        zeta = (np.arange(4) / 4 + 0.4) / 1.4
        ours = scores(rotary.XPos(scale_base=16.0), Places.in_order(11, 11, causal=True), q, k)
        gain = zeta ** (distance[..., None] / 16)
        np.testing.assert_allclose(ours, turned_scores(q, k, distance, gain), atol=1e-10)
        with pytest.raises(ValueError, match="set causal=True"):
            scores(rotary.XPos(), Places.in_order(11, 11, causal=False), q, k)


def test_xpos_stays_finite_at_any_positions():
    q, k, _ = inputs(16)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    order = Places.in_order(16, 16, causal=True)
    due = scores(rotary.XPos(), order, q, k)
    far = order.replace(q=order.q + 100_000, kv=order.kv + 100_000)
    np.testing.assert_allclose(scores(rotary.XPos(), far, q, k), due, atol=2e-2)  # angles in float32
    apart = order.replace(q=order.q * 10_000, kv=order.kv * 10_000)
    assert np.all(np.isfinite(np.tril(scores(rotary.XPos(), apart, q, k))))  # of earlier keys


DISTANCES = {
    "rerope": (truncation.ReRoPE(window=4), lambda i, j, d: 4),
    "leaky": (truncation.LeakyReRoPE(window=4, factor=3.0), lambda i, j, d: 4 + (d - 4) / 3),
    "self-extend": (truncation.SelfExtend(window=4, group=3), None),
}
"""Each method with its distance for d = |i - j| >= 4; self-extend's is that of groups, with a sign of its own."""


def two_scale_distance(far, i, j):
    d = abs(i - j)
    if d < 4:
        return i - j
    sign = np.sign(i - j)
    return i // 3 - j // 3 + sign * (4 - 4 // 3) if far is None else sign * far(i, j, d)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rotation", "far"), DISTANCES.values(), ids=DISTANCES)
def test_two_scales_of_distance(rotation, far, causal):
    """Softmax over scores at each pair's own distance, near and far."""
    with jax.enable_x64(True):
        q, k, v = inputs(13)
        distance = np.array([[two_scale_distance(far, i, j) for j in range(13)] for i in range(13)], float)
        mask = masks.Causal() if causal else masks.Full()
        places = Places.in_order(13, 13, causal=causal)
        ours, lse = jax.jit(
            lambda q, k, v: rotation.attend(attend, places, q, k, v, mask=mask, return_lse=True)
        )(q, k, v)  # fmt: skip
        s = turned_scores(q, k, distance) / math.sqrt(8)
        s = np.where(np.tril(np.ones((13, 13))) == 1, s, -np.inf) if causal else s
        weights = np.exp(s)
        np.testing.assert_allclose(np.moveaxis(np.asarray(lse), 1, 2), np.log(weights.sum(-1)), atol=1e-10)
        expected = np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), np.asarray(v))
        np.testing.assert_allclose(ours, expected, atol=1e-10)


@pytest.mark.parametrize(
    "rotation",
    [
        truncation.ReRoPE(window=13),
        truncation.LeakyReRoPE(window=13, factor=3.0),
        truncation.LeakyReRoPE(window=4, factor=1.0),
        truncation.SelfExtend(window=4, group=1),
    ],
    ids=["rerope", "leaky", "leaky, factor 1", "self-extend, group 1"],
)
def test_two_scales_are_rope_within_the_window(rotation):
    with jax.enable_x64(True):
        q, k, v = inputs(13)
        places = Places.in_order(13, 13, causal=True)
        plain, ours = (
            jax.jit(lambda q, k, v, r=r: r.attend(attend, places, q, k, v, mask=masks.Causal()))(q, k, v)
            for r in (rotary.Rotary(), rotation)
        )
        np.testing.assert_allclose(ours, plain, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scaling.Linear(factor=0.5), r"Linear\(factor=0.5\): give a factor of at least 1"),
        (lambda: rotary.Rotary(base=0.0), r"Rotary\(base=0.0\): give a number above 1"),
        (lambda: truncation.ReRoPE(window=0), r"ReRoPE\(window=0\): give a window of at least 1"),
        (lambda: scaling.Llama3(factor=2.0, trained_length=8, low_freq_factor=4.0), r"high_freq_factor=4.0\): give more than"),
        (
            lambda: scaling.LongRoPE(factor=2.0, trained_length=8, short_factor=[1.0], long_factor=[1.0] * 4).frequencies(8, 1),
            r"short_factor=\[1.0\]\): give head size / 2 = 4 numbers",
        ),
        (lambda: rotary.Rotary().rotate(jnp.zeros((1, 2, 1, 3)), jnp.zeros((1, 2)), jnp.ones((1, 1), int)), "even head size"),
    ],
)  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
