"""Learning curves of one or more runs as a PNG, with the floors that simple heuristics reach.

python -m efficient_attn.reporting.curves --workdirs=runs/a,runs/b --out=curves.png
"""

import pathlib
from collections.abc import Sequence

from absl import flags
from matplotlib.figure import Figure

from efficient_attn import cli, tasks, workdir
from efficient_attn.arguments import lookup
from efficient_attn.reporting import figures


def draw(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    """Validation (solid) and training (dotted) metric of each run against steps, floors of the first run's task dashed.

    Raises `WorkdirError` where a folder holds no run.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, metric = figure.subplots(), ""
    for i, folder in enumerate(workdirs):
        run, rows = read(folder)
        task = task_of(run)
        metric = metric or task.metric
        if task.metric != metric:
            raise workdir.WorkdirError(f"{folder} measures {task.metric}, {workdirs[0]} {metric}: draw them apart")
        for split, style, width in (("train", ":", 1.0), ("valid", "-", 2.0)):
            key = f"{split}_{task.metric}"
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points), style, marker=".", color=f"C{i}", linewidth=width, label=f"{folder.name} {split}")
        if i == 0:
            axes.set(xlabel="step", ylabel=task.metric)
            axes.set_title(task.name, fontsize=6)
            for name, value in task.floors.items() if task.metric == "accuracy" else ():
                axes.axhline(value, linestyle="--", linewidth=1, color="grey")
                axes.annotate(
                    f"{name} {100 * value:.1f} %",
                    (1, value),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=8,
                )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figures.save(figure, out)


def read(folder: pathlib.Path) -> tuple[dict, list[dict]]:
    """run.json and the lines of metrics.jsonl."""
    if not (folder / "run.json").exists():
        raise workdir.WorkdirError(f"{folder} holds no run (no run.json)")
    return workdir.read_json(folder / "run.json"), workdir.MetricsFile(folder / "metrics.jsonl").read()


def task_of(run: dict) -> tasks.Task:
    arguments = dict(run["config"]["task"])
    return lookup(tasks.TASKS, arguments.pop("name"), "task.name")(**arguments)


def main() -> None:
    folders = [pathlib.Path(name) for name in flags.FLAGS.workdirs]
    out = pathlib.Path(flags.FLAGS.out)
    draw(folders, out)
    print(out)


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", None, "Folders of runs.", required=True)
    flags.DEFINE_string("out", "curves.png", "PNG to write.")
    cli.run(main)
