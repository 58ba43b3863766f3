"""What a figure says, worded once for the tables in Markdown and LaTeX, the CSV and the page."""

import math
import pathlib
import shlex

from efficient_attn.reporting import orderings
from efficient_attn.reporting.orderings import Verdict
from efficient_attn.reporting.summary import FORMED, Figure, Section
from efficient_attn.runs import Run
from efficient_attn.tables import Cell, Metric, Published

NOTHING = "–"
AVERAGE = "Average"
FORMED_MARK = "†"


def number(value: float, metric: Metric) -> str:
    """One decimal of a percentage; else three digits, of at most four decimals."""
    digits = 1 if metric.unit == "%" else 2 - math.floor(math.log10(abs(value) or 1e-9))
    return f"{value:z.{min(max(digits, 0), 4)}f}"


def signed(value: float, metric: Metric) -> str:
    shown = number(value, metric)
    return "−" + shown[1:] if shown.startswith("-") else "+" + shown


def quantity(metric: Metric) -> str:
    """What is measured, and its unit where the name does not say it; a sentence without its full stop."""
    name = metric.key.replace("_", " ").capitalize()
    return name if metric.unit in name else f"{name} in {metric.unit}"


def printed(published: Published) -> str:
    """A published figure, digit for digit as the table has it."""
    return (
        published.value + (f" ± {published.std}" if published.std else "") + (FORMED_MARK if published.source == FORMED else "")
    )


def ours(figure: Figure) -> str:
    """Mean and standard deviation over seeds, or the word why there is none."""
    if figure.mean is None:
        return figure.status or NOTHING
    spread = f" ± {deviation(figure)}" if figure.sd is not None else ""
    return number(figure.mean, figure.metric) + spread


def deviation(figure: Figure) -> str:
    """The standard deviation over seeds, with the decimals of the mean."""
    decimals = len(number(figure.mean, figure.metric).partition(".")[2])
    return f"{figure.sd:.{decimals}f}"


def seeds(figure: Figure) -> str:
    """How many seeds stand behind a figure; empty where a benchmark measured it."""
    if not figure.scores:
        return ""
    failed = f", {figure.failed} failed" if figure.failed else ""
    missing = f" of {figure.expected}" if len(figure.scores) < figure.expected else ""
    return f"n = {len(figure.scores)}{missing}{failed}"


def head(section: Section) -> list[str]:
    """Names of the columns."""
    return [*section.protocol.columns, *([AVERAGE] if section.protocol.average else [])]


def sources(section: Section) -> list[str]:
    """Where the published figures of a section come from, each source once."""
    shown = [figure.published or figure.beside for figure in section]
    return list(dict.fromkeys(cell.source for cell in shown if cell))


def notes(section: Section) -> list[str]:
    """What figures must be read with, each note once with all the figures it is of; those of published figures by row."""
    of_ours = [(note, f"{figure.row} {figure.column}") for figure in section if not figure.absent for note in figure.notes]
    printed = [(figure.row, cell.note) for figure in section if (cell := figure.published or figure.beside) and cell.note]
    found: dict[str, dict[str, None]] = {}
    for note, of in of_ours + [(f"{note} (published)", row) for row, note in printed]:
        found.setdefault(note, {})[of] = None
    return [*(f"{', '.join(of)}: {note}" for note, of in found.items()), *_signs(section)]


def _signs(section: Section) -> list[str]:
    """What the words and signs in the table mean, each reason why nothing makes a figure once."""
    reasons = dict.fromkeys(figure.absent for figure in section if figure.absent)
    found = [f"{reason.word}{' (' + ', '.join(reason.of) + ')' if reason.of else ''}: {reason.why}" for reason in reasons]
    if any(ours(figure) == NOTHING for figure in section):
        found.append(f"{NOTHING}: nothing is published, and nothing here makes it")
    if section.protocol.average and any(section.average(row) is None for row in section.figures):
        found.append(f"{NOTHING} under {AVERAGE}: one of its figures is missing")
    if any(section.published_average(row) for row in section.figures):
        found.append(f"{FORMED_MARK}: {FORMED}")
    return found


