"""What a run's folder says: its configuration, its curve, its test score, and whether that score may stand in a table.

Nothing here writes, compiles or raises for what it finds in a folder: a run that is missing, damaged, not over or of another
protocol is a `Run` whose `state` says so and whose `why` says it to people.
"""

import dataclasses
import enum
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_attn import tasks, workdir
from efficient_attn.arguments import ConfigError
from efficient_attn.config import TrainConfig, differences, with_defaults
from efficient_attn.training import Progress

Config = Mapping[str, Any]


class State(enum.StrEnum):
    """Of these only a finished run has a score that counts."""

    FINISHED = "finished"
    NOT_RUN = "not run"
    RUNNING = "running"
    UNFINISHED = "unfinished"
    NOT_SCORED = "not scored"
    FAILED = "failed"
    DAMAGED = "damaged"
    OTHER_PROTOCOL = "other protocol"


DISPLAY_ONLY = frozenset(
    {"train.tensorboard", "train.wandb", "train.prefetch", "train.log_every", "train.checkpoint_every", "task.data_dir"}
)
"""Fields of a configuration that change nothing that is reported: two runs that differ in these are of one protocol, as are two
on different meshes of devices."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One folder. info: run.json. rows: metrics.jsonl. score: eval.json. lengths: the rows of lengths.json, scores at other
    lengths. analyses: the rows of each analysis/NAME.json, by its name. All are empty where the folder has none.
    """

    folder: pathlib.Path
    state: State
    why: str = ""
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    score: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lengths: Sequence[Mapping[str, Any]] = ()
    analyses: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.info.get("config", {})

    @property
    def metric(self) -> str:
        """The number that the run's task selects by and is reported with."""
        return tasks.TASKS[self.config["task"]["name"]].metric

    def values(self, key: str) -> list[float]:
        """An entry of eval.json, such as "test_accuracy", for each seed that has a finite one."""
        return [value for value in by_seed(self.score, key) if is_finite(value)]

    @property
    def step(self) -> int:
        """The last step that a line of metrics tells of."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def last_evaluation(self) -> int:
        """The last step that was evaluated on validation."""
        return max((row["step"] for row in self.rows if any(name.startswith("valid_") for name in row)), default=0)

    def curves(self, key: str) -> list[list[tuple[int, float]]]:
        """(step, value) of every line that has `key`, such as "valid_accuracy": a curve for each seed that the run trains."""
        found: dict[int, list[tuple[int, float]]] = {}
        for row in self.rows:
            for i, value in enumerate(by_seed(row, key)):
                if is_finite(value):
                    found.setdefault(i, []).append((row["step"], value))
        return list(found.values())

    def rate(self, key: str) -> float | None:
        """The median of a rate over the lines of metrics: "steps_per_second" or "tokens_per_second"."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return statistics.median(values) if values else None


