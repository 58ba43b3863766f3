"""The mask algebra: what is allowed, and that what is said of a tile is true of every pair in it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attend, masks, tiles
from kernels.attention.masks import (
    FULL,
    PARTIAL,
    SKIP,
    Band,
    BlockLocal,
    Blocks,
    Causal,
    Fixed,
    Full,
    Global,
    GlobalKeys,
    Local1D,
    Local2D,
    PerHead,
    Predicate,
    Strided,
    Window,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

SCATTERED = tuple(range(0, 40, 2))  # more runs than are told by comparisons
TABLE = ((0, 2), (), (1, 3, 4), (3,))


def in_2d_memory(q, k):
    """Local2D(5, 7, 2, 3, 1, 2) spelt out on rows and columns."""
    if not (0 <= q < 35 and 0 <= k < 35):
        return False
    top, left = q // 7 // 2 * 2, q % 7 // 3 * 3
    return top - 1 <= k // 7 < top + 2 and left - 2 <= k % 7 < left + 5


RULES = {
    Full(): lambda q, k: True,
    Causal(): lambda q, k: k <= q,
    Window(1): lambda q, k: q == k,
    Window(6): lambda q, k: q - 6 < k < q + 6,
    Window(3, dilation=4): lambda q, k: k - q in (-8, -4, 0, 4, 8),
    Band(5, 0): lambda q, k: q - 5 <= k <= q,
    Band(2, 7): lambda q, k: q - 2 <= k <= q + 7,
    Band(9, -2): lambda q, k: q - 9 <= k <= q - 2,
    Band(7, 3, dilation=3): lambda q, k: k - q in (-6, -3, 0, 3),
    Strided(1): lambda q, k: True,
    Strided(5): lambda q, k: (q - k) % 5 == 0,
    Fixed(6, 2): lambda q, k: k % 6 in (4, 5),
    Fixed(6, 2, shift=2): lambda q, k: k % 6 in (0, 1),
    Fixed(4, 4): lambda q, k: True,
    Global((0,)): lambda q, k: q == 0 or k == 0,
    Global((3, 4, 5, 11)): lambda q, k: q in (3, 4, 5, 11) or k in (3, 4, 5, 11),
    Global(SCATTERED): lambda q, k: q in SCATTERED or k in SCATTERED,
    GlobalKeys((2, 7)): lambda q, k: k in (2, 7),
    GlobalKeys(SCATTERED): lambda q, k: k in SCATTERED,
    BlockLocal(4): lambda q, k: q // 4 == k // 4,
    BlockLocal(3, before=2, after=1): lambda q, k: q // 3 - 2 <= k // 3 <= q // 3 + 1,
    Blocks(5, TABLE): lambda q, k: 0 <= q // 5 < 4 and k // 5 in TABLE[q // 5],
    Blocks(5, ((1, 2**27), (), (0, 3))): lambda q, k: (q // 5, k // 5) in ((0, 1), (2, 0), (2, 3)),
    Local1D(4, 6): lambda q, k: q // 4 * 4 - 6 <= k < q // 4 * 4 + 4,
    Local2D(5, 7, 2, 3, 1, 2): in_2d_memory,
}
EXACT = [*RULES, *(~mask for mask in RULES)]
CAUSAL_WINDOW = Causal() & Window(5)
COMBINED = {
    CAUSAL_WINDOW: lambda q, k: q - 5 < k <= q,
    Causal() | Window(3): lambda q, k: k < q + 3,
    ~(CAUSAL_WINDOW | ~Window(9)): lambda q, k: not q - 5 < k <= q and abs(q - k) < 9,
    Causal() & ~Causal(): lambda q, k: False,
    Causal() & (Band(4, 0) | Strided(4)): lambda q, k: k <= q and (q - k <= 4 or (q - k) % 4 == 0),
    Predicate(lambda q, k: k % 3 == 1): lambda q, k: k % 3 == 1,
    Predicate(lambda q, k: jnp.maximum(q, k) < 4): lambda q, k: max(q, k) < 4,
}


def pairs(mask, q_positions, kv_positions):
    return np.asarray(mask.allowed(q_positions[:, None], kv_positions[None, :]))


def truth(allowed):
    return FULL if allowed.all() else PARTIAL if allowed.any() else SKIP


def label(value) -> str:
    """The name of a parameter in a test's name: without the addresses of functions, which differ from process to process."""
    return re.sub(r"<function (\S+) at 0x\w+>", r"\1", str(value))


