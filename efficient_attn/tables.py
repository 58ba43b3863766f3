"""A published table as a configuration: which runs make its cells, and what its papers print there.

A table is a file `configs/tables/NAME.py` with a docstring (the papers, the command, the expected time) and

    TITLE      one line
    METRIC     a `Metric`: which entry of a run's eval.json is the figure, and in what unit
    SCALES     scale -> one sentence: "paper" is as published, "cpu" is small enough to run whole on two cores
    PROTOCOLS  name -> `Protocol`: what the figures of one section have in common; figures of two protocols never share a section
    PUBLISHED  protocol -> row -> column -> `Published`
    sweep(scale) -> iterable of `Cell`, every run that the table needs at that scale
    RUNS       the name of the table whose folder of runs this one shares, if it does
    ORDERINGS  the published orderings that are tested on our figures, if any
    measured(scale) -> protocol -> row -> column -> figure, only where a benchmark and not runs make the figures; `MEASURED_BY` is
               then the benchmark's command

Only `sweep` is needed, as a grid of one's own has it: then the docstring's first line or the file's name is the title, the figure
is the test accuracy, the only scale is "paper", each protocol that a cell names has the columns of its cells, and nothing is
published. Rows and columns are strings. Of a published figure that no cell makes, the protocol says why (`Absent`).
"""

import dataclasses
import importlib.util
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import ml_collections

from efficient_attn.arguments import ConfigError, suggest

ROOT = pathlib.Path(__file__).resolve().parent.parent
"""The checkout: paths of configuration files are relative to it, and commands run in it."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?")

Override = str | int | float | bool
Place = tuple[str, str, str]
"""Protocol, row and column of a figure."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """`key` of eval.json times `scale` is the figure, in `unit`; `better` says which end is. change: the figure is what an
    intervention does to a score; it tells how a model works, and no row is the best of it.
    """

    key: str = "test_accuracy"
    unit: str = "%"
    scale: float = 100.0
    better: Literal["max", "min"] = "max"
    change: bool = False


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure digit for digit as printed, in the metric's unit, or a word ("FAIL", "OOM"). std: its deviation, as printed too.
    source: paper and table. note: what differs in it.
    """

    value: str
    source: str
    std: str = ""
    note: str = ""

    @property
    def number(self) -> float | None:
        """None for a word."""
        return float(self.value) if _NUMBER.fullmatch(self.value) else None

    @property
    def decimals(self) -> int:
        """How many are printed."""
        return len(self.value.partition(".")[2])


