"""From a table and the folders of its runs to figures: mean and standard deviation over seeds, beside what papers print.

Only finished runs of the cell's own protocol count. Where several runs are candidates for one figure (learning rates), the mean
validation metric chooses among those whose seeds all finished; only where there are none, among those with failed seeds.
"""

import collections
import copy
import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from efficient_attn import runs, workdir
from efficient_attn.arguments import ConfigError, suggest
from efficient_attn.config import normal_form
from efficient_attn.runs import Run, State
from efficient_attn.tables import ROOT, Absent, Cell, Metric, Place, Protocol, Published, Table

Member = tuple[Cell, Run]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The runs of one choice for a figure. scores, validation: of the seeds that finished, scores in the metric's unit.

    diverged: how many seeds finished with a score that is not finite.
    """

    choice: str
    members: tuple[Member, ...]
    scores: tuple[float, ...]
    validation: tuple[float, ...]
    diverged: int = 0

    @property
    def expected(self) -> int:
        return sum(cell.replicas for cell, _ in self.members)

    @property
    def states(self) -> collections.Counter:
        """How many seeds are at each state; of a finished run those that diverged failed, and others may not be scored here."""
        counts = _states(self.members)
        counts[State.FAILED] += self.diverged
        counts[State.NOT_SCORED] += self.unscored
        counts[State.FINISHED] = len(self.scores)
        return +counts

    @property
    def unscored(self) -> int:
        """How many seeds of finished runs have no score in this place."""
        return _states(self.members)[State.FINISHED] - len(self.scores) - self.diverged

    @property
    def lost(self) -> list[str]:
        """Why seeds of the figure are missing: each reason once, with the folders of its runs below the table's."""
        reasons: dict[str, list[str]] = {}
        for _, run in self.members:
            if run.state != State.FINISHED:
                reason = f"{run.state} ({run.why})" if run.why else str(run.state)
                reasons.setdefault(reason, []).append(f"{run.folder.parent.name}/{run.folder.name}")
        counts = {"diverged": self.diverged, "not scored": self.unscored}
        named = [f"{reason}: {', '.join(names)}" for reason, names in sorted(reasons.items())]
        return named + [f"{n} {what}" for what, n in counts.items() if n]

    def rank(self, metric: Metric) -> tuple[int, float]:
        """Larger is better: first that no seed is missing, then the mean validation metric."""
        mean = statistics.fmean(self.validation) if self.validation else -math.inf
        return (len(self.scores) == self.expected, mean if metric.better == "max" else -mean)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One cell of a section. published: as printed under this protocol; beside: under the one it stands beside.

    measured: a benchmark's figure, where there are no runs. absent: why there is neither.
    """

    row: str
    column: str
    metric: Metric
    candidates: tuple[Candidate, ...] = ()
    published: Published | None = None
    beside: Published | None = None
    measured: float | None = None
    absent: Absent | None = None

    @property
    def chosen(self) -> Candidate | None:
        """The candidate whose scores are the figure; None while no run is finished."""
        whole = [candidate for candidate in self.candidates if candidate.scores]
        return max(whole, key=lambda c: c.rank(self.metric)) if whole else None

    @property
    def scores(self) -> tuple[float, ...]:
        """In the metric's unit, of the seeds that finished."""
        return self.chosen.scores if self.chosen else ()

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else self.measured

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None for fewer than two seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def expected(self) -> int:
        """Seeds of the figure when all have run."""
        return self.chosen.expected if self.chosen else max((c.expected for c in self.candidates), default=0)

    @property
    def failed(self) -> int:
        return self.chosen.states[State.FAILED] if self.chosen else sum(c.states[State.FAILED] for c in self.candidates)

    @property
    def difference(self) -> float | None:
        """Ours minus published; only where both are numbers of one protocol."""
        printed = self.published.number if self.published else None
        return None if self.mean is None or printed is None else self.mean - printed

    @property
    def status(self) -> str:
        """A word why there is no figure; empty where there is one, and where none is published or made."""
        if self.mean is not None:
            return ""
        if not self.candidates:
            return self.absent.word if self.absent else ""
        states = sum((candidate.states for candidate in self.candidates), collections.Counter())
        if len(states) == 1:
            return str(next(iter(states)))
        return ", ".join(f"{n} {state}" for state, n in sorted(states.items(), key=lambda item: list(State).index(item[0])))

    @property
    def notes(self) -> list[str]:
        """What a reader of the figure must know: seeds that are missing and why, how it was chosen."""
        notes = [self.absent.why] if self.absent else []
        if self.chosen and len(self.scores) < self.expected:
            notes.append(f"{len(self.scores)} of {self.expected} seeds: {'; '.join(self.chosen.lost)}")
        if self.chosen and len(self.candidates) > 1:
            lost = [reason for candidate in self.candidates if candidate is not self.chosen for reason in candidate.lost]
            without = f", without {'; '.join(lost)}" if lost else ""
            notes.append(f"{self.chosen.choice}: best on validation of {len(self.candidates)}{without}")
        if not self.chosen and not self.candidates_are(State.NOT_RUN):
            notes.append("; ".join(reason for candidate in self.candidates for reason in candidate.lost))
        return notes

    def candidates_are(self, state: State) -> bool:
        """Whether every seed of every candidate is at `state`."""
        return all(candidate.states.keys() <= {state} for candidate in self.candidates)