@pytest.mark.parametrize(("mask", "rule"), [*RULES.items(), *COMBINED.items()], ids=label)
def test_allowed_is_the_rule(mask, rule):
    q_positions, kv_positions = np.arange(-9, 43), np.arange(-3, 45)
    expected = [[rule(q, k) for k in kv_positions.tolist()] for q in q_positions.tolist()]
    np.testing.assert_array_equal(pairs(mask, q_positions, kv_positions), expected)
    traced = jax.jit(lambda q, k: mask.allowed(q[:, None], k[None, :]))(q_positions, kv_positions)
    np.testing.assert_array_equal(traced, expected)
    np.testing.assert_array_equal(pairs(~mask, q_positions, kv_positions), ~np.array(expected))


@pytest.mark.parametrize("mask", [*EXACT, *COMBINED], ids=label)
def test_a_tile_is_what_its_pairs_are(mask):
    """Exact for the named masks and their complements; for combinations never wrong."""
    rng = np.random.default_rng(0)
    lo = rng.integers(-12, 40, (2, 400))
    hi = lo + rng.integers(0, rng.choice([1, 3, 12, 30], (2, 400)))
    said = np.broadcast_to(mask.tile(lo[0], hi[0], lo[1], hi[1]), 400)
    allowed = pairs(mask, np.arange(-12, 70), np.arange(-12, 70))
    for i, ((q_lo, kv_lo), (q_hi, kv_hi)) in enumerate(zip(lo.T + 12, hi.T + 13)):
        expected = truth(allowed[q_lo:q_hi, kv_lo:kv_hi])
        assert said[i] in ((expected,) if mask.exact else (expected, PARTIAL)), (lo[:, i], hi[:, i])
    assert mask.exact == (mask in EXACT)


@pytest.mark.parametrize("mask", [*COMBINED, Strided(5), Blocks(5, TABLE), Predicate(lambda q, k: k <= q)], ids=label)
@pytest.mark.parametrize(("L", "S"), [(40, 40), (30, 47), (50, 33)])
def test_tables_are_exact(mask, L, S):
    """For combinations and predicates too, also where the last tiles are cut short."""
    kinds = jax.jit(lambda: jnp.asarray(tiles.tables(mask, L, S, 8, 16)))()  # while something else is traced, as in `attend`
    allowed = pairs(mask, np.arange(S - L, S), np.arange(S))
    rows, columns = range(0, L, 8), range(0, S, 16)
    assert kinds.tolist() == [[[truth(allowed[r : r + 8, c : c + 16]) for c in columns] for r in rows]]


@pytest.mark.parametrize("mask", [Predicate(lambda q, k: (q - k) % 97 < 80), Predicate(lambda q, k: (q < 333) & (k < 333))])
@pytest.mark.parametrize(("q_tile", "kv_tile"), [(128, 64), (64, 32), (50, 333)])
def test_tables_of_larger_tiles_are_exact(mask, q_tile, kv_tile):
    """Where they are made up of smaller ones, and where not; the second mask ends where the sequence does."""
    allowed = pairs(mask, np.arange(33, 333), np.arange(333))
    rows, columns = range(0, 300, q_tile), range(0, 333, kv_tile)
    expected = [[truth(allowed[r : r + q_tile, c : c + kv_tile]) for c in columns] for r in rows]
    assert tiles.tables(mask, 300, 333, q_tile, kv_tile).tolist() == [expected]


