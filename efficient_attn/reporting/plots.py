"""Figures of a report page: small SVGs that take their colours and their font from the page, so that they follow its theme.

Rows of a table keep one style on all figures of a section: `style(i)`. What the colours stand for is said once, in HTML.
"""

import dataclasses
import io
import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Number = int | float
Points = Sequence[tuple[Number, Number]]

COLOURS = 7
DASHES = ("", "5 2", "1.2 1.8", "7 2 1.2 2")
INK = "#a1b2f0"
_MARKED = re.compile(r"#a1b2(f0|0[0-6])")

PANEL = (3.5, 2.45)
"""Inches. A page scales a panel to its column; text of 8 points is then 11 to 13 pixels high."""

matplotlib.rcParams["svg.hashsalt"] = "report"
RC = {
    "font.size": 8, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 3, "ytick.major.size": 0, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.6, "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.5, "axes.axisbelow": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Style:
    """How a row is drawn: a colour of the page's palette (colour-blind safe; 0 to 6) and a dash pattern in points."""

    colour: int
    dash: str

    @property
    def hex(self) -> str:
        return f"#a1b2{self.colour:02x}"

    @property
    def line(self) -> Any:
        return (0, tuple(float(x) for x in self.dash.split())) if self.dash else "-"


def style(i: int) -> Style:
    return Style(i % COLOURS, DASHES[i // COLOURS % len(DASHES)])


@dataclasses.dataclass(frozen=True)
class Line:
    """spread: half the height of a band about the line, by point; () for none."""

    style: Style
    points: Points
    spread: Sequence[Number] = ()


def _panel(draw: Callable[[Axes], None], height: float = PANEL[1]) -> str:
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PANEL[0], height), layout="constrained")
        axes = figure.subplots()
        axes.spines["left"].set_visible(False)
        draw(axes)
        return _as_svg(figure)


def curves(lines: Sequence[Line], floors: Mapping[str, float], percent: bool) -> str:
    """Values against training steps, every seed a line; floors dashed, with their names."""

    def draw(axes: Axes) -> None:
        for line in lines:
            axes.plot(*zip(*thinned(line.points)), color=line.style.hex, linestyle=line.style.line, linewidth=1.1, alpha=0.9)
        _floors(axes, floors)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.set_xlim(left=0)
        axes.set_xlabel("step", labelpad=1)
        _label_y(axes, "%" if percent else "")

    return _panel(draw)


def trend(
    lines: Sequence[Line], floors: Mapping[str, float], xlabel: str, *, unit: str, log_y: bool = False, every_tick: bool = True
) -> str:
    """Figures against a size, with bands of a standard deviation; the size's axis is logarithmic unless sizes are evenly spaced.

    every_tick: a tick at each size, with a number where there is room; else at some powers of two.
    """

    def draw(axes: Axes) -> None:
        for line in lines:
            x, y = zip(*line.points)
            axes.plot(x, y, color=line.style.hex, linestyle=line.style.line, linewidth=1.3, marker="o", markersize=3)
            if line.spread:
                low, high = [a - s for a, s in zip(y, line.spread)], [a + s for a, s in zip(y, line.spread)]
                axes.fill_between(x, low, high, color=line.style.hex, alpha=0.15, linewidth=0)
        _floors(axes, floors)
        ticks = sorted({x for line in lines for x, _ in line.points})
        even = every_tick and len(ticks) > 2 and len({b - a for a, b in itertools.pairwise(ticks)}) == 1
        axes.set_xscale("linear") if even else axes.set_xscale("log", base=2)
        if not every_tick:
            powers = range(math.floor(math.log2(ticks[0])), math.ceil(math.log2(ticks[-1])) + 1)
            ticks = [2.0**power for power in powers][:: max(1, len(powers) // 5)]
        axes.set_xticks(ticks, roomy([x if even else math.log2(x) for x in ticks], [short(x, 1024) for x in ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        _label_y(axes, unit, log_y)
        if unit == "%":  # a band may end beyond 100, the axis does not
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -2), min(high, 104))
        axes.set_xlabel(xlabel, labelpad=1)

    return _panel(draw)


def spans_a_decade(lines: Sequence[Line]) -> bool:
    """Whether values are all positive and the largest is ten times the smallest: what a logarithmic axis has numbers for."""
    values = [y for line in lines for _, y in line.points]
    return bool(values) and 0 < 10 * min(values) <= max(values)


def _label_y(axes: Axes, unit: str, log: bool = False) -> None:
    """Round numbers up the vertical axis, two of them at least on a logarithmic one that spans a decade."""
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1,) if high >= 1000 * low else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:zg} %" if unit == "%" else f"{y:zg}"))


ROUND = (1, 2, 2.5, 5, 10)
"""Steps between numbers on an axis, but for powers of ten."""


def roomy(places: Sequence[Number], labels: Sequence[str]) -> list[str]:
    """Labels of rising places on a panel's horizontal axis, "" for those that would run into one before them or the last."""
    width = 72 * PANEL[0] * 0.85 / ((places[-1] - places[0]) or 1)
    last, kept = len(labels) - 1, [0]

    def apart(i: int, j: int) -> bool:
        return width * (places[j] - places[i]) >= 2.5 * (len(labels[i]) + len(labels[j])) + 3

    for i in range(1, last):
        if apart(kept[-1], i) and apart(i, last):
            kept.append(i)
    return [label if i in {*kept, last} else "" for i, label in enumerate(labels)]


@dataclasses.dataclass(frozen=True)
class Bubble:
    """A row: its speed, its figure, and the memory that the area is proportional to."""

    style: Style
    label: str
    x: Number
    y: Number
    area: Number


def bubbles(found: Sequence[Bubble], xlabel: str, *, unit: str) -> str:
    """Long Range Arena's figure 3: quality against speed, memory as area; bubbles are named at the right, by height."""

    def draw(axes: Axes) -> None:
        largest = max(bubble.area for bubble in found) or 1.0
        for bubble in found:
            size = 420 * (bubble.area or 0.0) / largest
            axes.scatter(bubble.x, bubble.y, s=size, color=bubble.style.hex, alpha=0.45, linewidth=0)
            axes.scatter(bubble.x, bubble.y, s=9, color=bubble.style.hex, linewidth=0)
        wide = max(bubble.x for bubble in found) > 4 * min(bubble.x for bubble in found)
        axes.set_xscale("log" if wide else "linear")
        axes.margins(0.14)
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)) if wide else MaxNLocator(3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        _label_y(axes, unit)
        axes.set_xlabel(xlabel, labelpad=1)
        low, high = axes.get_ylim()
        heights = apart([(bubble.y - low) / (high - low) for bubble in found], LABEL / (height - FRAME))
        for bubble, y in zip(found, heights):
            leader = dict(arrowstyle="-", color=bubble.style.hex, linewidth=0.5, alpha=0.7, shrinkA=0, shrinkB=0, relpos=(0, 0.5))
            axes.annotate(
                bubble.label, (bubble.x, bubble.y), (1.03, y), textcoords="axes fraction", va="center", fontsize=7,
                color=bubble.style.hex, arrowprops=leader, annotation_clip=False,
            )  # fmt: skip

    height = max(PANEL[1], FRAME + LABEL * len(found))
    return _panel(draw, height)


LABEL, FRAME = 0.135, 0.5
"""Inches: of a line of labels, and of a panel's height without the axes."""


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved as little as keeps them, in their order, at least `gap` apart and between 0 and 1, where there is room."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = [heights[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    limit = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = limit = min(moved[i], limit)
        limit -= gap
    return [y for _, y in sorted(zip(order, moved))]


def _floors(axes: Axes, floors: Mapping[str, float]) -> None:
    for name, value in floors.items():
        axes.axhline(value, color=INK, alpha=0.55, linewidth=0.7, linestyle=(0, (2, 2)))
        axes.annotate(
            f"{name} {value:.1f}", (1, value), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            fontsize=6.5, alpha=0.75,
        )  # fmt: skip


def thinned(points: Points, most: int = 160) -> Points:
    """Evenly spaced points of a curve, the last one among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def short(value: Number, base: int = 1000) -> str:
    """4000 as 4k; with base 1024, 4096 as 4K."""
    letter = "k" if base == 1000 else "K"
    return f"{value / base:g}{letter}" if value >= base and (base == 1000 or value % base == 0) else f"{value:g}"


def _as_svg(figure: Figure) -> str:
    """The figure as an element of an HTML page: no prologue, no fixed size, ids of its own, colours by the page's variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = _MARKED.sub(lambda m: "currentColor" if m[1] == "f0" else f"var(--series-{int(m[1])})", svg)
    return _with_own_ids(_rounded(svg))


def _rounded(svg: str) -> str:
    """Coordinates to a hundredth of a point, which halves the file; what the text says stays as it is."""

    def rounded(tag: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag[0])

    return re.sub(r"<[^>]*>", rounded, svg)


def _with_own_ids(svg: str) -> str:
    """Only ids that something refers to, and no two of a page alike."""
    prefix = f"f{zlib.crc32(svg.encode()):08x}-"
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(href="#|url\(#)', rf"\1{prefix}", svg)


def palette() -> Iterator[tuple[int, str, str]]:
    """(number, colour on white, colour on black), after Okabe and Ito, lighter on black."""
    light = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#b57d00", "#3f9bd3", "#5b5b5b")
    dark = ("#5eb3e8", "#ff8f57", "#45cfa6", "#e3a2c8", "#efbd55", "#a3d8fa", "#bdbdbd")
    return iter(zip(range(COLOURS), light, dark))
