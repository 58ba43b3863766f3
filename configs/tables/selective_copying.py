"""Selective copying (Gu & Dao 2023, Mamba, arXiv 2312.00752, table 1): which layer remembers what, and not when.

    python sweep.py --config=configs/tables/selective_copying.py --scale=cpu      3 runs of 3 seeds: 19 minutes on half a core
    python sweep.py --config=configs/tables/selective_copying.py --scale=paper

Rows are the block's architecture and, where it is not the block's own, the layer in it. No time is published.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from efficient_attn.tables import Absent, Cell, Metric, Protocol, published

TITLE = "Selective copying"
METRIC = Metric()
SCALES = {
    "paper": "16 data tokens among 4,096 positions, vocabulary 16, two layers of width 64, 400,000 steps of batch 64.",
    "cpu": "8 data tokens among 32 positions, two layers of width 64, 2,000 steps of batch 32, three seeds in one program.",
}
CPU_COLUMNS = ("32", "64", "128")
PROTOCOLS = {
    "mamba": Protocol(
        "Mamba's table 1", ("4096",),
        ("The paper does not say whether tokens or whole sequences are counted; here it is tokens.",
         "The state-space layers are causal. Constant learning rate 1e-4."),
        floors={"4096": {"any data token": 100 / 14}},
        absent=(Absent("these blocks and layers are not in this project"),),
    ),
    "cpu-short": Protocol(
        "In miniature, trained at 32 positions", CPU_COLUMNS,
        ("The column is the length of the test sequences; the learning rate is 2e-3.",
         "mamba keeps 8 states a channel, s4d and s5 64. Nothing of it is published."),
        scale="cpu", floors={column: {"any data token": 100 / 14} for column in CPU_COLUMNS},
    ),
}  # fmt: skip
PUBLISHED = {
    "mamba": published(("4096",), "Gu & Dao 2023, arXiv 2312.00752, table 1", {
        "s4": "18.3", "s6": "97.0", "h3 (s4)": "57.0", "hyena": "30.1", "h3 (s6)": "99.7", "mamba (s4)": "56.4",
        "mamba (hyena)": "28.4", "mamba": "99.8",
    }),
}  # fmt: skip
CPU: Mapping[str, Any] = {
    "task.length": 32, "task.num_examples": 2000 * 32, "train.duration": "2000 steps", "train.eval_every": "200 steps",
    "train.tensorboard": False,
}  # fmt: skip
CPU_ROWS: Mapping[str, Mapping[str, Any]] = {"mamba": {"model.mixer.state_dim": 8}, "s4d": {}, "s5": {}}


def sweep(scale: str = "paper") -> Iterator[Cell]:
    if scale == "cpu":
        longer = {column: int(column) for column in CPU_COLUMNS[1:]}
        for row, own in CPU_ROWS.items():
            recipe = f"configs/synthetic_copying.py:{row}_short"
            yield Cell(recipe, row, CPU_COLUMNS[0], "cpu-short", {**CPU, **own}, replicas=3, lengths=longer)
        return
    for row in ("s4", "mamba"):
        for seed in range(3):
            yield Cell(f"configs/synthetic_copying.py:{row}", row, "4096", "mamba", seed=seed)