def read(folder: pathlib.Path, expected: Config | None = None) -> Run:
    """The run in `folder`; with `expected`, a configuration in normal form, only one of that protocol counts as finished."""
    try:
        info = workdir.read_json(folder / "run.json")
        rows = workdir.MetricsFile(folder / "metrics.jsonl").read()
        score = workdir.read_json(folder / "eval.json") if (folder / "eval.json").exists() else {}
        lengths = _rows(folder / "lengths.json") if (folder / "lengths.json").exists() else []
        analyses = {path.stem: _rows(path) for path in sorted(folder.glob("analysis/*.json"))}
        run = Run(folder, State.FINISHED, "", info, rows, score, lengths, analyses)
        state, why = _judge(run, tasks.TASKS[info["config"]["task"]["name"]], expected)
    except (FileNotFoundError, NotADirectoryError):
        return Run(folder, State.NOT_RUN)
    except workdir.WorkdirError as error:
        return Run(folder, State.DAMAGED, str(error))
    except OSError as error:
        return Run(folder, State.DAMAGED, f"cannot read {error.filename}: {error.strerror}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # JSON, but of another shape than a run writes
        return Run(folder, State.DAMAGED, f"run.json or eval.json is not a run's: {type(error).__name__} {error}")
    return dataclasses.replace(run, state=state, why=why)


def _judge(run: Run, task: type[tasks.Task], expected: Config | None) -> tuple[State, str]:
    """The state of a run whose files can be read."""
    if expected is not None and (other := other_protocol(expected, run.config)):
        return State.OTHER_PROTOCOL, other
    if workdir.holder(run.folder):
        return State.RUNNING, f"at step {run.step:,} of {run.info['steps']:,}"
    if not is_over(run, task):
        return State.UNFINISHED, f"ends at step {run.step:,} of {run.info['steps']:,}; the same command continues it"
    if not run.score:
        return State.NOT_SCORED, f"run: python eval.py --workdir={run.folder}"
    step = run.score.get("step")
    if run.score.get("data") != run.info.get("data"):
        return State.DAMAGED, f"eval.json scores the data {run.score.get('data')}, the run's are {run.info.get('data')}"
    if step not in {row["step"] for row in run.rows}:
        return State.DAMAGED, f"eval.json scores step {step}, of which metrics.jsonl knows nothing"
    if better := better_step(run, task):
        return (
            State.NOT_SCORED,
            f"eval.json scores step {step}, and step {better} is better; run: python eval.py --workdir={run.folder}",
        )
    scores = by_seed(run.score, f"test_{task.metric}")
    if wrong := _not_scores(scores, run.config["train"].get("replicas", 1), task.metric):
        return State.DAMAGED, f"eval.json: {wrong}"
    if not any(map(is_finite, scores)):
        return State.FAILED, f"the test {task.metric} is {run.score.get(f'test_{task.metric}')}"
    return State.FINISHED, ""


def _not_scores(scores: Any, seeds: int, metric: str) -> str:
    """Why these are not the scores of so many seeds; empty where they are. None stands for one that is not finite."""
    if not isinstance(scores, list) or len(scores) != seeds:
        return f"{len(scores) if isinstance(scores, list) else scores!r} scores for {seeds} seed(s)"
    for score in scores:
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if score is not None and (not is_number or (metric == "accuracy" and not 0 <= score <= 1)):
            return f"{score!r} is no {metric}"
    return ""


def by_seed(row: Mapping[str, Any], key: str) -> list[Any]:
    """What a line of metrics or a score says of each seed that the run trains; empty where it has no such entry."""
    return row.get(f"{key}_by_seed", [row[key]] if key in row else [])


def other_protocol(expected: Config, config: Config) -> str:
    """In which fields, of those on which results depend, a run's configuration is not the expected one; empty if in none.

    Fields that the run's configuration lacks are younger than it: the run had their defaults.
    """
    try:
        found = differences(expected, config) and differences(expected, with_defaults(config))
    except ConfigError as error:
        return f"its configuration is of another version of this code: {error}"
    pairs = {field: pair for field, pair in found.items() if field not in DISPLAY_ONLY and not field.startswith("sharding.")}
    return "; ".join(f"{field} is {was!r}, here {due!r}" for field, (due, was) in pairs.items())


def is_over(run: Run, task: type[tasks.Task]) -> bool:
    """Whether the metrics reach the last step, or a criterion that ends the run earlier."""
    if run.step >= run.info["steps"]:
        return True
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    train = TrainConfig(**{name: value for name, value in run.config["train"].items() if name in known})
    progress = Progress()
    for row in run.rows:
        if (values := by_seed(row, f"valid_{task.metric}")) and all(map(is_finite, values)):
            progress.note_evaluation(row["step"], values, task.metric_mode)
    return bool(progress.why_finished(task, train))


def better_step(run: Run, task: type[tasks.Task]) -> int | None:
    """The best of the steps evaluated since the run was scored that are better than the scored one; None where there is none."""
    key, sign = f"valid_{task.metric}", 1 if task.metric_mode == "max" else -1
    values = {row["step"]: sign * row[key] for row in run.rows if is_finite(row.get(key))}
    until, reached = run.score.get("evaluated_until") or run.score["step"], values.get(run.score["step"], -math.inf)
    return max((step for step, value in values.items() if step > until and value > reached), key=values.get, default=None)


def _rows(path: pathlib.Path) -> list[Mapping[str, Any]]:
    """The rows of scores at other lengths or of an analysis. Raises `WorkdirError` where the file has none."""
    content = workdir.read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise workdir.WorkdirError(f"{path} has no rows of figures: it was edited or damaged")
    return rows


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
