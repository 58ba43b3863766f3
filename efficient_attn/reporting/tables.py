"""All files of a table's report: NAME.md, .tex, .csv, .json and .html."""

import pathlib
from collections.abc import Mapping
from typing import Any

from efficient_attn import tables, workdir
from efficient_attn.arguments import ConfigError
from efficient_attn.reporting import costs, latex, markdown, page, records, summary
from efficient_attn.runs import State

SPEEDS = tables.ROOT / "results/cpu/lra_speed.json"
"""Cost against length of every mixer; `python -m benchmarks.lra_speed --out=results/cpu/lra_speed.json` writes it."""


def write(
    path: pathlib.Path, out: pathlib.Path, *, root: pathlib.Path | None = None, scale: str = "", measure: bool = False
) -> list[pathlib.Path]:
    """Read the runs of the table in `path` and write what they say into `out`; returns the files.

    root: folder of the runs, by default sweep.py's. scale: "" for all. measure: first compile a training step of every
    cell with a finished run that costs.json in `root` does not have. Raises `ConfigError` for a `root` that is not there.
    """
    table = tables.load(path)
    if root is not None and not root.is_dir():
        raise ConfigError(f"--root={root} is no folder; without it runs are looked for where sweep.py puts them, {table.root}")
    root = root or table.root
    found = summary.summarise(table, root, scale)
    if measure:
        measure_costs(found)
    name = f"{table.name}-{scale}" if scale else table.name
    texts = {
        "md": f"# {table.title}\n\n{markdown.render(found)}", "tex": latex.render(found), "csv": records.as_csv(found),
        "json": records.as_json(found), "html": page.render(found, costs.read(root), speeds()),
    }  # fmt: skip
    for suffix, content in texts.items():
        workdir.write_text(out / f"{name}.{suffix}", content)
    return [out / f"{name}.{suffix}" for suffix in texts]


def measure_costs(found: summary.Summary) -> None:
    """Add to costs.json in the root what is missing of it: one run for each figure, since seeds cost the same."""
    known = costs.read(found.root)
    for section in found.sections:
        for figure in section:
            members = figure.chosen.members if figure.chosen else ()
            finished = [run for _, run in members if run.state == State.FINISHED]
            if finished and not any(run.folder in known for run in finished):
                print(f"compiling {finished[0].folder}", flush=True)
                known[finished[0].folder] = costs.measure(finished[0].config)
                costs.write(found.root, known)


def speeds() -> Mapping[str, Any]:
    """Mixer -> its row of the benchmark of cost against length; empty where that was not run."""
    return {row["mixer"]: row for row in workdir.read_json(SPEEDS)["summary"]} if SPEEDS.exists() else {}
