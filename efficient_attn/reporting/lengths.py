"""Test score of finished runs against the length of the test sequences: does what was learned at one length hold at others?

    python -m efficient_attn.reporting.lengths --workdirs=runs/a-s0,runs/a-s1,runs/b-s0 --lengths=32,64,128 --out=results/lengths

Every run's best checkpoint is scored on test splits that its task draws at each length, all else as in training. Writes OUT.json
(every score, with the run's step, seed, arguments, commit and device) and OUT.png (mean over the seeds of a recipe, and their
range), and prints a table.
"""

import copy
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from matplotlib.figure import Figure

from efficient_attn import cli, evaluation, workdir
from efficient_attn.arguments import ConfigError
from efficient_attn.plan import make_plan
from efficient_attn.reporting import figures

Row = dict[str, Any]


def score(folder: pathlib.Path, lengths: Sequence[int]) -> list[Row]:
    """One row for each length and seed: the run's configuration, recipe and seed, and its best checkpoint's test metric.

    Raises `WorkdirError` where `folder` holds no run, or a model whose parameters depend on the length (learned positions).
    """
    run, trained = evaluation.open_run(folder)
    config = trained.config
    rows = []
    for length in lengths:
        changed = copy.deepcopy(config)
        changed["task"][trained.task.length_field] = length
        plan = make_plan(changed)
        if jax.tree.map(lambda x: x.shape, plan.state) != jax.tree.map(lambda x: x.shape, trained.state):
            raise workdir.WorkdirError(f"{folder}: the model's parameters depend on the length; it has none for {length}")
        result = evaluation.score_best(plan, folder)
        metric = plan.task.metric
        made_with = {key: run[key] for key in ("commit", "device_kind", "cpu")} | {"arguments": run["argv"][1:]}
        by_seed = result.get(f"test_{metric}_by_seed", [result[f"test_{metric}"]])
        for seed, value in zip(plan.seeds, by_seed, strict=True):
            row = {"name": config["name"], "recipe": config["recipe"], "seed": seed, "trained_at": trained.task.length}
            rows.append(row | {"length": length, "step": result["step"], metric: value} | made_with)
    return rows


def by_recipe(rows: Sequence[Row], metric: str) -> dict[str, dict[int, list[float]]]:
    """{recipe: {length: scores of its seeds}}."""
    table: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        table.setdefault(row["recipe"], {}).setdefault(row["length"], []).append(row[metric])
    return table


def markdown(table: Mapping[str, Mapping[int, Sequence[float]]]) -> str:
    """Mean in percent, and in brackets the least and the largest over the seeds."""
    lengths = sorted({length for scores in table.values() for length in scores})
    lines = ["| recipe | seeds | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 2) + "|"]
    for recipe, scores in table.items():
        cells = [_cell(scores[length]) if length in scores else "not run" for length in lengths]
        lines.append(f"| {recipe} | {max(map(len, scores.values()))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(scores: Sequence[float]) -> str:
    mean, low, high = (f"{100 * x:.1f}" for x in (statistics.mean(scores), min(scores), max(scores)))
    return mean if len(scores) == 1 else f"{mean} ({low}-{high})"


def draw(rows: Sequence[Row], metric: str, floors: Mapping[str, float], out: pathlib.Path) -> None:
    """Score against length, the latter on a logarithmic scale; floors dashed, the trained length dotted."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for recipe, scores in by_recipe(rows, metric).items():
        lengths = sorted(scores)
        (line,) = axes.plot(lengths, [statistics.mean(scores[n]) for n in lengths], marker=".", label=recipe)
        low, high = ([pick(scores[n]) for n in lengths] for pick in (min, max))
        axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.2)
    for trained_at in {row["trained_at"] for row in rows}:
        axes.axvline(trained_at, linestyle=":", color="grey", label=f"trained at {trained_at}")
    for name, value in floors.items():
        axes.axhline(value, linestyle="--", linewidth=1, color="grey", label=f"{name} {100 * value:.1f} %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["length"] for row in rows}), sorted({row["length"] for row in rows}))
    axes.set(xlabel="length of the test sequences", ylabel=f"test {metric}", title=rows[0]["name"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figures.save(figure, out)


def main() -> None:
    folders = [pathlib.Path(name) for name in flags.FLAGS.workdirs]
    out = pathlib.Path(flags.FLAGS.out)
    if not all(length.isdecimal() for length in flags.FLAGS.lengths):
        raise ConfigError(f"--lengths={','.join(flags.FLAGS.lengths)}: give whole numbers with commas between them")
    rows = [row for folder in folders for row in score(folder, list(map(int, flags.FLAGS.lengths)))]
    scored = [(row["recipe"], row["seed"], row["length"]) for row in rows]
    if len(set(scored)) < len(scored):
        raise workdir.WorkdirError("two of the runs have one recipe and one seed: a mean over them would not be over seeds")
    names = {row["name"] for row in rows}
    if len(names) > 1:
        raise workdir.WorkdirError(f"the runs are of several configurations, {', '.join(sorted(names))}: score them apart")
    task = evaluation.open_run(folders[0])[1].task
    figure = out.with_name(f"{out.name}.png")
    draw(rows, task.metric, task.floors if task.metric == "accuracy" else {}, figure)
    command = "python -m efficient_attn.reporting.lengths " + " ".join(sys.argv[1:])
    workdir.write_json(out.with_name(f"{out.name}.json"), {"command": command, "rows": rows})
    print(markdown(by_recipe(rows, task.metric)))
    print(figure)


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", None, "Folders of finished runs of one configuration file.", required=True)
    flags.DEFINE_list("lengths", None, "Lengths of the test sequences.", required=True)
    flags.DEFINE_string("out", None, "What to write, without .json and .png.", required=True)
    cli.run(main)
