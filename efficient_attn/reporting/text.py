"""A summary as text: Markdown, LaTeX, CSV and JSON. What a figure says is worded here, once for them and for the page."""

import csv
import dataclasses
import io
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from efficient_attn import workdir
from efficient_attn.reporting import orderings
from efficient_attn.reporting.orderings import Verdict
from efficient_attn.reporting.runs import Run
from efficient_attn.reporting.summary import Figure, Section, Summary
from efficient_attn.tables import Cell, Metric, Published

NOTHING = "–"
AVERAGE = "Average"


def number(value: float, metric: Metric) -> str:
    """One decimal of a percentage, else three digits."""
    return f"{value:.1f}" if metric.unit == "%" else f"{value:#.3g}".rstrip(".")


def signed(value: float, metric: Metric) -> str:
    return ("+" if value >= 0 else "−") + number(abs(value), metric)


def printed(published: Published) -> str:
    """A published figure, digit for digit as the table has it."""
    return f"{published.value} ± {published.std}" if published.std is not None else str(published.value)


def ours(figure: Figure) -> str:
    """Mean and standard deviation over seeds, or the word why there is none."""
    if figure.mean is None:
        return figure.status or NOTHING
    spread = f" ± {number(figure.sd, figure.metric)}" if figure.sd is not None else ""
    return number(figure.mean, figure.metric) + spread


def seeds(figure: Figure) -> str:
    """How many seeds stand behind a figure; empty where a benchmark measured it."""
    if not figure.scores:
        return ""
    failed = f", {figure.failed} failed" if figure.failed else ""
    missing = f" of {figure.expected}" if len(figure.scores) < figure.expected else ""
    return f"n = {len(figure.scores)}{missing}{failed}"


def is_best(section: Section, figure: Figure) -> bool:
    return figure.mean is not None and figure.mean == section.best(figure.column)


def sources(section: Section) -> list[str]:
    """Where the published figures of a section come from, each source once."""
    shown = [figure.published or figure.beside for figure in section]
    return list(dict.fromkeys(cell.source for cell in shown if cell))


def notes(section: Section) -> list[str]:
    """What figures must be read with, each note once with all the figures it is of; those of published figures by row."""
    of_ours = [(note, f"{figure.row} {figure.column}") for figure in section for note in figure.notes]
    printed = [(figure.row, cell.note) for figure in section if (cell := figure.published or figure.beside) and cell.note]
    found: dict[str, dict[str, None]] = {}
    for note, of in of_ours + [(f"{note} (published)", row) for row, note in printed]:
        found.setdefault(note, {})[of] = None
    return [f"{', '.join(of)}: {note}" for note, of in found.items()]


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


def markdown(summary: Summary, sections: Iterable[str] | None = None) -> str:
    """One table a section: ours, and in brackets what is published."""
    wanted = [s for s in summary.sections if sections is None or s.name in sections]
    tested = orderings.judge(dataclasses.replace(summary, sections=tuple(wanted)))
    return "\n\n".join([*map(_markdown_section, wanted), *([_markdown_orderings(tested)] if tested else [])]) + "\n"


def _markdown_orderings(verdicts: Iterable[Verdict]) -> str:
    rows = [[*ordering_cells(verdict)] for verdict in verdicts]
    return f"**Published orderings on our figures.** {ORDERINGS}\n\n" + markdown_table(list(ORDERING_HEAD), rows)


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


def _markdown_section(section: Section) -> str:
    head = [*section.protocol.columns, *([AVERAGE] if section.protocol.average else [])]
    rows = []
    for row, figures in section.figures.items():
        cells = [_markdown_cell(section, figure) for figure in figures.values()]
        if section.protocol.average:
            cells.append(_with_brackets(*_averages(section, row)))
        rows.append([f"`{row}`", *cells])
    for name, floors in floor_rows(section).items():
        shown = [number(floors[c], section.metric) if c in floors else "" for c in section.protocol.columns]
        rows.append([f"*{name}*", *shown, *([""] if section.protocol.average else [])])
    return "\n\n".join([_markdown_caption(section), markdown_table(["", *head], rows), *_markdown_notes(section)])


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _markdown_caption(section: Section) -> str:
    return f"**{section.protocol.title}** (`{section.name}`), {section.metric.key} in {section.metric.unit}. " + caption(section)


