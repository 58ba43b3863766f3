"""Selective copying (Gu & Dao 2023, Mamba, arXiv 2312.00752, table 1): which layer remembers what, and not when.

    python sweep.py --config=configs/tables/selective_copying.py --scale=cpu      3 runs of 3 seeds: ten minutes on two free cores
    python sweep.py --config=configs/tables/selective_copying.py --scale=paper

Rows are the block's architecture and, where it is not the block's own, the layer in it. No time is published.
"""

from collections.abc import Iterator

from efficient_attn.tables import Cell, Metric, Protocol, published

TITLE = "Selective copying"
METRIC = Metric()
SCALES = {
    "paper": "16 data tokens among 4,096 positions, vocabulary 16, two layers of width 64, 400,000 steps of batch 64.",
    "cpu": "8 data tokens among 64 positions, two layers of width 64, 3,500 steps of batch 32, three seeds in one program.",
}
PROTOCOLS = {
    "mamba": Protocol(
        "Mamba's table 1", ("4096",),
        ("The paper does not say whether tokens or whole sequences are counted; here it is tokens.",
         "The state-space layers are causal. Constant learning rate 1e-4."),
        floors={"4096": {"any data token": 100 / 14}},
    ),
    "cpu-short": Protocol(
        "In miniature, trained at 64 positions", ("64", "128"),
        ("The column is the length of the test sequences; the learning rate is 2e-3.", "Nothing of it is published."),
        scale="cpu", floors={"64": {"any data token": 100 / 14}, "128": {"any data token": 100 / 14}},
    ),
}  # fmt: skip
PUBLISHED = {
    "mamba": published(("4096",), "Gu & Dao 2023, arXiv 2312.00752, table 1", {
        "s4": (18.3,), "s6": (97.0,), "h3 (s4)": (57.0,), "hyena": (30.1,), "h3 (s6)": (99.7,), "mamba (s4)": (56.4,),
        "mamba (hyena)": (28.4,), "mamba": (99.8,),
    }),
}  # fmt: skip
ROWS = {"paper": ("s4", "mamba"), "cpu": ("mamba", "s4d", "s5")}


def sweep(scale: str = "paper") -> Iterator[Cell]:
    for row in ROWS[scale]:
        recipe = f"configs/synthetic_copying.py:{row}"
        if scale == "paper":
            for seed in range(3):
                yield Cell(recipe, row, "4096", "mamba", seed=seed)
        else:
            yield Cell(f"{recipe}_short", row, "64", "cpu-short", {"train.tensorboard": False}, replicas=3, lengths={"128": 128})
