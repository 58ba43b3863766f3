"""Induction heads against length (Gu & Dao 2023, Mamba, arXiv 2312.00752, table 11): trained at 256, tested from 64 to a million.

    python sweep.py --config=configs/tables/induction.py --scale=cpu       3 runs of 3 seeds: 19 minutes on half a core
    python sweep.py --config=configs/tables/induction.py --scale=paper

Published are the best of several learning rates; chance is 1/16. No time is published.
"""

from collections.abc import Iterator

from efficient_attn.tables import Absent, Cell, Metric, Protocol, published

TITLE = "Induction heads against length"
METRIC = Metric()
SCALES = {
    "paper": "Trained at 256 tokens of a vocabulary of 16, two layers, batch 8, 8,192 steps an epoch, 25 or 50 epochs.",
    "cpu": "Trained at 64 tokens, two layers of width 32, 2,500 steps of batch 32, three seeds in one program.",
}
LENGTHS = tuple(2**power for power in range(6, 21))
TESTED = tuple(n for n in LENGTHS if n <= 2**14)
CPU_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
COLUMNS = tuple(map(str, LENGTHS))
PROTOCOLS = {
    "mamba": Protocol(
        "Mamba's table 11", COLUMNS,
        ("The column is the length of the test sequences; all are trained at 256.",
         "Learning rates: 1e-3 for Mamba, 2e-4 for the others, each the best of the paper's grid."),
        floors={column: {"chance": 6.25} for column in COLUMNS},
        absent=(Absent("these layers are not in this project", ("h3", "hyena")),
                Absent("its positions have no parameters beyond the trained length", ("softmax (absolute)",), "not scored"),
                Absent("the test sequences here have at most 16,384 tokens", COLUMNS[len(TESTED):], "not scored")),
    ),
    "cpu-short": Protocol(
        "In miniature, trained at 64", tuple(map(str, CPU_LENGTHS)),
        ("The column is the length of the test sequences.", "Nothing of it is published."),
        scale="cpu", floors={str(n): {"any regular token": 100 / 15} for n in CPU_LENGTHS},
    ),
}  # fmt: skip
PUBLISHED = {
    "mamba": published(COLUMNS, "Gu & Dao 2023, arXiv 2312.00752, table 11", {
        "softmax (absolute)": "100 99.6 100 58.6 26.6 18.8 9.8 10.9 7.8 OOM - - - - -",
        "softmax (rotary)": "100 100 100 83.6 31.3 18.4 8.6 9.0 5.5 OOM - - - - -",
        "softmax (xpos)": "100 100 100 99.6 67.6 25.4 7.0 9.0 7.8 OOM - - - - -",
        "h3": "100 100 100 80.9 39.5 23.8 14.8 8.2 5.9 6.6 8.2 4.7 8.2 6.3 7.4",
        "hyena": "97.7 100 100 100 44.1 12.5 6.6 5.1 7.0 5.9 6.6 6.6 5.9 6.3 9.8",
        "mamba": "100 " * 15,
    }),
}  # fmt: skip


def _cell(recipe: str, row: str, trained: int, lengths: tuple[int, ...], protocol: str, **seeds: int) -> Cell:
    elsewhere = {str(n): n for n in lengths if n != trained}
    return Cell(
        f"configs/synthetic_induction.py:{recipe}", row, str(trained), protocol, {"train.tensorboard": False}, lengths=elsewhere,
        **seeds,
    )  # fmt: skip


def sweep(scale: str = "paper") -> Iterator[Cell]:
    if scale == "cpu":
        for row in ("mamba", "s4d", "s5"):
            yield _cell(f"{row}_short", row, 64, CPU_LENGTHS, "cpu-short", replicas=3)
        return
    for seed in range(3):
        yield _cell("softmax_absolute", "softmax (absolute)", 256, (256,), "mamba", seed=seed)
        yield _cell("softmax", "softmax (rotary)", 256, TESTED, "mamba", seed=seed)
        yield _cell("softmax_xpos", "softmax (xpos)", 256, TESTED, "mamba", seed=seed)
        yield _cell("mamba", "mamba", 256, TESTED, "mamba", seed=seed)
