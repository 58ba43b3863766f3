"""The decode kernel: right in JAX's interpreter with keys in a row and in blocks, lowered for an H200, cut to fill one.

On a GPU of compute capability 9.0, `JAX_PLATFORMS=cuda python -m benchmarks.decode_numerics` runs the whole table compiled.
"""

import functools

import pytest

from kernels.attention import numerics
from kernels.attention.mosaic import decode
from kernels.attention.numerics import Case

BLOCKS = decode.Blocks(64, 2, 1)
INTERPRETED = {
    "in a row: a chunk of ragged rows, grouped heads, two consumers, more parts than tiles": (
        Case(3, 192, 64, "causal", B=2, H=2, G=1, ragged=True),
        0,
        decode.Options(decode.Blocks(64, 2, 2), splits=2),
    ),
    "blocks smaller than a tile, an empty row, soft-cap": (
        Case(1, 128, 64, "causal", B=3, H=2, G=1, softcap=3.0, ragged=True),
        16,
        decode.Options(BLOCKS, splits=1),
    ),
    "blocks larger than a tile": (Case(1, 256, 64, "causal", H=1, G=1), 128, decode.Options(BLOCKS, splits=3)),
}


@pytest.mark.parametrize(("case", "block_size", "options"), INTERPRETED.values(), ids=INTERPRETED)
def test_meets_the_criterion_interpreted(case, block_size, options, quick_compile):
    run = functools.partial(decode.attend_blocks, options=options)
    run = numerics.in_blocks(run, block_size) if block_size else functools.partial(decode.attend, options=options)
    found = numerics.check(run, case, runs=1, forward_only=True)
    assert found["passed"], found