FORMED = "formed here from the published figures beside it"
"""The source of averages that are not those which papers print."""


@dataclasses.dataclass(frozen=True)
class Section:
    """The figures of one protocol. figures: row -> column -> figure, every column of the protocol in every row.

    measured_by: the command of the benchmark that makes ours; empty where runs do.
    """

    name: str
    protocol: Protocol
    metric: Metric
    figures: Mapping[str, Mapping[str, Figure]]
    measured_by: str = ""

    def __iter__(self) -> Iterator[Figure]:
        return (figure for row in self.figures.values() for figure in row.values())

    def is_best(self, figure: Figure) -> bool:
        """Whether ours is the best of its column, or no further from it than the larger of the two standard deviations.

        False where a deviation is not known, as for one seed, where nothing is there to be compared with, and of changes.
        """
        rivals = [row[figure.column] for row in self.figures.values() if row[figure.column].mean is not None]
        if self.metric.change or len(rivals) < 2 or figure.mean is None:
            return False
        best = (max if self.metric.better == "max" else min)(rivals, key=lambda rival: rival.mean)
        return None not in (figure.sd, best.sd) and abs(figure.mean - best.mean) <= max(figure.sd, best.sd)

    def average(self, row: str) -> float | None:
        """Our mean over the protocol's averaged columns; None unless all of them are there."""
        means = [self.figures[row][column].mean for column in self.protocol.average]
        return statistics.fmean(means) if means and None not in means else None

    def published_average(self, row: str) -> Published | None:
        """The same of the published figures, with as many decimals; none where one is missing or a word."""
        cells = [cell for column in self.protocol.average if (cell := self.figures[row][column].published)]
        numbers = [cell.number for cell in cells]
        if not numbers or None in numbers or len(numbers) < len(self.protocol.average):
            return None
        return Published(f"{statistics.fmean(numbers):.{max(cell.decimals for cell in cells)}f}", FORMED)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table with what its runs below `root` say."""

    table: Table
    root: pathlib.Path
    scale: str
    sections: tuple[Section, ...]

    @property
    def command_root(self) -> pathlib.Path:
        """Where commands put runs: in `root`, but in the default folder where `root` is that of committed results."""
        committed = self.root.resolve().is_relative_to(ROOT / "results")
        return self.table.root if committed else self.root

    @property
    def states(self) -> collections.Counter:
        """How many seeds of all candidates are at each state."""
        return _states(self.members)

    @property
    def members(self) -> list[Member]:
        """Every cell once, with its run."""
        candidates = [c for section in self.sections for figure in section for c in figure.candidates]
        return list({run.folder: (cell, run) for c in candidates for cell, run in c.members}.values())


def summarise(table: Table, root: pathlib.Path, scale: str = "") -> Summary:
    """Read every run of `table` below `root`; `scale` "" means every scale, each with sections of its own.

    Raises `ConfigError` for a scale that the table does not have.
    """
    if scale and scale not in table.scales:
        raise ConfigError(f"{table.path} has no scale {scale!r}{suggest(scale, table.scales)}; it has: {', '.join(table.scales)}")
    failures = read_failures(root)
    found = []
    for name in [scale] if scale else table.scales:
        members = [(cell, read_cell(cell, root, failures)) for cell in table.cells[name]]
        found += [_section(table, protocol, members) for protocol in table.protocols_of(name)]
    return Summary(table, root, scale, tuple(found))


def read_cell(cell: Cell, root: pathlib.Path, failures: Mapping[pathlib.Path, str]) -> Run:
    """The run of a cell; one that is not over counts as failed where the sweep's record says so."""
    folder = cell.workdir(root)
    run = runs.read(folder, expected_config(cell)) if folder.exists() else runs.read(folder)
    reason = failures.get(folder)
    if reason is not None and run.state in (State.NOT_RUN, State.UNFINISHED, State.NOT_SCORED):
        return dataclasses.replace(run, state=State.FAILED, why=reason)
    return run


