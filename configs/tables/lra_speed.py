"""Long Range Arena's efficiency protocol (Tay et al. 2020, arXiv 2011.04006, table 2): cost of a training step against length.

    python -m benchmarks.lra_speed --out=results/cpu/lra_speed.json     every mixer, 1K to 16K tokens; resumable

Byte-level text classification, lengths 1K, 2K, 3K, 4K as published, and on to 8K and 16K; speed and peak memory of each mechanism
relative to the Transformer's. Published: batch 32 on 4 x 4 TPU v3, 4 layers, width 256, 4 heads. Here, by default: one layer of
the small setting of Xiong et al. (2021), width 64, 2 heads, feed-forward 128, batch 1, on the machine at hand.
Expected time on two cores: about 25 minutes with --budget=40.
"""

from collections.abc import Callable, Mapping
from typing import Any

from efficient_attn import tables
from efficient_attn.arguments import arguments_of
from efficient_attn.config import experiment
from efficient_attn.mixers import MIXERS
from efficient_attn.workdir import read_json

TITLE = "Speed and memory of a training step against length"
METRIC = tables.Metric("speed", "x the Transformer's", scale=1.0)
MEMORY = tables.Metric("memory", "x the Transformer's", scale=1.0, better="min")
SCALES = {
    "paper": "4 layers, width 256, 4 heads, batch 32 on 4 x 4 TPU v3; memory is that of one device.",
    "cpu": "1 layer, width 64, 2 heads, batch 1 on two CPU cores; memory is the compiled step's arguments and temporaries.",
}
RESULTS = tables.ROOT / "results/cpu/lra_speed.json"
MEASURED_BY = "python -m benchmarks.lra_speed --out=results/cpu/lra_speed.json"
LENGTHS = (1024, 2048, 3072, 4096, 8192, 16384)
TIMED = LENGTHS[:5]
"""Where steps are compiled and run; at the last one they are compiled alone."""
BASELINE = "transformer"

SIZES: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "transformer": lambda length: dict(name="softmax", implementation="xla"),
    "block_local": lambda length: dict(block_size=50),
    "image_local_2d": lambda length: dict(width=32),
    "sparse_transformer": lambda length: dict(kind="fixed", stride=50, width=10),
    "longformer": lambda length: dict(window=512),
    "adaptive_span": lambda length: dict(max_span=256),
    "synthesizer": lambda length: dict(mode="factorized_random", rank=32),
    "s4nd": lambda length: dict(columns=32),
}
"""By row of the table: the mixer's arguments at a length, where they are not its defaults.

"transformer" forms the whole table of scores, as the published one does; "softmax" is the same function in tiles.
"""

STEPS_PER_SECOND = {
    "transformer": (8.1, 4.9, 2.3, 1.4),
    "block_local": (9.2, 8.4, 7.4, 7.4),
    "linformer": (9.3, 9.1, 8.5, 7.7),
    "reformer": (4.4, 2.2, 1.5, 1.1),
    "sinkhorn": (9.1, 7.9, 6.6, 5.3),
    "synthesizer": (8.7, 5.7, 6.6, 1.9),
    "bigbird": (7.4, 3.9, 2.7, 1.5),
    "linear_attention": (9.1, 9.3, 8.6, 7.8),
    "performer": (9.5, 9.4, 8.7, 8.0),
}
"""Published at 1K, 2K, 3K, 4K, as printed (Tay et al. 2020, table 2)."""

GIGABYTES = {
    "transformer": (0.85, 2.65, 5.51, 9.48),
    "block_local": (0.42, 0.76, 1.06, 1.37),
    "linformer": (0.37, 0.55, 0.99, 0.99),
    "reformer": (0.48, 0.99, 1.53, 2.28),
    "sinkhorn": (0.47, 0.83, 1.13, 1.48),
    "synthesizer": (0.65, 1.98, 4.09, 6.99),
    "bigbird": (0.77, 1.49, 2.18, 2.88),
    "linear_attention": (0.37, 0.57, 0.80, 1.03),
    "performer": (0.37, 0.59, 0.82, 1.06),
}
"""Published peak memory of a device at 1K, 2K, 3K, 4K (the same table)."""

