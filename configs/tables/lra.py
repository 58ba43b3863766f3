"""Long Range Arena (Tay et al. 2020, arXiv 2011.04006): test accuracy of sequence mixers on six tasks, under three protocols.

    python sweep.py --config=configs/tables/lra.py --scale=cpu        12 runs: half an hour on two free CPU cores
    python sweep.py --config=configs/tables/lra.py --scale=paper      as published, three seeds of everything

The benchmark's own protocol, the small one of Xiong et al. (2021) in the re-run of Skyformer, and that of the state-space models,
which allows other sizes and schedules for each task. Figures of two protocols are never in one section, and an average over five
tasks is never beside one over six. Published cells that no recipe of this code makes say "no recipe", and why;
others say "not run" until they are.
Published times: of the small protocol 2.2 (ListOps) to 8.3 hours (Retrieval) a run on a V100; of the others none.
"""

from collections.abc import Iterator

from configs import lra_image, lra_listops, lra_pathfinder, lra_pathx, lra_retrieval, lra_text
from configs.recipes_cpu import MIXERS as CPU_MIXERS
from efficient_attn.tables import Absent, Cell, Metric, Protocol, published

TITLE = "Long Range Arena"
METRIC = Metric()
SCALES = {
    "paper": "As published; sizes, data and schedules are in configs/lra_*.py.",
    "cpu": "ListOps of at most 100 tokens and 512 bytes of IMDb, two layers of width 32, 600 to 1,000 steps, one seed.",
}
FILES = {
    "ListOps": lra_listops, "Text": lra_text, "Retrieval": lra_retrieval, "Image": lra_image, "Pathfinder": lra_pathfinder,
    "Path-X": lra_pathx,
}  # fmt: skip
SIX = tuple(FILES)
FIVE = SIX[:5]
SEEDS = (0, 1, 2)

TEXT = "Text: papers select on the test set, which has no validation split; here a tenth of train is held out for that."
GREY = "Image: grey pixels, unless a figure's note says otherwise."
CHANCE = {"ListOps": 10.0, "Text": 50.0, "Retrieval": 50.0, "Image": 10.0, "Pathfinder": 50.0, "Path-X": 50.0}
FLOORS = {
    **{column: {"chance": value} for column, value in CHANCE.items()},
    "ListOps": {"majority class": 15.35, "root operator": 35.35, "one level exact": 58.90},
}

PROTOCOLS = {
    "lra-original": Protocol(
        "Long Range Arena as released", SIX,
        ("The average is over five tasks; Path-X fails for all and is left out.", TEXT, GREY,
         "Recipes follow the released configurations, from which the paper's appendix differs."),
        average=FIVE, floors=FLOORS,
        absent=(Absent("its L x L weights alone would be 2 GB a layer", ("synthesizer",)),),
    ),
    "lra-small": Protocol(
        "The small protocol: two layers of width 64 (Xiong et al. 2021)", FIVE,
        ("Published figures are Skyformer's re-run of 50,000 steps; recipes have the steps of mlpen/Nystromformer's configs.",
         "The average is over five tasks.", TEXT, GREY),
        average=FIVE, floors={column: FLOORS[column] for column in FIVE},
        absent=(Absent("these mechanisms are not in this project", ("kernelized_attention", "informer", "skyformer")),),
    ),
    "lra-ssm": Protocol(
        "State-space models and after: sizes and schedules of each paper's own", SIX,
        ("The average is over six tasks.",
         "Papers count a failure on Path-X as 50; here a row with one has no average.", TEXT, GREY,
         "S4, S4D, S5 are bidirectional; LRU is so on Pathfinder and Path-X only.",
         "Mamba's paper has no such table and what others print of it disagrees; its recipes here are ours."),
        average=SIX, floors=FLOORS,
        absent=(Absent("these mechanisms are not in this project", ("mega", "mega (chunks)")),
                Absent("figures of the small protocol, whose section has its runs", ("nystrom",)),
                Absent("learning rates that follow the validation loss are not in this project", ("s4 (first version)",)),
                Absent("sizes and schedules are not printed with the figures",
                       ("luna", "dss", "mamba (xLSTM's)", "transformer (Mega's)"))),
    ),
    "cpu-short": Protocol(
        "In miniature, on two CPU cores", ("ListOps", "Text"),
        ("Not Long Range Arena: ListOps of 20 to 100 tokens and depth at most 5, 30,000 expressions, 1,000 steps of batch 32;",
         "the first 512 bytes of IMDb reviews, 600 steps of batch 16, tested on 4,000 of the 25,000 test reviews.",
         "Two layers of width 32 that differ in the mixer alone; one learning rate, 3e-3, for all. One seed.",
         "Figures beside these are published under Long Range Arena's own protocol, on other data."),
        scale="cpu", beside="lra-original",
        floors={"ListOps": {"majority class": 11.30, "root operator": 25.50, "one level exact": 47.25}, "Text": {"chance": 50.0}},
    ),
}  # fmt: skip

