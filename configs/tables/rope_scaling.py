"""Contexts longer than a model was trained for, by changing its rotary positions: interpolation, NTK, YaRN.

    python sweep.py --config=configs/tables/rope_scaling.py --scale=cpu       one run of 3 seeds, five minutes on a free core
    python report.py --table=configs/tables/rope_scaling.py

Position interpolation (Chen et al. 2023, arXiv 2306.15595, table 1) and YaRN (Peng et al. 2023, arXiv 2309.00071), both on LLaMA:
perplexities of 7 to 65 billion parameters, of which none is trained here. What the methods (efficient_attn/positions/scaling.py)
do to a small model is shown by the rotary run of extrapolation.py, in that table's folder: whichever is swept first trains it.
"""

from configs.tables import extrapolation
from efficient_attn.tables import Absent, Cell, Metric, Protocol, published

TITLE = "Rotary positions scaled to longer contexts"
METRIC = Metric("test_perplexity", "perplexity", scale=1.0, better="min")
SCALES = {
    "paper": "LLaMA of 7 to 65 billion parameters; there are no runs of it here.",
    "cpu": "Two layers of width 64 trained on 64 bytes of WikiText-2 at a time, three seeds: a run of the table extrapolation.",
}
RUNS = "extrapolation"
PI = ("2048", "4096", "8192", "16384", "32768")
YARN = ("2048", "4096", "6144", "8192", "10240")
LONG = ("8192", "32768", "65536", "98304", "131072")
LLAMA = (Absent("no LLaMA is trained here"),)
PROTOCOLS = {
    "pi": Protocol(
        "Position interpolation: PG-19", PI,
        ("Sliding windows with a stride of 256. FT is fine-tuning without, PI with interpolation, to the context window named.",),
        absent=LLAMA,
    ),
    "yarn": Protocol(
        "YaRN: Proof-pile, LLaMA 2 7B, contexts doubled", YARN, ("PI on 1 billion tokens, YaRN on 400 million.",),
        absent=LLAMA,
    ),
    "yarn-long": Protocol(
        "YaRN: contexts to 131,072", LONG, ("s is the factor by which the context was to grow.",), absent=LLAMA
    ),
    extrapolation.EXTRAPOLATION: Protocol(
        "In miniature, trained at 64 bytes", extrapolation.CPU_COLUMNS,
        (extrapolation.LENGTHS, extrapolation.RESCALED, "Nothing of it is published."),
        scale="cpu", metric=extrapolation.METRIC,
    ),
}  # fmt: skip
PUBLISHED = {
    "pi": published(PI, "Chen et al. 2023, arXiv 2306.15595, table 1", {
        "7B, 2048": "7.20 >1e3 >1e3 >1e3 >1e3",
        "7B, FT 8192": "7.21 7.34 7.69 - -",
        "7B, PI 8192": "7.13 6.96 6.95 - -",
        "7B, PI 16384": "7.11 6.93 6.82 6.83 -",
        "7B, PI 32768": "7.23 7.04 6.91 6.80 6.77",
        "13B, PI 8192": "6.55 6.42 6.42 - -",
        "13B, PI 16384": "6.56 6.42 6.31 6.32 -",
        "13B, PI 32768": "6.54 6.40 6.28 6.18 6.09",
        "33B, PI 8192": "5.82 5.69 5.71 - -",
        "33B, PI 16384": "5.87 5.74 5.67 5.68 -",
        "65B, PI 8192": "5.42 5.32 5.37 - -",
    }),
    "yarn": published(YARN, "Peng et al. 2023, arXiv 2309.00071", {
        "PI": "3.92 3.51 3.51 3.34 8.07",
        "NTK": "4.20 3.75 3.74 3.59 6.24",
        "YaRN": "3.91 3.50 3.51 3.35 6.04",
    }),
    "yarn-long": published(LONG, "Peng et al. 2023, arXiv 2309.00071, table 2", {
        "7B, Together PI": "3.50 2.64 >1e2 >1e3 >1e4",
        "7B, CodeLlama NTK": "3.71 2.74 2.55 2.54 2.71",
        "7B, YaRN s=16": "3.51 2.65 2.42 >10 >10",
        "7B, YaRN s=32": "3.56 2.70 2.45 2.36 2.37",
        "13B, CodeLlama NTK": "3.54 2.63 2.41 2.37 2.54",
        "13B, YaRN s=16": "3.25 2.50 2.29 >10 >10",
        "13B, YaRN s=32": "3.29 2.53 2.31 2.23 2.24",
    }),
}  # fmt: skip


CPU = tuple(cell for cell in extrapolation.sweep("cpu") if (cell.protocol, cell.row) == (extrapolation.EXTRAPOLATION, "rotary"))
ORDERINGS = tuple(o for o in extrapolation.ORDERINGS if {o.better, o.worse} <= {place for cell in CPU for place in cell.places})


def sweep(scale: str = "paper") -> tuple[Cell, ...]:
    return CPU if scale == "cpu" else ()