@dataclasses.dataclass(frozen=True)
class Absent:
    """Why nothing makes the figures of some rows and columns, by default of all that are published. word: what they say."""

    why: str
    of: tuple[str, ...] = ()
    word: str = "no recipe"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What the figures of one section of a table have in common.

    scale: the scale whose runs follow it. facts: sentences (which split selected the checkpoint, which tasks an average is over).
    columns: in order. average: the columns of the mean in the last column; () for none. floors: column -> what simple rules
    reach, by their names, in the metric's unit. beside: the protocol whose published figures are shown for context where this
    one has none; they are not its own. metric: where it is not the table's.
    """

    title: str
    columns: tuple[str, ...]
    facts: tuple[str, ...] = ()
    scale: str = "paper"
    average: tuple[str, ...] = ()
    floors: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    beside: str = ""
    metric: Metric | None = None
    absent: tuple[Absent, ...] = ()

    def absence(self, row: str, column: str, *, published: bool) -> Absent | None:
        """Why nothing makes this figure; None where nothing is published and no reason is given."""
        named = (reason for reason in self.absent if {row, column} & {*reason.of} or (published and not reason.of))
        return next(named, Absent("this table has no run of it") if published else None)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A figure that an analysis of the run makes: `key` of the rows, one a seed, of analysis/NAME.json with these values."""

    analysis: str
    key: str
    where: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Ordering:
    """A published claim that one figure is better than another, to be tested on ours. better, worse: their places."""

    claim: str
    source: str
    better: Place
    worse: Place


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of a table.

    config: "configs/FILE.py:RECIPE". overrides: dotted fields below `config` -> values. seed, replicas: the run trains the seeds
    seed, ..., seed + replicas - 1 as one program (`train.replicas`). choice: where several runs are candidates for one figure,
    what tells them apart ("lr=1e-3"); the mean validation metric chooses. lengths: further columns that the same run fills, and
    the length of the test sequences it is scored on there (`efficient_attn.reporting.lengths`). findings: places that
    analyses of the run fill, its own too, also under other protocols of its scale; `tokens` of the test text are analysed.
    """

    config: str
    row: str
    column: str
    protocol: str
    overrides: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    seed: int = 0
    replicas: int = 1
    choice: str = ""
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    findings: Mapping["Place", Finding] = dataclasses.field(default_factory=dict)
    tokens: int = 2**15

    @property
    def places(self) -> list["Place"]:
        """Of every figure that the run makes."""
        own = [(self.protocol, self.row, column) for column in (self.column, *self.lengths)]
        return list(dict.fromkeys([*own, *self.findings]))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.replicas))

    def all_overrides(self) -> dict[str, Override]:
        """`overrides` and the seeds."""
        replicas = {"train.replicas": self.replicas} if self.replicas > 1 else {}
        return {"seed": self.seed, **replicas, **self.overrides}

    def workdir(self, root: pathlib.Path | str) -> pathlib.Path:
        """The run's folder below `root`, a folder of the table: PROTOCOL/ROW-COLUMN-CHOICE-sSEED."""
        seeds = f"s{self.seed}" if self.replicas == 1 else f"s{self.seed}-{self.seeds[-1]}"
        parts = [_slug(part) for part in (self.row, self.column, self.choice) if part]
        return pathlib.Path(root) / _slug(self.protocol) / "-".join([*parts, seeds])

    def command(self, root: pathlib.Path | str) -> list[str]:
        """The training command; `shlex.join` of it can be pasted into a shell at the checkout's root."""
        overrides = [f"--config.{field}={value}" for field, value in self.all_overrides().items()]
        return ["python", "train.py", f"--config={self.config}", *overrides, f"--workdir={self.workdir(root)}"]

    def commands(self, root: pathlib.Path | str) -> list[list[str]]:
        """All commands of the cell, to be run one after another: train, score, score at other lengths."""
        folder = self.workdir(root)
        commands = [self.command(root), ["python", "eval.py", f"--workdir={folder}"]]
        if self.lengths:
            lengths = ",".join(map(str, self.lengths.values()))
            tool = ["python", "-m", "efficient_attn.reporting.lengths"]
            commands.append([*tool, f"--workdirs={folder}", f"--lengths={lengths}", f"--out={folder / 'lengths'}"])
        for name in dict.fromkeys(finding.analysis for finding in self.findings.values()):
            options = [f"--analysis={name}", "--split=test", f"--tokens={self.tokens}"]
            commands.append(["python", "eval.py", f"--workdir={folder}", *options])
        return commands

    def get_config(self) -> ml_collections.ConfigDict:
        """The run's complete configuration. Raises `ConfigError` for a file, recipe, field or value that is wrong."""
        file, _, recipe = self.config.partition(":")
        module = load_module(ROOT / file)
        config = module.get_config(recipe) if recipe else module.get_config()
        for field, value in self.all_overrides().items():
            _set(config, field, value)
        return config


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9=.+_]+", "_", text).strip("_")


def _set(config: ml_collections.ConfigDict, field: str, value: Override) -> None:
    *parents, last = field.split(".")
    node: Any = config
    for key in parents:
        node = node[key] if isinstance(node, ml_collections.ConfigDict) and key in node else None
    known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
    if last not in known:
        raise ConfigError(f"the configuration has no field {field}{suggest(last, known)}")
    try:
        node[last] = value
    except TypeError as error:
        raise ConfigError(f"{field}={value!r} has the wrong type: {error}") from error


