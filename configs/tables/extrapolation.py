"""Perplexity beyond the trained length, by what a model knows of positions (Press et al. 2022, ALiBi, arXiv 2108.12409), and what
far context is worth.

    python sweep.py --config=configs/tables/extrapolation.py --scale=cpu      10 runs of 3 seeds, half an hour on a free core
    python report.py --table=configs/tables/extrapolation.py --scale=paper

Published: 16 layers and 247 million parameters on WikiText-103, validation perplexity of non-overlapping windows. No recipe here
makes that model, so the paper's section has no runs. In miniature: two layers of width 64 on bytes of WikiText-2 (the corpus
`wikitext2`: its tokenised text, with <unk> and @-@ as they are), three seeds a run as one program. The orderings that papers
publish are tested on the figures: seeds in pairs, the mean of the differences above two of their standard deviations.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from efficient_attn.tables import Absent, Cell, Finding, Metric, Ordering, Place, Protocol, published

TITLE = "Length extrapolation, memory, and what far context is worth"
METRIC = Metric("test_loss", "bits per byte", scale=1 / math.log(2), better="min")
PERPLEXITY = Metric("test_perplexity", "perplexity", scale=1.0, better="min")
CHANGE = Metric("test_loss", "bits per byte more", scale=1 / math.log(2), better="min", change=True)
SCALES = {
    "paper": "WikiText-103, 247 million parameters; there are no runs of it here.",
    "cpu": "Bytes of WikiText-2, two layers of width 64, 400 steps of 2,048 bytes, three seeds; 65,536 bytes of the test split.",
}
COLUMNS = ("512", "532", "602", "3072", "15512")
CPU_LENGTHS = (64, 128, 256, 512, 1024)
CPU_COLUMNS = tuple(map(str, CPU_LENGTHS))
WINDOWS = {"non-overlapping": ("non-overlapping", 64), "sliding by 8": ("sliding", 8), "memory": ("segments with memory", 64)}
"""Column -> protocol and stride of the analysis `windows`."""
PERTURBATIONS = {"shuffle": "shuffled", "replace": "replaced by another text's", "drop": "dropped"}
PERTURBED = tuple(24 * i for i in range(1, 9))
TARGETS = "Windows of 256 bytes, the loss of the last 64; the column is how many of the first bytes are perturbed."
LENGTHS = "The column is the length of the non-overlapping windows tested on, of one text; longer ones also give more context."
RESCALED = (
    "Rescaled rotations have the factor of their column and are not trained with it; tuned ones have a factor of 4 everywhere, "
    "and 40 more steps at 256 bytes and a tenth of the learning rate."
)
EXTRAPOLATION, MEMORY = "cpu-extrapolation", "cpu-memory"
PROTOCOLS = {
    "wikitext103": Protocol(
        "WikiText-103, as published", COLUMNS,
        ("Validation perplexity of non-overlapping windows; rows name the trained length, columns the tested one.",),
        metric=PERPLEXITY, absent=(Absent("its adaptive embeddings and softmax are not in this project"),),
    ),
    EXTRAPOLATION: Protocol(
        "In miniature, trained at 64 bytes", CPU_COLUMNS,
        (LENGTHS,
         "transformer_xl reads a window in segments of 64, with a memory of 64 states, empty where the window starts.", RESCALED,
         "Nothing of it is published."),
        scale="cpu", absent=(Absent("learned positions end at the trained length", ("learned",), "no positions"),),
    ),
    MEMORY: Protocol(
        "In miniature, with and without memory", tuple(WINDOWS),
        ("Contiguous streams, segments of 64 bytes, relative positions; with memory, 64 states of each layer.",
         "A training step with memory takes 1.43 times the operations of one without (report.py --costs), so that 570 steps "
         "without it cost what 400 with it do.",
         "Columns: windows of 64 bytes, as they are and moved on by 8, and one segment after the other with what is remembered.",
         "Nothing of it is published."),
        scale="cpu", absent=(Absent("these models have none", ("memory",), "no memory"),),
    ),
    **{
        f"cpu-{kind}": Protocol(
            f"In miniature, far context {what}", tuple(f"n={n}" for n in PERTURBED),
            (TARGETS, "64 windows; both models are trained at 256 bytes.", "Nothing of it is published."),
            scale="cpu", metric=CHANGE,
        )
        for kind, what in PERTURBATIONS.items()
    },
}  # fmt: skip
PUBLISHED = {
    "wikitext103": published(COLUMNS, "Press et al. 2022, arXiv 2108.12409", {
        "sinusoidal, trained at 512": "- 19.91 20.40 - 406.01",
        "sinusoidal, trained at 3072": "- - - 18.67±0.24 -",
        "rotary, trained at 3072": "- - - 18.57 -",
        "t5, trained at 3072": "- - - 18.01 -",
        "alibi, trained at 512": "19.73 - - 18.40 -",
        "alibi, trained at 1024": "- - - 17.96 -",
        "alibi, trained at 3072": "- - - 17.60 -",
    }),
}  # fmt: skip
SCALINGS = {"PI": "linear (PI)", "NTK": "NTK", "YaRN": "YaRN"}
"""Row's name -> the name that analyses use."""
TUNED = {"rotary, tuned": "as trained"} | {f"rotary + {row}, tuned": name for row, name in SCALINGS.items()}
LONG_STEPS = 570


