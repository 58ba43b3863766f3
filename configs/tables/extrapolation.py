"""Perplexity beyond the trained length, by what a model knows of positions (Press et al. 2021, ALiBi, arXiv 2108.12409).

    python sweep.py --config=configs/tables/extrapolation.py --scale=cpu      4 runs: twenty minutes on two free CPU cores
    python report.py --table=configs/tables/extrapolation.py --scale=paper

Published: 16 layers and 247 million parameters on WikiText-103, validation perplexity of non-overlapping windows. No recipe here
makes that model, so the paper's section has no runs. In miniature: two layers of width 64 on bytes of Python's standard library,
trained at 64 bytes, which ALiBi should carry to 512 and sinusoids should not.
"""

import math
from collections.abc import Iterator

from efficient_attn.tables import Cell, Metric, Protocol, published

TITLE = "Length extrapolation"
METRIC = Metric("test_loss", "bits per byte", scale=1 / math.log(2), better="min")
PERPLEXITY = Metric("test_perplexity", "perplexity", scale=1.0, better="min")
SCALES = {
    "paper": "WikiText-103, 247 million parameters; there are no runs of it here.",
    "cpu": "Bytes of Python's standard library, two layers of width 64, trained at 64 bytes, 800 steps of batch 32.",
}
COLUMNS = ("512", "532", "602", "3072", "15512")
CPU_LENGTHS = (32, 64, 128, 256, 512)
ROWS = ("sinusoidal", "rotary", "t5", "alibi")
PROTOCOLS = {
    "wikitext103": Protocol(
        "WikiText-103, as published", COLUMNS,
        ("Validation perplexity of non-overlapping windows; rows name the trained length, columns the tested one.",),
        metric=PERPLEXITY,
    ),
    "cpu-short": Protocol(
        "In miniature, trained at 64 bytes", tuple(map(str, CPU_LENGTHS)),
        ("The column is the length of the windows tested on; longer ones also give more context.", "Nothing of it is published."),
        scale="cpu",
    ),
}  # fmt: skip
PUBLISHED = {
    "wikitext103": published(COLUMNS, "Press et al. 2021, arXiv 2108.12409", {
        "sinusoidal, trained at 512": (None, 19.91, 20.40, None, 406.01),
        "sinusoidal, trained at 3072": (None, None, None, (18.67, 0.24), None),
        "rotary, trained at 3072": (None, None, None, 18.57, None),
        "t5, trained at 3072": (None, None, None, 18.01, None),
        "alibi, trained at 512": (19.73, None, None, 18.40, None),
        "alibi, trained at 1024": (None, None, None, 17.96, None),
        "alibi, trained at 3072": (None, None, None, 17.60, None),
    }),
}  # fmt: skip


def sweep(scale: str = "paper") -> Iterator[Cell]:
    if scale == "cpu":
        lengths = {str(n): n for n in CPU_LENGTHS if n != 64}
        for row in ROWS:
            yield Cell(
                f"configs/lm_text.py:{row}_short", row, "64", "cpu-short", {"train.tensorboard": False}, lengths=lengths
            )  # fmt: skip
