"""The HTML page of a summary: one file, no network, no scripts; everything it shows is escaped."""

import base64
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from efficient_attn.reporting import orderings, plots, text
from efficient_attn.reporting.costs import Cost, Costs
from efficient_attn.reporting.plots import Bubble, Line
from efficient_attn.reporting.summary import Figure, Section, Summary
from efficient_attn.runs import Run, State

TEMPLATES = pathlib.Path(__file__).parent / "templates"

MAPS = "analysis/attention_maps.png"
"""In a run's folder."""

Panel = tuple[str, Markup]
"""Title, and a figure: an SVG, or an image in the page itself."""


def environment() -> jinja2.Environment:
    """Templates that escape whatever is put in, but for the figures made here."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    strict = dict(autoescape=True, undefined=jinja2.StrictUndefined)
    env = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **strict)
    env.globals |= {"text": text, "style": plots.style, "palette": list(plots.palette()), "State": State}
    env.filters |= {"pretty": functools.partial(json.dumps, indent=1), "unbroken": unbroken}
    return env


def unbroken(command: str) -> Markup:
    """A command of which no argument is broken at its hyphens where the line ends."""
    return Markup(" ").join(Markup("<i>{}</i>").format(argument) for argument in command.split(" "))


def render(summary: Summary, costs: Costs, speeds: Mapping[str, Any]) -> str:
    """The page; sections with figures of ours come first.

    costs: by folder of a run, what its training step needs. speeds: by mixer, its cost against length.
    """
    in_order = sorted(summary.sections, key=lambda section: all(figure.mean is None for figure in section))
    views = [SectionView(section, i, summary, costs, speeds) for i, section in enumerate(in_order)]
    return environment().get_template("table.html").render(summary=summary, views=views, verdicts=orderings.judge(summary))


class SectionView:
    """A section with what only a page has: anchors, styles of rows, figures."""

    def __init__(self, section: Section, number: int, summary: Summary, costs: Costs, speeds: Mapping[str, Any]):
        self.section, self.number, self.summary, self.costs, self.speeds = section, number, summary, costs, speeds
        self.percent = section.metric.unit == "%"
        self.floors = text.floor_rows(section)
        self.notes = text.notes(section)
        drawn = [row for row, figures in section.figures.items() if any(f.mean is not None for f in figures.values())]
        self.styles = {row: plots.style(i) for i, row in enumerate(drawn)}

    def anchor(self, figure: Figure) -> str:
        rows, columns = list(self.section.figures), self.section.protocol.columns
        return f"s{self.number}-r{rows.index(figure.row)}-c{columns.index(figure.column)}"

    def cost(self, figure: Figure) -> Cost | None:
        """What a step of the figure's runs needs, where that was measured."""
        members = [member for candidate in figure.candidates for member in candidate.members]
        return next((self.costs[run.folder] for _, run in members if run.folder in self.costs), None)

    @property
    def has_runs(self) -> bool:
        return any(figure.candidates for figure in self.section)

    def _own_runs(self, row: str, column: str) -> list[Run]:
        """The finished runs behind a figure that are of its own place, and do not only fill it."""
        chosen, place = self.section.figures[row][column].chosen, (self.section.name, row, column)
        members = chosen.members if chosen else ()
        return [run for cell, run in members if run.state == State.FINISHED and (cell.protocol, cell.row, cell.column) == place]

    @property
    def curves(self) -> tuple[dict[str, plots.Style], list[Panel]]:
        """The rows that are drawn; a panel for each column: the validation metric of every seed of its runs, against steps."""
        panels, drawn = [], {}
        key = self.section.metric.key.replace("test_", "valid_")
        for column in self.section.protocol.columns:
            lines = []
            for row, style in self.styles.items():
                for points in (points for run in self._own_runs(row, column) for points in run.curves(key) if points):
                    lines.append(Line(style, [(step, self.section.metric.scale * value) for step, value in points]))
                    drawn[row] = style
            if lines:
                floors = self.section.protocol.floors.get(column, {})
                panels.append((column, Markup(plots.curves(lines, floors, self.percent))))
        return drawn, panels if len(panels) > 1 else [("", svg) for _, svg in panels]

    @property
    def trends(self) -> tuple[str, list[Panel]]:
        """The name of the size that the columns vary, and figures against it: a panel for each value of the other sizes."""
        found = {column: sizes for column in self.section.protocol.columns if (sizes := sizes_of(column))}
        names = {tuple(sizes) for sizes in found.values()}
        if len(found) < max(2, len(self.section.protocol.columns)) or len(names) > 1 or len(self.styles) > MOST_LINES:
            return "", []
        *_, last = names.pop()
        groups: dict[str, dict[float, str]] = {}
        for column, sizes in found.items():
            fixed = ", ".join(f"{name} = {value:g}" for name, value in sizes.items() if name != last)
            groups.setdefault(fixed, {})[sizes[last]] = column
        size = SIZES.get(last, last)
        panels = [self._trend(title, columns, size) for title, columns in groups.items() if len(columns) > 1]
        return size, [panel for panel in panels if panel]

    def _trend(self, title: str, columns: Mapping[float, str], size: str) -> Panel | None:
        lines = []
        for row, style in self.styles.items():
            figures = {x: self.section.figures[row][column] for x, column in columns.items()}
            measured = {x: figure for x, figure in figures.items() if figure.mean is not None}
            if measured:
                spread = [figure.sd or 0.0 for figure in measured.values()]
                lines.append(Line(style, [(x, figure.mean) for x, figure in measured.items()], spread if any(spread) else ()))
        if not lines:
            return None
        floors = self.section.protocol.floors.get(next(iter(columns.values())), {})
        log_y = not self.percent and plots.spans_a_decade(lines)
        svg = plots.trend(lines, floors, size, unit=self.section.metric.unit, log_y=log_y)
        return _with_scale(title, log_y), Markup(svg)

    @property
    def states(self) -> list[Panel]:
        """Figures against the bytes that decoding keeps of a sequence: a line for each row, a point for each column."""
        lines = []
        for row, style in self.styles.items():
            figures = [f for f in self.section.figures[row].values() if f.mean is not None and self._own_runs(row, f.column)]
            sized = [(cost["state_bytes"], figure) for figure in figures if (cost := self.cost(figure)) and cost["state_bytes"]]
            if sized:
                lines.append(Line(style, sorted((size, figure.mean) for size, figure in sized)))
        if len(lines) < 2:
            return []
        floors = self.section.protocol.floors.get(self.section.protocol.columns[0], {})
        return [("", Markup(plots.trend(lines, floors, "bytes a sequence", unit=self.section.metric.unit, every_tick=False)))]

    @property
    def bubbles(self) -> list[Panel]:
        """A panel for each column in which several rows ran: figure against training speed, memory as area; none of changes,
        which are no quality.
        """
        if self.section.metric.change:
            return []
        panels = []
        for column in self.section.protocol.columns:
            found = [bubble for row in self.styles if (bubble := self._bubble(row, column))]
            if len(found) > 1:
                panels.append((column, Markup(plots.bubbles(found, "training tokens a second", unit=self.section.metric.unit))))
        return panels

    def _bubble(self, row: str, column: str) -> Bubble | None:
        figure = self.section.figures[row][column]
        rates = [rate for run in self._own_runs(row, column) if (rate := run.rate("tokens_per_second"))]
        if not rates:
            return None
        cost = self.cost(figure)
        area = float(cost["step_bytes"]) if cost else 0.0
        return Bubble(self.styles[row], row, sum(rates) / len(rates), figure.mean, area)

    @property
    def maps(self) -> list[Panel]:
        """Images of attention, of the first finished run behind each figure that `eval.py --analysis=attention` has looked at."""
        found: dict[pathlib.Path, Panel] = {}
        for figure in self.section:
            finished = [run.folder for _, run in figure.chosen.members if run.state == State.FINISHED] if figure.chosen else []
            image = next((path for folder in finished if (path := folder / MAPS).exists()), None)
            if image is not None and image not in found:
                title, data = f"{figure.row}, {figure.column}", base64.b64encode(image.read_bytes()).decode()
                found[image] = (
                    title,
                    Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, f"attention of {title}"),
                )
        return list(found.values())

    @property
    def timed(self) -> dict[str, plots.Style]:
        """The mixers of this section's rows that the benchmark timed, each in the style of the first row that has no other."""
        found: dict[str, plots.Style] = {}
        for row, style in self.styles.items():
            mixers = {mixer for figure in self.section.figures[row].values() for mixer in mixers_of(figure)}
            if len(mixers) == 1 and (name := mixers.pop()) in self.speeds:
                found.setdefault(name, style)
        return found

    @property
    def lengths(self) -> list[Panel]:
        """Milliseconds and megabytes of a training step against length, where there are several mixers."""
        panels, timed = [], self.timed
        for kind, title in (("ms", "milliseconds a step"), ("mb", "megabytes")):
            points = {name: [(int(n), value) for n, value in self.speeds[name][kind].items()] for name in timed}
            lines = [Line(timed[name], found) for name, found in points.items() if found]
            if len(lines) > 1:
                log_y = plots.spans_a_decade(lines)
                panels.append((_with_scale(title, log_y), Markup(plots.trend(lines, {}, "length", unit="", log_y=log_y))))
        return panels