def _at(row: str, length: int) -> Place:
    return EXTRAPOLATION, row, str(length)


PRESS, CHEN, PENG = "Press et al. 2022, figure 1", "Chen et al. 2023", "Peng et al. 2023"
DAI, KHANDELWAL = "Dai et al. 2019, table 6", "Khandelwal et al. 2018, sections 4 and 5"
ORDERINGS = (
    Ordering("sinusoidal positions: worse at twice the trained length", PRESS, _at("sinusoidal", 64), _at("sinusoidal", 128)),
    Ordering("sinusoidal positions: worse still at 16 times", PRESS, _at("sinusoidal", 128), _at("sinusoidal", 1024)),
    Ordering("ALiBi: better at 16 times the trained length than at it", PRESS, _at("alibi", 1024), _at("alibi", 64)),
    Ordering("ALiBi before sinusoidal at the trained length", PRESS, _at("alibi", 64), _at("sinusoidal", 64)),
    Ordering("ALiBi before T5 at 16 times", PRESS, _at("alibi", 1024), _at("t5", 1024)),
    Ordering("T5 before RoPE at 16 times", PRESS, _at("t5", 1024), _at("rotary", 1024)),
    Ordering("RoPE before sinusoidal at 16 times", PRESS, _at("rotary", 1024), _at("sinusoidal", 1024)),
    Ordering("PI before plain RoPE at 4 times, untuned", f"{CHEN}, section 3.4", _at("rotary + PI", 256), _at("rotary", 256)),
    Ordering("NTK before PI at 4 times, untuned", f"{PENG}, section 3.1", _at("rotary + NTK", 256), _at("rotary + PI", 256)),
    Ordering("YaRN before NTK at 4 times, untuned", f"{PENG}, section 3.3", _at("rotary + YaRN", 256), _at("rotary + NTK", 256)),
    Ordering("PI before plain RoPE, both tuned", f"{CHEN}, table 1", _at("rotary + PI, tuned", 256), _at("rotary, tuned", 256)),
    Ordering("tuned PI: better at the longer context", f"{CHEN}, table 1",
             _at("rotary + PI, tuned", 256), _at("rotary + PI, tuned", 64)),
    Ordering("YaRN before NTK, both tuned", f"{PENG}, table 1",
             _at("rotary + YaRN, tuned", 256), _at("rotary + NTK, tuned", 256)),
    Ordering("Transformer-XL: better at 16 times the trained length than at it", DAI,
             _at("transformer_xl", 1024), _at("transformer_xl", 64)),
    Ordering("Transformer-XL before no memory at equal compute", DAI,
             (MEMORY, "transformer_xl", "memory"), (MEMORY, "no memory, equal compute", "non-overlapping")),
    Ordering("Transformer-XL before no memory in sliding windows", DAI,
             (MEMORY, "transformer_xl", "memory"), (MEMORY, "no memory, equal compute", "sliding by 8")),
    Ordering("far context: its order is worth less than its content (transformer)", KHANDELWAL,
             ("cpu-shuffle", "rotary", "n=144"), ("cpu-replace", "rotary", "n=144")),
)  # fmt: skip