@dataclasses.dataclass(frozen=True)
class Table:
    """A loaded table. root: where its runs are by default. cells: by scale; measured: of a scale, by protocol, row and column."""

    name: str
    path: pathlib.Path
    root: pathlib.Path
    doc: str
    title: str
    metric: Metric
    scales: Mapping[str, str]
    protocols: Mapping[str, Protocol]
    published: Mapping[str, Mapping[str, Mapping[str, Published]]]
    cells: Mapping[str, tuple[Cell, ...]]
    measured: Callable[[str], Mapping[str, Mapping[str, Mapping[str, float]]]]
    measured_by: str = ""
    orderings: tuple[Ordering, ...] = ()

    def protocols_of(self, scale: str) -> list[str]:
        return [name for name, protocol in self.protocols.items() if protocol.scale == scale]

    def rows(self, protocol: str) -> list[str]:
        """Rows of a section: those published under it or beside it, then those that only runs make."""
        shown = [protocol, *filter(None, [self.protocols[protocol].beside])]
        published = [row for name in shown for row in self.published.get(name, {})]
        places = [place for cells in self.cells.values() for cell in cells for place in cell.places]
        run = [row for name, row, _ in places if name == protocol]
        return list(dict.fromkeys([*published, *run, *self.measured(self.protocols[protocol].scale).get(protocol, {})]))


def published(
    columns: Sequence[str], source: str, rows: Mapping[str, str], notes: Mapping[str, str] | None = None
) -> dict[str, dict[str, Published]]:
    """Rows of figures as printed, one for each column with blanks between: "71.40", "94.20±0.25", a word, or "-" for nothing.

    notes: by column, of all rows. Raises `ConfigError` where a row has not a figure for each column.
    """
    table: dict[str, dict[str, Published]] = {}
    for row, line in rows.items():
        if len(cells := line.split()) != len(columns):
            raise ConfigError(f"{source}: the row {row!r} has {len(cells)} figures for {len(columns)} columns")
        printed = {column: cell.partition("±") for column, cell in zip(columns, cells) if cell != "-"}
        about = notes or {}
        table[row] = {c: Published(value, source, std, about.get(c, "")) for c, (value, _, std) in printed.items()}
    return table