def test_tables_of_too_many_pairs_stay_conservative(monkeypatch):
    monkeypatch.setattr(tiles, "PAIRS_LOOKED_AT", 0)
    mask = Causal() & Predicate(lambda q, k: k >= 0)
    assert tiles.tables(mask, 64, 64, 16, 16)[0].tolist() == np.tri(4, dtype=int).tolist()


def test_tables_of_heads_that_differ():
    kinds = tiles.tables(PerHead((Causal(), Window(3), Causal())), 32, 32, 8, 8)
    assert kinds.shape == (3, 4, 4)
    assert (kinds[0] == kinds[2]).all() and (kinds[1] == tiles.tables(Window(3), 32, 32, 8, 8)[0]).all()
    assert tiles.tables(PerHead((Causal(), Causal())), 32, 32, 8, 8).shape == (1, 4, 4)


def test_lists_name_the_tiles_to_visit():
    """256 positions in tiles of 16 x 32, causal window 33: the tiles between the diagonal and 33 keys before it."""
    mask, positions = Causal() & Window(33), np.arange(256)
    kinds = tiles.tables(mask, 256, 256, 16, 32)
    touched = pairs(mask, positions, positions).reshape(16, 16, 8, 32).any(axis=(1, 3))
    free, tested = tiles.split(kinds, needs_test=False)
    assert free.total + tested.total == touched.sum() < touched.size / 4
    for row in range(16):
        visited = [*free.columns[0, row, : free.counts[0, row]], *tested.columns[0, row, : tested.counts[0, row]]]
        assert sorted(visited) == list(np.flatnonzero(touched[row]))
    by_column = tiles.listed((kinds >= PARTIAL).swapaxes(1, 2))
    for column in range(8):
        assert list(by_column.columns[0, column, : by_column.counts[0, column]]) == list(np.flatnonzero(touched[:, column]))


def test_lists_of_several_columns_a_visit():
    """Whole visits of full tiles go untested; what fills up a visit is the last column, marked as not to be counted."""
    kinds = np.array([[[2, 1, 2, 0, 2, 2], [0, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0]]], np.int8)
    free, tested = tiles.split(kinds, needs_test=False, size=3)
    assert free.counts.tolist() == [[1, 0, 0]] and tested.counts.tolist() == [[1, 1, 0]]
    assert free.columns[0, 0, :3].tolist() == [0, 2, 4]
    assert tested.columns[0, :2, :3].tolist() == [[1, 5, ~5], [3, ~3, ~3]]
    assert free.columns.shape[2] == tested.columns.shape[2] == 6


def test_lists_of_runs():
    """Runs of 3 from the left, over what is wanted and what happens to lie between; untested where all three are full."""
    kinds = np.array([[[2, 0, 1, 0, 2, 2, 2], [0, 0, 0, 0, 0, 0, 2], [2, 2, 2, 2, 2, 2, 2]]], np.int8)
    free, tested = tiles.split_runs(kinds, needs_test=False, length=3)
    assert free.counts.tolist() == [[1, 0, 2]] and tested.counts.tolist() == [[1, 1, 1]]
    assert free.columns[0, 0, 0] == 4 and free.columns[0, 2, :2].tolist() == [0, 3]
    assert tested.columns[0, :, 0].tolist() == [0, 6, 6]


def test_a_tile_that_needs_a_test_is_never_free():
    kinds = tiles.tables(Full(), 64, 50, 16, 16)
    free, tested = tiles.split(kinds, needs_test=np.arange(4) == 3)
    assert kinds.shape == (1, 4, 4) and free.total == 12 and tested.total == 4