def caption(section: Section) -> str:
    """What the figures are, and whether they may be compared with those in brackets."""
    parts = [*section.protocol.facts]
    if any(figure.published for figure in section):
        parts.append("In brackets: published, in this protocol.")
    elif any(figure.beside for figure in section):
        parts.append("In brackets: published, in another protocol; no difference is formed.")
    return " ".join(parts + _spread(section))


def legend(section: Section) -> str:
    """How to read a cell of the page's table."""
    better = {"max": "larger", "min": "smaller"}[section.metric.better]
    parts = [f"{section.metric.key.replace('_', ' ').capitalize()} in {section.metric.unit}; {better} is better."]
    if any(section.best(column) is not None for column in section.protocol.columns):
        parts.append("Bold: the best of ours in its column.")
    if any(figure.published for figure in section):
        parts.append("Below: the published figure, and ours minus it.")
    if any(figure.beside for figure in section):
        parts.append("In brackets and italics: published, but in another protocol, so that no difference is formed.")
    if any(figure.status for figure in section):
        parts.append("A word leads to the command that makes the figure.")
    return " ".join(parts + _spread(section))


def _spread(section: Section) -> list[str]:
    return ["± is the standard deviation over seeds."] if any(figure.sd is not None for figure in section) else []


def values(run: Run, metric: Metric, prefix: str) -> str:
    """A run's own figures on "valid_" or "test_", of each of its seeds."""
    key = prefix + metric.key.removeprefix("test_")
    return ", ".join(number(metric.scale * value, metric) for value in run.values(key))


def _markdown_cell(section: Section, figure: Figure) -> str:
    text = f"**{ours(figure)}**" if is_best(section, figure) else ours(figure)
    beside = figure.published or figure.beside
    return _with_brackets(text, printed(beside) if beside else "")


def _with_brackets(text: str, published: str) -> str:
    return f"{text} ({published})" if published else text


def _averages(section: Section, row: str) -> tuple[str, str]:
    mean, published = section.average(row), section.published_average(row)
    shown = number(mean, section.metric) if mean is not None else NOTHING
    return shown, number(published, section.metric) if published is not None else ""


def _markdown_notes(section: Section) -> list[str]:
    found = ["Published: " + "; ".join(sources(section)) + "."] if sources(section) else []
    return found + (["\n".join(f"- {note}" for note in notes(section))] if notes(section) else [])


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "≥": r"$\ge$",
}  # fmt: skip


def escape_latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)


def latex(summary: Summary) -> str:
    """One `table` environment a section; needs the booktabs package."""
    return "\n\n".join(_latex_section(summary, section) for section in summary.sections) + "\n"


def _latex_section(summary: Summary, section: Section) -> str:
    head = [*section.protocol.columns, *([AVERAGE] if section.protocol.average else [])]
    lines = [" & ".join(["", *map(escape_latex, head)]) + r" \\", r"\midrule"]
    for row, figures in section.figures.items():
        cells = []
        for figure in figures.values():
            text = escape_latex(ours(figure))
            text = rf"\textbf{{{text}}}" if is_best(section, figure) else text
            beside = figure.published or figure.beside
            cells.append(_with_brackets(text, escape_latex(printed(beside)) if beside else ""))
        if section.protocol.average:
            cells.append(escape_latex(_with_brackets(*_averages(section, row))))
        lines.append(" & ".join([escape_latex(row), *cells]) + r" \\")
    for i, (name, floors) in enumerate(floor_rows(section).items()):
        shown = [number(floors[c], section.metric) if c in floors else "" for c in section.protocol.columns]
        shown += [""] if section.protocol.average else []
        lines.append((r"\midrule " if i == 0 else "") + rf"\textit{{{escape_latex(name)}}} & " + " & ".join(shown) + r" \\")
    text = escape_latex(f"{summary.table.title}. {section.protocol.title}, {section.metric.unit}. {caption(section)}")
    published = escape_latex(" Published: " + "; ".join(sources(section)) + ".") if sources(section) else ""
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{text}{published}}}", rf"\begin{{tabular}}{{l{'r' * len(head)}}}",
        r"\toprule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ])  # fmt: skip