COMMON: Mapping[str, Any] = {
    "task.corpus": "wikitext2", "task.num_eval": 1024, "train.duration": "400 steps", "train.eval_every": "200 steps",
    "train.tensorboard": False,
}  # fmt: skip


def _lengths(row: str, analysis: str = "extrapolation", positions: str = "as trained") -> dict[Place, Finding]:
    where = dict(positions=positions)
    return {_at(row, n): Finding(analysis, "nats", {**where, "length": n}) for n in CPU_LENGTHS}


def _windows(row: str, columns: tuple[str, ...] = tuple(WINDOWS)) -> dict[Place, Finding]:
    where = {column: dict(zip(("protocol", "stride"), WINDOWS[column])) for column in columns}
    return {(MEMORY, row, column): Finding("windows", "nats", where[column]) for column in columns}


def _perturbations(row: str) -> dict[Place, Finding]:
    def where(kind: str, n: int) -> Finding:
        return Finding("perturbation", "change in nats", {"perturbation": kind, "first tokens perturbed": n})

    return {(f"cpu-{kind}", row, f"n={n}"): where(kind, n) for kind in PERTURBATIONS for n in PERTURBED}


def _rotary() -> dict[Place, Finding]:
    """All that one rotary model shows: as trained, rescaled, and fine-tuned."""
    found = _lengths("rotary")
    for row, name in SCALINGS.items():
        found |= _lengths(f"rotary + {row}", positions=name)
    for row, name in TUNED.items():
        found |= _lengths(row, "fine_tuning", name)
    return found


def _cell(recipe: str, row: str, findings: Mapping[Place, Finding], choice: str = "", **overrides: Any) -> Cell:
    protocol, _, column = next(iter(findings))
    changed = {**COMMON, **{field.replace("__", "."): value for field, value in overrides.items()}}
    return Cell(
        f"configs/{recipe}", row, column, protocol, changed, replicas=3, choice=choice, findings=findings, tokens=2**16
    )  # fmt: skip


def sweep(scale: str = "paper") -> Iterator[Cell]:
    if scale != "cpu":
        return
    yield _cell("lm_text.py:sinusoidal_short", "sinusoidal", _lengths("sinusoidal"))
    yield _cell("lm_text.py:rotary_short", "rotary", _rotary())
    yield _cell("lm_text.py:alibi_short", "alibi", _lengths("alibi"))
    yield _cell("lm_memory.py:transformer_xl_short", "transformer_xl", _lengths("transformer_xl") | _windows("transformer_xl"))
    without = ("non-overlapping", "sliding by 8")
    yield _cell("lm_memory.py:transformer_short", "no memory, equal compute", _windows("no memory, equal compute", without),
                train__duration=f"{LONG_STEPS} steps")  # fmt: skip
    yield _cell("lm_text.py:t5_short", "t5", _lengths("t5"))
    longer = dict(task__context=256, task__num_eval=256, train__batch_size=8, train__eval_batch_size=16)
    yield _cell("lm_text.py:rotary_short", "rotary", _perturbations("rotary"), **longer)
    yield _cell("lm_text.py:mamba_short", "mamba", _perturbations("mamba"), **longer)
    yield _cell("lm_memory.py:transformer_short", "no memory, equal steps", _windows("no memory, equal steps", without))
    only_there = {_at("learned", 64): _lengths("learned")[_at("learned", 64)]}
    yield _cell("lm_text.py:learned_short", "learned", only_there)
