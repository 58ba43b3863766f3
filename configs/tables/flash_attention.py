"""FlashAttention's Long Range Arena (Dao et al. 2022, arXiv 2205.14135, table 3): exact attention in tiles beside approximations.

    python sweep.py --config=configs/tables/flash_attention.py --scale=paper
    python -m benchmarks.lra_speed --out=results/cpu/lra_speed.json     what --scale=cpu shows: a step's time, no accuracy

The small protocol of Xiong et al. (2021), tuned by the paper. `flash_attention` is our chunked attention, the same function as
`transformer`, whose scores are one table; their accuracies differ by seeds alone, and what the row claims is its speed.
"""

from collections.abc import Iterator

from configs.tables import lra, lra_speed
from efficient_attn.tables import Absent, Cell, Metric, Protocol, published

TITLE = "FlashAttention's Long Range Arena"
METRIC = Metric()
SPEED = Metric("speed", "x the Transformer's", scale=1.0)
SCALES = {
    "paper": "Two layers of width 64, tasks at their full lengths.",
    "cpu": "A training step of one layer, width 64, batch 1, on two CPU cores: speed only.",
}
MEASURED_BY = lra_speed.MEASURED_BY
COLUMNS = lra.FIVE
CPU_COLUMNS = ("1K", "2K", "4K", "8K")
SOURCE = "Dao et al. 2022, arXiv 2205.14135, table 3"
PROTOCOLS = {
    "flash": Protocol(
        "Accuracy in the small protocol, as tuned by FlashAttention", COLUMNS,
        ("The average is over five tasks. The paper prints no learning rates: recipes have those of mlpen/Nystromformer.",
         lra.TEXT, lra.GREY),
        average=COLUMNS, floors={column: lra.FLOORS[column] for column in COLUMNS},
        absent=(Absent("its butterfly of blocks is not in this project", ("block_sparse_flash",)),
                Absent("the paper prints no window, and mlpen/Nystromformer has no such mixer", ("local",)),
                Absent("the paper prints no clusters and hashes, and mlpen/Nystromformer has no such mixer", ("smyrf",))),
    ),
    "flash-speed": Protocol(
        "Speed over the benchmark", ("all tasks",), ("Wall-clock time of training, on a GPU.",), metric=SPEED,
        absent=(Absent("the whole benchmark was not timed here; a step was, under --scale=cpu", word="not measured"),),
    ),
    "flash-speed-cpu": Protocol(
        "Speed of a training step on two CPU cores", CPU_COLUMNS,
        ("The column is the length. Not the paper's figure, which is of a GPU and of the whole benchmark.",),
        scale="cpu", metric=SPEED,
    ),
}  # fmt: skip
PUBLISHED = {
    "flash": published(COLUMNS, SOURCE, {
        "transformer": "36.0 63.6 81.6 42.3 72.7",
        "flash_attention": "37.6 63.9 81.4 43.5 72.7",
        "block_sparse_flash": "37.0 63.0 81.3 43.6 73.3",
        "linformer": "35.6 55.9 77.7 37.8 67.6",
        "linear_attention": "38.8 63.2 80.7 42.6 72.5",
        "performer": "36.8 63.6 82.2 42.1 69.9",
        "local": "36.1 60.2 76.7 40.6 66.6",
        "reformer": "36.5 63.8 78.5 39.6 69.4",
        "smyrf": "36.1 64.1 79.0 39.6 70.5",
    }),
    "flash-speed": published(("all tasks",), SOURCE, {
        "flash_attention": "2.4", "block_sparse_flash": "2.8", "linformer": "2.5", "linear_attention": "2.3",
        "performer": "1.8", "local": "1.7", "reformer": "1.3", "smyrf": "1.7",
    }),
}  # fmt: skip
MIXERS = {"flash_attention": "softmax", "local": "block_local"}
"""Rows whose mixer has another name in the benchmark."""


def measured(scale: str) -> dict[str, dict[str, dict[str, float]]]:
    if scale != "cpu":
        return {}
    found = lra_speed.measured("cpu")["speed-cpu"]
    rows = {row: found.get(MIXERS.get(row, row), {}) for row in PUBLISHED["flash"]}
    return {
        "flash-speed-cpu": {
            row: {c: value for c, value in cells.items() if c in CPU_COLUMNS} for row, cells in rows.items() if cells
        }
    }


def sweep(scale: str = "paper") -> Iterator[Cell]:
    if scale == "cpu":
        return
    recipes = {row: f"{row}_small" for row in PUBLISHED["flash"]} | {"flash_attention": "transformer_small"}
    for row, recipe in recipes.items():
        for column in COLUMNS:
            if recipe in lra.FILES[column].RECIPES:
                dense = {"model.mixer.implementation": "xla"} if row == "transformer" else {}
                for seed in lra.SEEDS:
                    yield Cell(lra.file_of(column, recipe), row, column, "flash", dense, seed=seed)