CSV_FIELDS = (
    "scale", "protocol", "row", "column", "shown", "mean", "sd", "seeds", "expected", "failed", "status", "choice", "unit",
    "published", "published_sd", "difference", "source", "beside", "beside_source", "notes", "command",
)  # fmt: skip


def records(summary: Summary) -> list[dict[str, Any]]:
    """One flat record a figure, of the fields `CSV_FIELDS`; after those of a row its average, where the protocol has one."""
    found = []
    for section in summary.sections:
        for row, figures in section.figures.items():
            found += [_record(summary, section, figure) for figure in figures.values()]
            found += [_average_record(section, row)] if section.protocol.average else []
    return found


def _average_record(section: Section, row: str) -> dict[str, Any]:
    mean, published = section.average(row), section.published_average(row)
    shown = {"column": AVERAGE, "shown": _averages(section, row)[0], "mean": mean, "published": published}
    difference = None if mean is None or published is None else mean - published
    about = {"scale": section.protocol.scale, "protocol": section.name, "row": row, "unit": section.metric.unit}
    return dict.fromkeys(CSV_FIELDS) | about | shown | {"difference": difference}


def _record(summary: Summary, section: Section, figure: Figure) -> dict[str, Any]:
    published, beside = figure.published, figure.beside
    return {
        "scale": section.protocol.scale, "protocol": section.name, "row": figure.row, "column": figure.column,
        "shown": ours(figure), "mean": figure.mean, "sd": figure.sd, "seeds": len(figure.scores), "expected": figure.expected,
        "failed": figure.failed, "status": figure.status or ("finished" if figure.mean is not None else ""),
        "choice": figure.chosen.choice if figure.chosen else "", "unit": figure.metric.unit,
        "published": published.value if published else None, "published_sd": published.std if published else None,
        "difference": figure.difference, "source": published.source if published else "",
        "beside": beside.value if beside else None, "beside_source": beside.source if beside else "",
        "notes": "; ".join(figure.notes), "command": "\n".join(commands(figure, summary.command_root)),
    }  # fmt: skip


def as_csv(summary: Summary) -> str:
    """RFC 4180, one line a figure; an empty field where there is nothing."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(summary))
    return out.getvalue()


def as_json(summary: Summary) -> str:
    """The records, with every run behind each figure: folder, state, seeds, scores, commit, versions, hardware, command."""
    figures = []
    for section in summary.sections:
        for figure in section:
            runs = [
                {
                    "choice": candidate.choice,
                    "seeds": list(cell.seeds),
                    "command": paste(cell, summary.command_root),
                    **run_record(run),
                }
                for candidate in figure.candidates
                for cell, run in candidate.members
            ]
            figures.append({**_record(summary, section, figure), "scores": list(figure.scores), "runs": runs})
    about = {"table": summary.table.name, "title": summary.table.title, "scales": dict(summary.table.scales)}
    protocols = {s.name: dataclasses.asdict(s.protocol) for s in summary.sections}
    tested = [
        {**dataclasses.asdict(v.ordering), "differences": list(v.differences), "says": v.says} for v in orderings.judge(summary)
    ]
    everything = {**about, "protocols": protocols, "figures": figures, "orderings": tested}
    return json.dumps(workdir.jsonable(everything), indent=1) + "\n"


RECORDED = ("commit", "dirty", "versions", "backend", "device_kind", "device_count", "cpu", "cores", "steps", "data")


def run_record(run: Run) -> dict[str, Any]:
    """What is said of a run anywhere: its state, its score, and what it was made with."""
    about: Mapping[str, Any] = {name: run.info[name] for name in RECORDED if name in run.info}
    rates = {name: run.rate(name) for name in ("steps_per_second", "tokens_per_second")}
    return {
        "folder": str(run.folder),
        "state": str(run.state),
        "why": run.why,
        "last_step": run.step,
        **about,
        **rates,
        "score": run.score,
    }