def expected_config(cell: Cell) -> dict[str, Any]:
    """The normal form of `cell.get_config()`, with the work that cells of one recipe share done once."""
    config = copy.deepcopy(_recipe(cell.config))
    for field, value in cell.all_overrides().items():
        *parents, last = field.split(".")
        functools.reduce(lambda node, key: node[key], parents, config)[last] = value
    return config


@functools.cache
def _recipe(config: str) -> dict[str, Any]:
    return normal_form(Cell(config, "", "", "").get_config())


def read_failures(root: pathlib.Path) -> dict[pathlib.Path, str]:
    """Folder -> reason, of the runs that `sweep.json` in `root` records as failed. Raises `WorkdirError` where it is damaged."""
    path = root / "sweep.json"
    if not path.exists():
        return {}
    try:
        records = workdir.read_json(path).get("runs", {})
        return {root / name: record.get("reason", "") for name, record in records.items() if record.get("state") == "failed"}
    except AttributeError as error:
        raise workdir.WorkdirError(f"{path} is not the record of a sweep; remove it, and sweep.py makes it again") from error


def _states(members: Iterable[Member]) -> collections.Counter:
    """How many seeds are at each state."""
    counts: collections.Counter = collections.Counter()
    for cell, run in members:
        counts[run.state] += cell.replicas
    return counts


def _section(table: Table, name: str, members: Sequence[Member]) -> Section:
    protocol = table.protocols[name]
    metric = protocol.metric or table.metric
    measured = table.measured(protocol.scale).get(name, {})
    published, beside = table.published.get(name, {}), table.published.get(protocol.beside, {})
    places: dict[Place, list[Member]] = {}
    for cell, run in members:
        for place in cell.places:
            places.setdefault(place, []).append((cell, run))
    figures: dict[str, dict[str, Figure]] = {}
    has_own = published.keys() | measured.keys() | {row for protocol, row, _ in places if protocol == name}
    for row in (row for row in table.rows(name) if row in has_own):
        for column in protocol.columns:
            printed, ours = published.get(row, {}).get(column), measured.get(row, {}).get(column)
            candidates = _candidates(places.get((name, row, column), ()), (name, row, column), metric)
            nothing = None if candidates or ours is not None else protocol.absence(row, column, published=printed is not None)
            figures.setdefault(row, {})[column] = Figure(
                row, column, metric, candidates, printed, beside.get(row, {}).get(column), ours, nothing
            )
    return Section(name, protocol, metric, figures, table.measured_by if measured else "")


def _candidates(members: Sequence[Member], place: Place, metric: Metric) -> tuple[Candidate, ...]:
    by_choice: dict[str, list[Member]] = {}
    for member in members:
        by_choice.setdefault(member[0].choice, []).append(member)
    found = []
    for choice, chosen in by_choice.items():
        _check_alike([cell for cell, _ in chosen])
        finished = [(cell, run) for cell, run in chosen if run.state == State.FINISHED]
        found_scores = [x for cell, run in finished for x in _scores(cell, run, place, metric)]
        scores = [metric.scale * x for x in found_scores if runs.is_finite(x)]
        validation = [x for _, run in finished for x in run.values(metric.key.replace("test_", "valid_"))]
        found.append(Candidate(choice, tuple(chosen), tuple(scores), tuple(validation), len(found_scores) - len(scores)))
    return tuple(found)


def _check_alike(cells: Sequence[Cell]) -> None:
    """Raise `ConfigError` where a mean would be over runs that differ in more than their seeds."""
    if len({(cell.config, tuple(sorted(cell.overrides.items()))) for cell in cells}) > 1:
        raise ConfigError(
            f"the cells of {cells[0].row!r} x {cells[0].column!r} under {cells[0].protocol!r} differ in more than their seeds: "
            "a mean over them would mix protocols; tell them apart by Cell.choice"
        )


def _scores(cell: Cell, run: Run, place: Place, metric: Metric) -> list[Any]:
    """Of a run's seeds in one place, as far as they are scored: what an analysis says, their own score or one at another length.

    None stands for a score that is not finite.
    """
    column = place[-1]
    if finding := cell.findings.get(place):
        key, where, rows = finding.key, finding.where, run.analyses.get(finding.analysis, ())
    elif column == cell.column:
        return runs.by_seed(run.score, metric.key)
    else:
        key, where, rows = metric.key.removeprefix("test_"), {"length": cell.lengths[column]}, run.lengths
    return [row[key] for row in rows if key in row and where.items() <= row.items()]