def load_module(path: pathlib.Path) -> types.ModuleType:
    """The module in the file `path`. Raises `ConfigError` where there is none."""
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(
            f"there is no configuration file {path}{suggest(path.name, (p.name for p in path.parent.glob('*.py')))}"
        )
    spec = importlib.util.spec_from_file_location(f"configuration_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_root(path: pathlib.Path, module: types.ModuleType) -> pathlib.Path:
    """The folder of the runs of a table or a grid: runs/NAME, or that of the table whose runs it shares."""
    return pathlib.Path("runs") / getattr(module, "RUNS", path.stem)


FIELDS: Mapping[str, type] = {
    "TITLE": str, "METRIC": Metric, "SCALES": Mapping, "PROTOCOLS": Mapping, "PUBLISHED": Mapping, "sweep": Callable,
}  # fmt: skip


def load(path: pathlib.Path | str) -> Table:
    """The table in a file. Raises `ConfigError`, in one line, for whatever is missing or contradicts itself."""
    path = pathlib.Path(path)
    module = load_module(path)
    fields = {name: getattr(module, name) for name in FIELDS if hasattr(module, name)}
    if "sweep" not in fields:
        raise ConfigError(
            f"{path} is not a table: it has no function sweep(scale) that yields cells (efficient_attn.tables.Cell)"
        )
    for name, value in fields.items():
        if not isinstance(value, FIELDS[name]):
            raise ConfigError(f"{path} is not a table: its {name} is not a {FIELDS[name].__name__}")
    scales = fields.get("SCALES", {"paper": ""})
    cells = {scale: tuple(module.sweep(scale)) for scale in scales}
    if stray := [cell for of_scale in cells.values() for cell in of_scale if not isinstance(cell, Cell)]:
        raise ConfigError(f"{path}: sweep(scale) must yield cells (efficient_attn.tables.Cell), got {stray[0]!r}")
    doc = module.__doc__ or path.name
    table = Table(
        name=path.stem, path=path, root=default_root(path, module), doc=doc, title=fields.get("TITLE", doc.splitlines()[0]),
        metric=fields.get("METRIC", Metric()), scales=scales, protocols=fields.get("PROTOCOLS") or _protocols(cells),
        published=fields.get("PUBLISHED", {}), cells=cells,
        measured=getattr(module, "measured", lambda scale: {}), measured_by=getattr(module, "MEASURED_BY", ""),
        orderings=getattr(module, "ORDERINGS", ()),
    )  # fmt: skip
    for name, protocol in table.protocols.items():
        _check_protocol(table, name, protocol)
    for scale, cells in table.cells.items():
        _check_cells(table, scale, cells)
    _check_orderings(table)
    return table


def _protocols(cells: Mapping[str, Iterable[Cell]]) -> dict[str, Protocol]:
    """The protocols that the cells name, each with the columns of its cells."""
    columns: dict[tuple[str, str], dict[str, None]] = {}
    for scale, of_scale in cells.items():
        for cell in of_scale:
            columns.setdefault((cell.protocol, scale), {}).update(dict.fromkeys((cell.column, *cell.lengths)))
    return {name: Protocol(name, tuple(found), scale=scale) for (name, scale), found in columns.items()}


def _check_protocol(table: Table, name: str, protocol: Protocol) -> None:
    where = f"{table.path}: protocol {name!r}"
    if protocol.scale not in table.scales:
        raise ConfigError(f"{where} is of scale {protocol.scale!r}, not one of SCALES: {', '.join(table.scales)}")
    if protocol.beside and protocol.beside not in table.protocols:
        raise ConfigError(f"{where} stands beside {protocol.beside!r}{suggest(protocol.beside, table.protocols)}, which is none")
    if unknown := {*protocol.average, *protocol.floors} - {*protocol.columns}:
        raise ConfigError(f"{where}: average or floors of {sorted(unknown)}, which are no columns")
    for row, values in table.published.get(name, {}).items():
        if unknown := [column for column in values if column not in protocol.columns]:
            raise ConfigError(
                f"{where}: PUBLISHED has {row!r} at {unknown[0]!r}{suggest(unknown[0], protocol.columns)}: no column"
            )
    known = {*protocol.columns, *table.rows(name)}
    if unknown := [part for reason in protocol.absent for part in reason.of if part not in known]:
        raise ConfigError(f"{where}: absent names {unknown[0]!r}{suggest(unknown[0], known)}, which is no row or column")
    if stray := set(table.published) - set(table.protocols):
        raise ConfigError(f"{table.path}: PUBLISHED has the protocols {sorted(stray)}, which PROTOCOLS has not")


def _check_cells(table: Table, scale: str, cells: Iterable[Cell]) -> None:
    folders: dict[pathlib.Path, Cell] = {}
    for cell in cells:
        where = f"{table.path}: the cell {cell.row!r} x {cell.column!r}"
        for name, _, column in cell.places:
            protocol = table.protocols.get(name)
            if protocol is None or protocol.scale != scale:
                raise ConfigError(f"{where} of scale {scale!r} has protocol {name!r}, which is none of that scale")
            if column not in protocol.columns:
                raise ConfigError(f"{where}: {column!r} is no column{suggest(column, protocol.columns)}")
        if cell.workdir("") in folders:
            raise ConfigError(f"{where} and {folders[cell.workdir('')].config} would share the folder {cell.workdir('')}")
        folders[cell.workdir("")] = cell


def _check_orderings(table: Table) -> None:
    for ordering in table.orderings:
        where = f"{table.path}: the ordering {ordering.claim!r}"
        made = {place for cells in table.cells.values() for cell in cells for place in cell.places}
        if unknown := [place for place in (ordering.better, ordering.worse) if place not in made]:
            raise ConfigError(f"{where} names {' x '.join(unknown[0])}, which no run makes")