def _with_scale(title: str, log_y: bool) -> str:
    """A panel's title that says where its vertical axis is logarithmic."""
    return f"{title}, logarithmic".removeprefix(", ") if log_y else title


def mixers_of(figure: Figure) -> Sequence[str]:
    """Names of the mixers that the chosen runs of a figure have."""
    runs = [run for _, run in figure.chosen.members if run.config] if figure.chosen else []
    found: dict[str, None] = {}
    for run in runs:
        mixer = run.config["model"].get("mixer", {})
        found |= {m["name"]: None for m in (mixer if isinstance(mixer, list) else [mixer]) if "name" in m}
    return list(found)


MOST_LINES = 16
"""More rows than this on one panel are told apart by the table alone."""

SIZES = {"L": "length", "d": "width", "N": "state size", "n": "first tokens changed"}
"""What the letters in columns' names stand for."""


def sizes_of(column: str) -> dict[str, float]:
    """The sizes that a column's name states: "L=64 d=128", or one length alone, "4K" or "512"; empty where it states none."""
    if match := re.fullmatch(r"(\d+)(K?)", column):
        return {"length": float(match[1]) * (1024 if match[2] else 1)}
    pairs = re.findall(r"(\w+)\s*=\s*(\d+(?:\.\d+)?)", column)
    return {name: float(value) for name, value in pairs}