def test_masks_are_values():
    assert hash(Causal() & Window(5)) == hash(CAUSAL_WINDOW) and Causal() & Window(5) == CAUSAL_WINDOW != Causal() & Window(6)
    assert Global(range(3)) == Global((2, 1, 0, 1)) != GlobalKeys((0, 1, 2)) and hash(Global(range(3))) == hash(Global((0, 1, 2)))
    assert Blocks(4, [[1, 0], []]) == Blocks(4, ((0, 1), ())) and hash(Blocks(4, [[1, 0]])) == hash(Blocks(4, ((0, 1),)))
    assert len({*RULES}) == len(RULES)


def test_operators_go_to_each_head():
    a, b = Window(3), Strided(4)
    assert PerHead((a, b)) & Causal() == PerHead((a & Causal(), b & Causal()))
    assert Causal() | PerHead((a, b)) == PerHead((Causal() | a, Causal() | b))
    assert PerHead((a, b)) & PerHead((b, a)) == PerHead((a & b, b & a)) and ~PerHead((a, b)) == PerHead((~a, ~b))
    assert masks.of_heads(PerHead((a, b))) == (a, b)
    assert masks.of_heads(a) == masks.of_heads(PerHead((a, a))) == (a,)
    with pytest.raises(ValueError, match="masks of 2 and 3 heads cannot be combined"):
        PerHead((a, b)) & PerHead((a, b, a))
    with pytest.raises(TypeError, match="of_heads"):
        PerHead((a, b)).allowed(np.arange(3), np.arange(3))


def test_what_needs_a_table():
    for mask in RULES:
        assert mask.needs_table == (mask in (Global(SCATTERED), GlobalKeys(SCATTERED)) or isinstance(mask, Blocks))
    assert (Causal() & ~Blocks(5, TABLE)).needs_table and PerHead((Causal(), Blocks(5, TABLE))).needs_table
    assert not (Causal() & ~Window(3)).needs_table


def test_sparse_transformer_reaches_everything_in_two_steps():
    """Child et al. 2019, section 4.2: for every j <= i some k is seen by i in one pattern and sees j in the other."""
    positions, causal = np.arange(48), np.tri(48, dtype=bool)
    for first, second in [(Band(7, 0), Strided(7)), (BlockLocal(7), Fixed(7, 2))]:
        a, b = (pairs(Causal() & mask, positions, positions) for mask in (first, second))
        np.testing.assert_array_equal(a | (b.astype(int) @ a > 0), causal)


def test_random_blocks_are_drawn_outside_what_is_excluded():
    rest = BlockLocal(4, 1, 1) | Global((0, 1, 2, 3))
    drawn = masks.random_blocks(4, 16, 3, seed=0, exclude=rest)
    assert drawn == masks.random_blocks(4, 16, 3, seed=0, exclude=rest) != masks.random_blocks(4, 16, 3, seed=1, exclude=rest)
    for i, row in enumerate(drawn.table):
        assert len(row) == (0 if i == 0 else 3) and not {0, i - 1, i, i + 1} & set(row)
    both = pairs(drawn & rest, np.arange(64), np.arange(64))
    assert not both.any()
    causal = masks.random_blocks(4, 16, 3, seed=0, exclude=~Causal())
    assert all(max(row, default=-1) < i and len(row) == min(i, 3) for i, row in enumerate(causal.table))


def test_builders_of_blocks():
    assert masks.permuted(4, (2, 0, 1)).table == ((2,), (0,), (1,))
    assert masks.butterfly(4, 8).table[5] == (1, 4, 5, 7)
    assert masks.butterfly(4, 6).table[5] == (1, 4, 5) and masks.butterfly(4, 1).table == ((0,),)
    reach = pairs(masks.butterfly(1, 16), np.arange(16), np.arange(16)).astype(int)
    assert (np.linalg.matrix_power(reach, 4) > 0).all() and not (np.linalg.matrix_power(reach, 3) > 0).all()


