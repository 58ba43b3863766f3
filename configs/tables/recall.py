"""Multi-query associative recall against width and state (Arora, Eyuboglu et al. 2023, "Zoology", arXiv 2312.04927, figure 2).

    python sweep.py --config=configs/tables/recall.py --scale=paper

Two layers without feed-forward read D key-value pairs and are asked for the values of all D keys. Published as a figure, so that
only what the text says of it can be put beside ours: attention solves every setting at every width; models of fixed state do
where the width grows with the length. Every learning rate of the paper's grid is trained, and validation chooses.
Expected time: 448 runs on 8 A100 (the paper's own sweep).
"""

from efficient_attn.tables import Cell, Metric, Protocol, published

TITLE = "Multi-query associative recall"
METRIC = Metric()
SCALES = {"paper": "Zoology, figure 2: lengths 64, 128, 256, vocabulary 8,192, 100,000 examples, 64 epochs."}

SETTINGS = ((64, 4, 512), (128, 8, 512), (256, 16, 256))
"""Length, pairs, batch."""
WIDTHS = (64, 128, 256, 512)
RATES = (1e-4, 4.6e-4, 2.2e-3, 1e-2)
ROWS = ("softmax", "s5")


def column(length: int, width: int) -> str:
    return f"L={length} d={width}"


COLUMNS = tuple(column(length, width) for length, _, _ in SETTINGS for width in WIDTHS)
PROTOCOLS = {
    "zoology": Protocol(
        "Zoology, figure 2", COLUMNS,
        ("There the test set also selects the learning rate; here a validation split does.",
         "Training ends when validation reaches 99 %."),
    )
}  # fmt: skip
PUBLISHED = {
    "zoology": published(
        COLUMNS,
        "Arora et al. 2023, arXiv 2312.04927, figure 2",
        {"softmax": (99.0,) * len(COLUMNS)},
        note="at least: it solves all",
    )
}


def sweep(scale: str = "paper"):
    for row in ROWS:
        for length, pairs, batch in SETTINGS:
            for width in WIDTHS:
                for rate in RATES:
                    overrides = {
                        "task.length": length, "task.num_pairs": pairs, "train.batch_size": batch, "model.width": width,
                        "optimizer.learning_rate": rate,
                    }  # fmt: skip
                    yield Cell(
                        f"configs/synthetic_recall.py:{row}",
                        row,
                        column(length, width),
                        "zoology",
                        overrides,
                        choice=f"lr={rate:g}",
                    )
