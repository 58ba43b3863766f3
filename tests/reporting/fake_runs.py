"""Folders as train.py, eval.py and sweep.py leave them, without training anything; and a small table over them."""

import json
import math
import pathlib
import textwrap

from efficient_attn.reporting.summary import expected_config
from efficient_attn.tables import Cell, Table, load

TABLE = '''
"""Recall in miniature.

    python report.py --table=table.py
"""
from efficient_attn.tables import Cell, Metric, Protocol, published

TITLE = "Recall <in> miniature & more"
METRIC = Metric()
SCALES = {"paper": "as published", "cpu": "small enough for two cores"}
COLUMNS = ("L=64 d=32", "L=64 d=64")
PROTOCOLS = {
    "paper": Protocol("As published", COLUMNS, ("The test split selects.",), average=COLUMNS),
    "short": Protocol(
        "Short runs", COLUMNS, ("Validation selects.",), scale="cpu", average=COLUMNS, beside="paper",
        floors={column: {"chance": 1.6} for column in COLUMNS},
    ),
}
PUBLISHED = {
    "paper": published(COLUMNS, "Nobody et al. 2020, table 1", {"softmax": "99.0 98.50±0.20", "<b>s5</b>": "FAIL 36.4"})
}
ROWS = {"softmax": "softmax", "<b>s5</b>": "identity"}


def sweep(scale):
    for row, recipe in ROWS.items():
        for column, width in zip(COLUMNS, (32, 64)):
            for seed in range(3):
                yield Cell(
                    f"configs/quickstart.py:{recipe}", row, column, {"cpu": "short", "paper": "paper"}[scale],
                    {"model.width": width, "train.duration": "100 steps"}, seed=seed,
                )
'''


def write_table(folder: pathlib.Path, source: str = TABLE) -> Table:
    path = folder / "table.py"
    path.write_text(textwrap.dedent(source))
    return load(path)


def write_run(cell: Cell, root: pathlib.Path, accuracy: float = 0.5, steps: int = 100, points: int = 10) -> pathlib.Path:
    """A finished run whose accuracy rises to `accuracy`, which is also its test accuracy."""
    folder = cell.workdir(root)
    folder.mkdir(parents=True)
    info = {
        "argv": cell.command(root)[1:], "versions": {"python": "3.11.7", "jax": "0.10.2"}, "device_kind": "cpu",
        "device_count": 1, "cpu": "A <processor>", "cores": 2, "commit": "57d1e001a503965f", "dirty": False,
    }  # fmt: skip
    rates = {"steps_per_second": 20.0 + cell.seed, "tokens_per_second": 64 * (20.0 + cell.seed)}
    rows = []
    for i in range(1, points + 1):
        reached = accuracy * (1 - math.exp(-5 * i / points)) / (1 - math.exp(-5))
        rows.append({"step": i * steps // points, "train_loss": 1 - reached, "valid_accuracy": reached, **rates})
    score = {"data": "recall-64", "split": "test", "step": steps, "test_accuracy": accuracy, "valid_accuracy": accuracy}
    if cell.replicas > 1:
        score["test_accuracy_by_seed"] = score["valid_accuracy_by_seed"] = [accuracy] * cell.replicas
    run = {**info, "config": expected_config(cell), "data": "recall-64", "steps": steps}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.json").write_text(json.dumps(score))
    return folder