BAD = {
    "no window": (lambda: Window(0), r"Window\(size=0, dilation=1\).*use size >= 1"),
    "empty band": (lambda: Band(2, -3), r"Band\(before=2, after=-3.*use before >= -after"),
    "stride": (lambda: Strided(0), "use stride >= 1"),
    "columns": (lambda: Fixed(8, 4, 2), r"shift=2.*use .*\(shift \+ 1\) width <= stride"),
    "no positions": (lambda: Global(()), "give at least one"),
    "negative position": (lambda: GlobalKeys((-1, 2)), r"positions \(-1, 2\).*none of them negative"),
    "blocks": (lambda: BlockLocal(4, before=-1), "before >= 0"),
    "table": (lambda: Blocks(4, ((0,), (-1,))), "blocks >= 0"),
    "far block": (lambda: Blocks(4, ((0,), (2**30,))), "block 1073741824 begins after position 1073741824"),
    "no permutation": (lambda: masks.permuted(4, (0, 0)), "each of 0 ... 1 must occur once"),
    "local 1D": (lambda: Local1D(0, 4), "query_block >= 1"),
    "local 2D": (lambda: Local2D(4, 4, 0, 2, 1, 1), "query rectangles must be >= 1"),
    "heads in heads": (lambda: PerHead((PerHead((Causal(),)),)), "one mask for each head"),
    "predicate": (lambda: Predicate(lambda q, k: q - k).allowed(np.arange(3), np.arange(3)), "fn gave int32; booleans"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_masks_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


MISFITS = {
    PerHead((Causal(),) * 3): "PerHead holds 3 masks, one for each head; the queries have 4 heads",
    Causal() & Global((0, 9)): "Global has position 9; the positions of 8 queries and 8 keys end before it",
    ~GlobalKeys((8,)): "GlobalKeys has position 8",
    Blocks(4, ((0,),)): "Blocks(size=4) has 1 query blocks and key blocks up to 0; 8 queries and 8 keys make 2 query blocks",
    Blocks(4, ((0,), (2,))): "key blocks up to 2; 8 queries and 8 keys make 2 query blocks and key blocks up to 1",
    PerHead((Causal(), Local2D(3, 3, 1, 1, 1, 1)) * 2): "is for 9 positions, height x width; there are 8 queries and 8 keys",
}


@pytest.mark.parametrize(("mask", "message"), MISFITS.items(), ids=label)
def test_masks_that_do_not_fit_the_call(mask, message):
    x = jnp.zeros((1, 8, 4, 2))
    with pytest.raises(ValueError, match=f"attend: mask: .*{re.escape(message)}"):
        attend(x, x, x, mask=mask)


@pytest.mark.parametrize(
    "mask",
    [
        Band(2**30, 2**30),
        Window(2**30),
        BlockLocal(2**30, 2**30),
        Local1D(2**30, 2**30),
        Local2D(2, 2, 2**30, 2**30, 2**30, 2**30),
    ],
    ids=repr,
)
def test_the_largest_fields_do_not_overflow(mask):
    positions = np.arange(4, dtype=np.int32)
    assert np.asarray(mask.allowed(jnp.asarray(positions)[:, None], jnp.asarray(positions)[None])).all()


FAR = 2**30 - 2**26


@pytest.mark.parametrize(
    ("mask", "expected"),
    [(Blocks(1, ((0, FAR),)), [True, False, True]), (GlobalKeys(range(7, FAR + 8, 2**26)), [False, True, False])],
    ids=["blocks", "keys"],
)
def test_far_numbers_cost_no_memory(mask, expected):
    """Neither before tracing nor in what is compiled: tables are as long as what is listed."""
    positions = np.array([0, 7, FAR], np.int32)
    np.testing.assert_array_equal(mask.allowed(positions[:1], positions), expected)
    np.testing.assert_array_equal(mask.tile(0, 0, positions, positions) == FULL, expected)
    constants = jax.make_jaxpr(lambda keys: mask.allowed(keys[:1] * 0, keys))(positions).consts
    assert mask.needs_table and sum(np.size(constant) for constant in constants) < 100