RATIOS_AT_4K = {"luna": (4.9, 0.16), "s4": (4.8, 0.14)}
"""Speed and memory over the Transformer's at 4K, of rows that table does not have (Ma et al. 2023, arXiv 2209.10655, table 2)."""


def rows() -> list[str]:
    """The rows of the table: the dense Transformer, and every mixer."""
    return [BASELINE, *MIXERS]


def published(row: str, length: int) -> tuple[float, float] | None:
    """Speed and memory over the Transformer's, where a paper prints them."""
    if row in STEPS_PER_SECOND and length in LENGTHS[:4]:
        i = LENGTHS.index(length)
        return STEPS_PER_SECOND[row][i] / STEPS_PER_SECOND[BASELINE][i], GIGABYTES[row][i] / GIGABYTES[BASELINE][i]
    return RATIOS_AT_4K.get(row) if length == 4096 else None


def mixer(row: str, length: int, heads: int) -> dict[str, Any]:
    """The mixer dict of a row at a length; the bidirectional form where there is one."""
    arguments = {"name": row, **SIZES.get(row, lambda length: {})(length)}
    entry = MIXERS[arguments["name"]]
    sizes = {"num_heads": heads, "max_length": length}
    sizes = {name: size for name, size in sizes.items() if name in arguments_of(entry.constructor)}
    return {**sizes, "causal": not entry.bidirectional, **arguments}


PROTOCOLS = {
    f"{figure}{suffix}": tables.Protocol(
        f"{title} {place}", tuple(f"{length // 1024}K" for length in lengths), scale=scale, metric=metric, beside=beside,
        facts=("Byte-level text classification. The Transformer forms the whole table of scores.",), absent=absent,
    )
    for figure, title, metric in (("speed", "Speed", METRIC), ("memory", "Peak memory", MEMORY))
    for suffix, place, lengths, scale, beside, absent in (
        ("", "as published", LENGTHS[:4], "paper", "", (tables.Absent("no TPU was at hand", word="not measured"),)),
        ("-cpu", "on two CPU cores", TIMED if figure == "speed" else LENGTHS, "cpu", figure, ()),
    )
}  # fmt: skip


def _published(figure: int) -> dict[str, dict[str, tables.Published]]:
    sources = dict.fromkeys(RATIOS_AT_4K, "Ma et al. 2023, arXiv 2209.10655, table 2")
    cells = {row: {n: published(row, n) for n in LENGTHS} for row in (*STEPS_PER_SECOND, *RATIOS_AT_4K)}
    default = "Tay et al. 2020, arXiv 2011.04006, table 2"
    return {
        row: {
            f"{n // 1024}K": tables.Published(f"{pair[figure]:.2f}", sources.get(row, default), note="ratio of printed figures")
            for n, pair in lengths.items()
            if pair
        }
        for row, lengths in cells.items()
    }


PUBLISHED = {"speed": _published(0), "memory": _published(1)}


def measured(scale: str) -> dict[str, dict[str, dict[str, float]]]:
    """What the committed run of the benchmark says, over the Transformer's."""
    if scale != "cpu":
        return {}
    found = {row["mixer"]: row for row in read_json(RESULTS)["summary"]}

    def ratios(kind: str, power: int) -> dict[str, dict[str, float]]:
        base = found[BASELINE][kind]
        return {
            mixer: {f"{int(n) // 1024}K": (value / base[n]) ** power for n, value in row[kind].items() if n in base}
            for mixer, row in found.items()
        }

    return {"speed-cpu": ratios("ms", -1), "memory-cpu": ratios("mb", 1)}


def sweep(scale: str = "paper") -> list[tables.Cell]:
    """Nothing: steps are timed by the benchmark, not trained."""
    return []


def get_config(row: str, length: int, *, batch: int = 1, depth: int = 1, width: int = 64, heads: int = 2):
    """The configuration that is timed."""
    model = dict(
        depth=depth, width=width, feed_forward_width=2 * width, positions=dict(name="learned"), mixer=mixer(row, length, heads)
    )
    recipe = {"model": model, "train": dict(batch_size=batch, duration="1 steps")}
    return experiment(name="lra_speed", task=dict(name="text", max_bytes=length), recipes={row: recipe}, recipe=row)