def paste(cell: Cell, root: pathlib.Path) -> str:
    """A cell's commands as one line of shell."""
    return " && ".join(shlex.join(command) for command in cell.commands(root))


def command_of(run: Run) -> str:
    """The command that a run says it was made by."""
    return shlex.join(["python", *run.info.get("argv", [])])


def commands(figure: Figure, root: pathlib.Path) -> list[str]:
    """For each run, what it says it was made by, or what would make it in `root`."""
    members = [member for candidate in figure.candidates for member in candidate.members]
    return [command_of(run) if run.info.get("argv") else paste(cell, root) for cell, run in members]


def floor_rows(section: Section) -> dict[str, dict[str, float]]:
    """Name of a rule -> column -> what it reaches."""
    names = dict.fromkeys(name for floors in section.protocol.floors.values() for name in floors)
    floors = section.protocol.floors
    return {name: {column: rules[name] for column, rules in floors.items() if name in rules} for name in names}


def caption(section: Section) -> str:
    """What the figures are, and whether they may be compared with those in brackets."""
    parts = [*section.protocol.facts]
    if any(figure.published for figure in section):
        parts.append("In brackets: published, in this protocol.")
    elif any(figure.beside for figure in section):
        parts.append("In brackets: published, in another protocol; no difference is formed.")
    return " ".join(parts + _spread(section) + _measured(section))


def legend(section: Section) -> str:
    """How to read a cell of the page's table."""
    metric = section.metric
    better = "" if metric.change else {"max": "; larger is better", "min": "; smaller is better"}[metric.better]
    parts = [f"{quantity(metric)}{better}."]
    if any(figure.published for figure in section):
        parts.append("Below: the published figure, and ours minus it.")
    if any(figure.beside for figure in section):
        parts.append("In brackets and italics: published, but in another protocol, so that no difference is formed.")
    if any(figure.status and figure.candidates for figure in section):
        parts.append("An underlined word leads to the command that makes the figure.")
    return " ".join(parts + _spread(section) + _measured(section))


def _spread(section: Section) -> list[str]:
    found = ["± is the standard deviation over seeds."] if any(figure.sd is not None for figure in section) else []
    if any(section.is_best(figure) for figure in section):
        found.append("Bold: the best of ours in its column, and what is no further from it than the larger ± of the two.")
    return found


def _measured(section: Section) -> list[str]:
    return [f"Measured by: {section.measured_by}"] if section.measured_by else []


def values(run: Run, metric: Metric, prefix: str) -> str:
    """A run's own figures on "valid_" or "test_", of each of its seeds."""
    key = prefix + metric.key.removeprefix("test_")
    return ", ".join(number(metric.scale * value, metric) for value in run.values(key))


def with_brackets(text: str, published: str) -> str:
    return f"{text} ({published})" if published else text


def beside(figure: Figure) -> str:
    """What is published beside ours, in this protocol or in another; empty where nothing is."""
    found = figure.published or figure.beside
    return printed(found) if found else ""


def averages(section: Section, row: str) -> tuple[str, str]:
    mean, published = section.average(row), section.published_average(row)
    shown = number(mean, section.metric) if mean is not None else NOTHING
    return shown, printed(published) if published else ""


ORDERING_HEAD = ("published", "source", "ours: difference", "seeds", "")
ORDERINGS = (
    "By how much the one said to be better is better, seed by seed: mean ± standard deviation of the differences. An ordering "
    f"shows where the mean is more than {orderings.MARGIN:g} standard deviations."
)


def ordering_cells(verdict: Verdict) -> tuple[str, ...]:
    """What a line of the table of orderings says, under `ORDERING_HEAD`."""
    ordering, difference = verdict.ordering, ""
    if verdict.differences:
        spread = f" ± {verdict.sd:.2g}" if verdict.sd is not None else ""
        difference = f"{verdict.mean:+.3g}{spread} {verdict.unit}".replace("-", "−")
    return ordering.claim, ordering.source, difference, str(len(verdict.differences)), verdict.says
