"""Multi-query associative recall against width and state (Arora, Eyuboglu et al. 2023, "Zoology", arXiv 2312.04927, figure 2).

    python sweep.py --config=configs/tables/recall.py --scale=cpu       36 runs of 3 seeds, an hour and a quarter on two cores
    python sweep.py --config=configs/tables/recall.py --scale=paper

Two layers without feed-forward read D key-value pairs and are asked for the values of all D keys. Published as a figure, so that
only what the text says of it can be put beside ours: attention solves every setting at every width; models of fixed state need
widths that grow with the length. Every learning rate of a stated grid is trained, because recurrent models have a narrow window,
and the mean validation accuracy of the seeds chooses among them.
Expected time of the paper's own sweep: 448 runs on 8 A100.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from efficient_attn.tables import Cell, Metric, Protocol, published

TITLE = "Multi-query associative recall"
METRIC = Metric()
SCALES = {
    "paper": "Zoology, figure 2: lengths 64, 128, 256 with 4, 8, 16 pairs, vocabulary 8,192, 100,000 examples, 64 epochs.",
    "cpu": "Length 16 with 4 pairs, vocabulary 32, at most 3,000 or 10,000 steps of batch 32, three seeds in one program.",
}
ROWS = ("softmax", "linear_attention", "s4d", "s5", "mamba", "mamba2")

SETTINGS = ((64, 4, 512), (128, 8, 512), (256, 16, 256))
"""Length, pairs, batch of the paper's."""
WIDTHS = (64, 128, 256, 512)
RATES = (1e-4, 4.6e-4, 2.2e-3, 1e-2)

CPU_WIDTHS = (16, 32)
CPU_RATES = (3e-3, 1e-2)
CPU: Mapping[str, Any] = {
    "task.length": 16, "task.num_pairs": 4, "task.vocab_size": 32, "task.num_examples": 1_000_000, "task.num_eval": 512,
    "model.embed_stddev": 1.0, "optimizer.warmup": "50 steps", "optimizer.clip_norm": 1.0, "train.batch_size": 32,
    "train.eval_batch_size": 128, "train.eval_every": "100 steps", "train.log_every": 100,
    "train.tensorboard": False,
}  # fmt: skip
CPU_ROWS: Mapping[str, Mapping[str, Any]] = {"softmax": {"model.mixer.dropout": 0.0}, "mamba2": {"model.mixer.state_dim": 16}}
"""What differs by row: no dropout where no example repeats; both Mambas with 16 states a channel."""


def column(length: int, width: int) -> str:
    return f"L={length} d={width}"


COLUMNS = tuple(column(length, width) for length, _, _ in SETTINGS for width in WIDTHS)
CPU_COLUMNS = tuple(f"d={width}" for width in CPU_WIDTHS)
CPU_FLOORS = {name: {"any value": 100 / 16, "any value of the example": 25.0} for name in CPU_COLUMNS}
LONG_ROWS = ("s4d", "s5", "mamba")
"""Those that 3,000 steps leave below 99 % at every width."""
EARLY = "Training ends when the validation accuracy of all seeds is 99 %."
PROTOCOLS = {
    "zoology": Protocol(
        "Zoology, figure 2", COLUMNS,
        ("There the test set also selects the learning rate; here a validation split does.", EARLY,
         "Learning rates 1e-4, 4.6e-4, 2.2e-3, 1e-2."),
    ),
    "cpu-short": Protocol(
        "In miniature, on two CPU cores", CPU_COLUMNS,
        ("Length 16, 4 pairs, vocabulary 32 (15 keys, 16 values), at most 3,000 steps of batch 32: nothing of it is published.",
         EARLY,
         "Learning rates 3e-3 and 1e-2; the better on validation is shown.",
         "mamba and mamba2 keep 16 states a channel, s4d and s5 64, linear attention d x (d + 1) numbers a layer."),
        scale="cpu", floors=CPU_FLOORS,
    ),
    "cpu-long": Protocol(
        "In miniature, trained for longer", CPU_COLUMNS,
        ("As above, but for at most 10,000 steps: is it the state, or the time, that was missing?", EARLY,
         "Learning rates 3e-3 and 1e-2; the better on validation is shown."),
        scale="cpu", floors=CPU_FLOORS,
    ),
}  # fmt: skip
PUBLISHED = {
    "zoology": published(
        COLUMNS,
        "Arora et al. 2023, arXiv 2312.04927, figure 2",
        {"softmax": "≥99 " * len(COLUMNS)},
        notes=dict.fromkeys(COLUMNS, "attention is said to solve all settings"),
    )
}


def paper() -> Iterator[Cell]:
    for row in ROWS:
        for length, pairs, batch in SETTINGS:
            task = {"task.length": length, "task.num_pairs": pairs, "train.batch_size": batch}
            for width in WIDTHS:
                for rate in RATES:
                    overrides = {**task, "model.width": width, "optimizer.learning_rate": rate}
                    yield Cell(_recipe(row), row, column(length, width), "zoology", overrides, choice=f"lr={rate:g}")


def cpu() -> Iterator[Cell]:
    for protocol, rows, steps in (("cpu-short", ROWS, 3_000), ("cpu-long", LONG_ROWS, 10_000)):
        for width in CPU_WIDTHS:
            for row in rows:
                for rate in CPU_RATES:
                    sizes = {"model.width": width, "optimizer.learning_rate": rate, "train.duration": f"{steps} steps"}
                    overrides = {**CPU, **CPU_ROWS.get(row, {}), **sizes}
                    yield Cell(_recipe(row), row, f"d={width}", protocol, overrides, replicas=3, choice=f"lr={rate:g}")


def _recipe(row: str) -> str:
    return f"configs/synthetic_recall.py:{row}"


def sweep(scale: str = "paper") -> Iterator[Cell]:
    return {"paper": paper, "cpu": cpu}[scale]()
