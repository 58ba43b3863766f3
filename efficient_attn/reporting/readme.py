"""README's tables of results, each written between two markers from the file or the runs it shows:

<!-- table NAME: python report.py --readme -->
...
<!-- end of table -->
"""

import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from efficient_attn import tables, workdir
from efficient_attn.arguments import suggest
from efficient_attn.reporting import lengths, markdown, summary
from efficient_attn.runs import State

README = tables.ROOT / "README.md"
RESULTS = tables.ROOT / "results/cpu"
OPEN, CLOSE = "<!-- table {}: python report.py --readme -->", "<!-- end of table -->"
BLOCK = re.compile(OPEN.format(r"(\w+)") + "\n(.*?)" + CLOSE, re.S)


def refresh(path: pathlib.Path = README, *, check: bool = False) -> list[pathlib.Path]:
    """Write the tables of the file `path`; returns it. With `check` write nothing.

    Raises `WorkdirError` for a marker that names no table or is not closed, and with `check` where a table is stale.
    """
    old = path.read_text()
    if old.count("<!-- table ") != len(BLOCK.findall(old)):
        raise workdir.WorkdirError(f"{path}: a marker of a table is misspelt or is not closed by {CLOSE}")
    new = BLOCK.sub(lambda match: f"{OPEN.format(match[1])}\n{made(match[1], path)}\n{CLOSE}", old)
    stale = [was[0] for was, now in zip(BLOCK.findall(old), BLOCK.findall(new)) if was != now]
    if check and stale:
        raise workdir.WorkdirError(f"{path}: {', '.join(stale)} is not what results/ says; run: python report.py --readme")
    if stale and not check:
        workdir.write_text(path, new)
    return [path]


def made(name: str, path: pathlib.Path) -> str:
    """The table `name` as Markdown."""
    if name not in TABLES:
        raise workdir.WorkdirError(f"{path}: there is no table {name!r}{suggest(name, TABLES)}; one of: {', '.join(TABLES)}")
    return TABLES[name]()


def attention_speed() -> str:
    """Seconds, and how many times as long as the first contestant takes."""
    rows = workdir.read_json(RESULTS / "attention_speed.json")["rows"]
    names = {"chunked": "`chunked`", "xla": "`jax.nn` (xla)", "PyTorch": "PyTorch 2.13 SDPA"}
    passes = {"forward": "forward", "forward+backward": "with backward"}

    def cell(row: Mapping[str, Any]) -> str:
        seconds = f"{row['median_ms'] / 1e3:.2g}"
        return seconds if row["contestant"] == "chunked" else f"{seconds} ({_digits(row['slower than chunked'])})"

    found = {(row["contestant"], f"{_kilo(row['length'])} {passes[row['pass']]}"): cell(row) for row in rows}
    return _pivot(found, names)


def selective_scan() -> str:
    """The first contestant's seconds, how many times as long the others take, and the memory of the longest scan."""
    rows = workdir.read_json(RESULTS / "selective_scan.json")["rows"]
    names = {
        "chunked": "`chunked`", "reference": "`lax.scan`", "associative": "`lax.associative_scan`",
        "mambapy": "mambapy (PyTorch 2.13)",
    }  # fmt: skip

    def cell(row: Mapping[str, Any]) -> str:
        return f"{row['median_ms'] / 1e3:.2g} s" if row["contestant"] == "chunked" else f"{row['slower']:.1f}"

    found = {(row["contestant"], f"{row['what']} {_kilo(row['length'])}"): cell(row) for row in rows}
    longest = max(row["length"] for row in rows)
    memory = [row for row in rows if row["what"] == "scan" and row["length"] == longest]
    found |= {
        (row["contestant"], f"MB at {_kilo(longest)}"): f"{row['temporary_mb']:,.0f}"
        for row in memory
        if not isinstance(row["temporary_mb"], str)
    }
    return _pivot(found, names)


def induction() -> str:
    """Mean accuracy over the seeds at each length, with the range where it is wider than six points."""
    rows = [row for row in workdir.read_json(RESULTS / "selectivity_induction.json")["rows"] if row["length"] <= 2048]

    def cell(scores: Sequence[float]) -> str:
        low, mean, high = (f"{100 * x:.1f}" for x in (min(scores), statistics.fmean(scores), max(scores)))
        return f"{mean} ({low}-{high})" if 100 * (max(scores) - min(scores)) > 6 else mean

    by_recipe = lengths.by_recipe(rows, "accuracy")
    found = {(recipe, str(n)): cell(scores[n]) for recipe, scores in by_recipe.items() for n in sorted(scores)}
    return _pivot(found, {recipe: f"`{recipe}`" for recipe in by_recipe})


def table(name: str, scale: str) -> str:
    """A table of `configs/tables` from its committed runs: the sections that have any, or the command that makes them.

    Raises `WorkdirError` where a committed run is damaged or of a protocol that the table had before.
    """
    loaded = tables.load(tables.ROOT / f"configs/tables/{name}.py")
    found = summary.summarise(loaded, RESULTS / "tables" / loaded.root.name, scale)
    for _, run in found.members:
        if run.state in (State.OTHER_PROTOCOL, State.DAMAGED):
            raise workdir.WorkdirError(
                f"{run.folder} cannot stand in the table {name}: {run.state}, {run.why}; remove or rerun it"
            )
    ran = [section.name for section in found.sections if any(figure.scores for figure in section)]
    return (
        markdown.render(found, ran).rstrip()
        if ran
        else f"Not run: `python sweep.py --config=configs/tables/{name}.py --scale={scale}`"
    )


def _pivot(found: Mapping[tuple[str, str], str], names: Mapping[str, str]) -> str:
    """Rows in the order of `names`, columns in the order in which they were found."""
    columns = list(dict.fromkeys(column for _, column in found))
    return markdown.table(["", *columns], [[title, *(found.get((row, c), "") for c in columns)] for row, title in names.items()])


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def _kilo(length: int) -> str:
    return f"{length // 1024}K"


TABLES: Mapping[str, Callable[[], str]] = {
    "attention_speed": attention_speed,
    "selective_scan": selective_scan,
    "induction": induction,
    "recall": lambda: table("recall", "cpu"),
    "lra": lambda: table("lra", "cpu"),
    "extrapolation": lambda: table("extrapolation", "cpu"),
}
