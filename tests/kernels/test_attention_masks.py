"""The mask algebra: what is allowed, and that what is said of a tile is true of every pair in it."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import tiles
from kernels.attention.masks import FULL, PARTIAL, SKIP, Causal, Full, Window

CAUSAL_WINDOW = Causal() & Window(5)
EXACT = [Full(), Causal(), Window(1), Window(6), ~Causal(), ~Window(4), ~Full()]
COMBINED = [CAUSAL_WINDOW, Causal() | Window(3), ~(CAUSAL_WINDOW | ~Window(9)), Window(12) & ~Window(4), Causal() & ~Causal()]


def pairs(mask, q_positions, kv_positions):
    return np.asarray(mask.allowed(q_positions[:, None], kv_positions[None, :]))


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (Full(), lambda q, k: True),
        (Causal(), lambda q, k: k <= q),
        (Window(3), lambda q, k: q - 3 < k < q + 3),
        (CAUSAL_WINDOW, lambda q, k: q - 5 < k <= q),
        (Causal() | Window(3), lambda q, k: k < q + 3),
        (~Causal(), lambda q, k: k > q),
    ],
)
def test_allowed_is_the_rule(mask, rule):
    q_positions, kv_positions = np.arange(-3, 9), np.arange(11)
    expected = [[rule(q, k) for k in kv_positions] for q in q_positions]
    np.testing.assert_array_equal(pairs(mask, q_positions, kv_positions), expected)
    np.testing.assert_array_equal(pairs(mask, jnp.asarray(q_positions), jnp.asarray(kv_positions)), expected)


@pytest.mark.parametrize("mask", EXACT + COMBINED, ids=str)
def test_a_tile_is_what_its_pairs_are(mask):
    """Exact for the named masks and their complements; for combinations never wrong, and right where one pair decides."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        q_lo, kv_lo = rng.integers(-20, 20, 2)
        q_size, kv_size = rng.integers(1, 12, 2)
        allowed = pairs(mask, np.arange(q_lo, q_lo + q_size), np.arange(kv_lo, kv_lo + kv_size))
        truth = FULL if allowed.all() else PARTIAL if allowed.any() else SKIP
        said = mask.tile(q_lo, q_lo + q_size - 1, kv_lo, kv_lo + kv_size - 1)
        assert said in ((truth,) if mask in EXACT or allowed.size == 1 else (truth, PARTIAL))


def test_tiles_of_a_sliding_window_are_those_it_touches():
    """256 positions in tiles of 16 x 32: causal window 33 needs the tiles between the diagonal and 33 keys before it."""
    mask, positions = Causal() & Window(33), np.arange(256)
    kinds = tiles.classify(mask, positions, positions, 16, 32)
    touched = pairs(mask, positions, positions).reshape(16, 16, 8, 32).any(axis=(1, 3))
    np.testing.assert_array_equal(kinds >= PARTIAL, touched)
    free, tested = tiles.split(kinds, needs_test=False)
    assert free.total + tested.total == touched.sum() < touched.size / 4
    for row in range(16):
        visited = [*free.columns[row, : free.counts[row]], *tested.columns[row, : tested.counts[row]]]
        assert sorted(visited) == list(np.flatnonzero(touched[row]))


def test_a_tile_that_needs_a_test_is_never_free():
    positions = np.arange(64)
    kinds = tiles.classify(Full(), positions, positions[:50], 16, 16)
    free, tested = tiles.split(kinds, needs_test=np.arange(4) == 3)
    assert kinds.shape == (4, 4) and free.total == 12 and tested.total == 4


def test_masks_are_values():
    assert hash(Causal() & Window(5)) == hash(CAUSAL_WINDOW) and Causal() & Window(5) == CAUSAL_WINDOW != Causal() & Window(6)


def test_a_window_holds_at_least_one_position():
    with pytest.raises(ValueError, match=r"Window\(size=0\).*use size >= 1"):
        Window(0)
