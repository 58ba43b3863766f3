"""Two or more runs beside each other: what their configurations differ in, their scores, costs and curves.

What a step costs is not in a run's folder: the training step of every run is compiled here, which takes seconds to minutes each.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from efficient_attn import runs, workdir
from efficient_attn.arguments import ConfigError
from efficient_attn.config import differences
from efficient_attn.reporting import costs, curves, markdown, page, plots
from efficient_attn.reporting.plots import Line
from efficient_attn.runs import Run, State

MISSING = "–"


def write(folders: Sequence[pathlib.Path], out: pathlib.Path) -> list[pathlib.Path]:
    """Write comparison.md and comparison.html into `out`, print the former; returns the files.

    Raises `WorkdirError` where a folder holds no readable run, `ConfigError` for fewer than two runs or names that are alike.
    """
    if len(folders) < 2:
        raise ConfigError(
            f"--runs={','.join(map(str, folders))}: a comparison needs two folders or more, with commas between them"
        )
    found = [runs.read(folder) for folder in folders]
    for run in found:
        if run.state in (State.NOT_RUN, State.DAMAGED):
            raise workdir.WorkdirError(f"{run.folder}: {run.why or 'it holds no run (no run.json)'}")
    names = distinct_names(folders)
    facts, config = facts_of(found), config_differences([run.config for run in found])
    text = as_markdown(names, facts, config)
    print(text)
    html = page.environment().get_template("comparison.html")
    styles = {name: plots.style(i) for i, name in enumerate(names)}
    texts = {
        "md": text,
        "html": html.render(names=names, runs=found, facts=facts, config=config, styles=styles, panels_of=panels(found)),
    }
    for suffix, content in texts.items():
        workdir.write_text(out / f"comparison.{suffix}", content)
    return [out / f"comparison.{suffix}" for suffix in texts]


def distinct_names(folders: Sequence[pathlib.Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError("--runs names one folder twice")
    depth = next(n for n in range(1, 100) if len({path.parts[-n:] for path in paths}) == len(paths))
    return ["/".join(path.parts[-depth:]) for path in paths]


def facts_of(found: Sequence[Run]) -> dict[str, list[str]]:
    """Name of a fact -> what it is for each run; facts that are unknown for all of them are left out."""
    rows: dict[str, list[str]] = {"state": [f"{run.state} ({run.why})" if run.why else str(run.state) for run in found]}
    for split in ("test", "valid"):
        rows[f"{split} metric"] = [_scores(run, split) for run in found]
    rows["steps"] = [f"{run.step:,}" for run in found]
    for key, name in (("steps_per_second", "steps/s"), ("tokens_per_second", "tokens/s"), ("input_wait", "input wait, s a step")):
        rows[name] = [MISSING if (rate := run.rate(key)) is None else _figure(rate) for run in found]
    measured = []
    for run in found:
        print(f"compiling the training step of {run.folder}", flush=True)
        measured.append(costs.measure(run.config))
    rows["parameters"] = [f"{cost['parameters']:,}" for cost in measured]
    bound = [">= " if cost["flops_loops"] else "" for cost in measured]
    rows["FLOPs a token, training"] = [f"{least}{cost['flops_per_token']:,.0f}" for least, cost in zip(bound, measured)]
    rows["memory of the step, MB"] = [f"{cost['step_bytes'] / 2**20:,.1f}" for cost in measured]
    rows["commit"] = [(run.info.get("commit") or "none")[:12] + (" (dirty)" if run.info.get("dirty") else "") for run in found]
    rows["device"] = [
        f"{run.info.get('device_count', 1)} x {run.info.get('device_kind')}, {run.info.get('cpu')}" for run in found
    ]
    return {name: values for name, values in rows.items() if set(values) != {MISSING}}


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _scores(run: Run, split: str) -> str:
    values = run.values(f"{split}_{run.metric}")
    return f"{run.metric} {', '.join(f'{value:.4g}' for value in values)}" if values else MISSING


def config_differences(configs: Sequence[runs.Config]) -> dict[str, list[Any]]:
    """Dotted field -> its value in each configuration, of the fields in which any differs from the first."""
    fields = {field for config in configs[1:] for field in differences(configs[0], config)}
    return {field: [_value(config, field) for config in configs] for field in sorted(fields)}


def _value(config: runs.Config, field: str) -> Any:
    node: Any = config
    for key in field.split("."):
        node = node.get(key, MISSING) if isinstance(node, dict) else MISSING
    return node


def as_markdown(names: Sequence[str], facts: dict[str, list[str]], config: dict[str, list[Any]]) -> str:
    rows = [[name, *values] for name, values in facts.items()]
    tables = [markdown.table(["", *names], rows)]
    if config:
        tables.append(markdown.table(["config", *names], [[f"`{k}`", *map(str, values)] for k, values in config.items()]))
    else:
        tables.append("The configurations are equal.")
    return "\n\n".join(tables) + "\n"


def panels(found: Sequence[Run]) -> list[page.Panel]:
    """Loss and metric on both splits against steps; floors of the first run's task where all have one task's data."""
    keys = dict.fromkeys(f"{split}_{name}" for name in ("loss", *(run.metric for run in found)) for split in ("valid", "train"))
    one_task = len({run.info.get("data") for run in found}) == 1
    panels = []
    for key in keys:
        percent = key.endswith("accuracy")
        scale = 100.0 if percent else 1.0
        lines = [
            Line(plots.style(i), [(step, scale * value) for step, value in points])
            for i, run in enumerate(found)
            for points in run.curves(key)
        ]
        floors = curves.task_of(dict(found[0].info)).floors if one_task and key == "valid_accuracy" else {}
        if lines:
            floors = {name: 100 * value for name, value in floors.items()}
            panels.append((key.replace("_", " "), Markup(plots.curves(lines, floors, percent))))
    return panels