PUBLISHED = {
    "lra-original": published(SIX, "Tay et al. 2020, arXiv 2011.04006, table 1", {
        "transformer": "36.37 64.27 57.46 42.44 71.40 FAIL",
        "local": "15.82 52.98 53.39 41.46 66.63 FAIL",
        "sparse_transformer": "17.07 63.58 59.59 44.24 71.71 FAIL",
        "longformer": "35.63 62.85 56.89 42.22 69.71 FAIL",
        "linformer": "35.70 53.94 52.27 38.56 76.34 FAIL",
        "reformer": "37.27 56.10 53.40 38.07 68.50 FAIL",
        "sinkhorn": "33.67 61.20 53.83 41.23 67.45 FAIL",
        "synthesizer": "36.99 61.68 54.67 41.61 69.45 FAIL",
        "bigbird": "36.05 64.02 59.29 40.83 74.87 FAIL",
        "linear_attention": "16.13 65.90 53.09 42.34 75.30 FAIL",
        "performer": "18.01 65.40 53.82 42.77 77.05 FAIL",
    }),
    "lra-small": published(FIVE, "Chen et al. 2021, Skyformer, table 1", {
        "transformer": "38.37 61.95 80.69 40.57 65.26",
        "kernelized_attention": "38.78 60.22 81.77 41.29 70.73",
        "nystrom": "38.51 64.83 80.52 41.30 69.48",
        "linformer": "37.45 58.93 78.19 37.96 60.93",
        "informer": "32.53 62.64 77.57 38.10 57.83",
        "performer": "38.02 64.19 80.04 41.43 66.30",
        "reformer": "37.68 62.93 78.99 48.87 66.49",
        "bigbird": "39.25 63.86 80.28 43.16 68.72",
        "skyformer": "38.69 64.70 82.06 40.77 70.73",
    }),
    "lra-ssm": {
        **published(SIX, "Gu et al. 2022, arXiv 2111.00396, table 10", {
            "fnet": "35.33 65.11 59.61 38.67 77.80 FAIL",
            "nystrom": "37.15 65.52 79.56 41.58 70.94 FAIL",
            "luna": "37.25 64.57 79.29 47.38 77.72 FAIL",
            "s4 (first version)": "58.35 76.02 87.09 87.26 86.05 88.10",
            "s4": "59.60±0.07 86.82±0.13 90.90±0.15 88.65 94.20±0.25 96.35",
        }),
        **published(SIX, "Gu et al. 2022, arXiv 2206.11893", {"s4d": "60.47 86.18 89.46 88.19 93.06 91.95"}),
        **published(SIX, "Chou et al. 2024, MetaLA, arXiv 2411.10741, table 7", {
            "dss": "60.60 84.80 87.80 85.70 84.60 87.80",
            "mamba": "38.02 82.98 72.14 69.82 69.26 67.32",
        }),
        **published(SIX, "Beck et al. 2024, xLSTM, as quoted by LION, table 7", {
            "mamba (xLSTM's)": "32.5 - 90.2 68.9 99.2 -",
        }),
        **published(SIX, "Smith et al. 2023, arXiv 2208.04933", {"s5": "62.15 89.31 91.40 88.00 95.33 98.58"}),
        **published(SIX, "Orvieto et al. 2023, arXiv 2303.06349", {
            "lru": "60.2±0.8 89.4±0.1 89.9±0.1 89.0±0.1 95.1±0.1 94.2±0.4",
        }, notes={"Image": "colour images"}),
        **published(SIX, "quoted by LION, table 7", {"h_transformer_1d": "49.53 78.69 63.99 46.05 68.78 FAIL"}),
        **published(SIX, "Ma et al. 2023, arXiv 2209.10655, table 2", {
            "mega": "63.14 90.43 91.25 90.44 96.01 97.98",
            "mega (chunks)": "58.76 90.19 90.97 85.80 94.41 93.81",
            "transformer (Mega's)": "37.11 65.21 79.14 42.94 71.83 FAIL",
        }),
    },
}  # fmt: skip

RECIPES = {
    "lra-original": {row: row for row in PUBLISHED["lra-original"]},
    "lra-small": {row: f"{row}_small" for row in PUBLISHED["lra-small"]},
    "lra-ssm": {row: row for row in PUBLISHED["lra-ssm"] if row != "nystrom"},
}
"""Protocol -> row -> recipe, for the files that have one of that name."""


def paper() -> Iterator[Cell]:
    for protocol, recipes in RECIPES.items():
        for row, recipe in recipes.items():
            for column in PROTOCOLS[protocol].columns:
                if recipe in FILES[column].RECIPES:
                    for seed in SEEDS:
                        yield Cell(file_of(column, recipe), row, column, protocol, seed=seed)


def cpu() -> Iterator[Cell]:
    for column in PROTOCOLS["cpu-short"].columns:
        for row in CPU_MIXERS:
            yield Cell(file_of(column, f"{row}_cpu"), row, column, "cpu-short", {"train.tensorboard": False})


def file_of(column: str, recipe: str) -> str:
    return f"{FILES[column].__name__.replace('.', '/')}.py:{recipe}"


def sweep(scale: str = "paper") -> Iterator[Cell]:
    return {"paper": paper, "cpu": cpu}[scale]()
