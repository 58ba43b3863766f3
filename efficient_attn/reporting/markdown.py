"""A summary as Markdown: one table a section, ours and in brackets what is published."""

import dataclasses
from collections.abc import Iterable, Sequence

from efficient_attn.reporting import orderings, text
from efficient_attn.reporting.orderings import Verdict
from efficient_attn.reporting.summary import Figure, Section, Summary


def render(summary: Summary, sections: Iterable[str] | None = None) -> str:
    """The named sections, by default all, and the orderings that are tested on them."""
    wanted = [s for s in summary.sections if sections is None or s.name in sections]
    tested = orderings.judge(dataclasses.replace(summary, sections=tuple(wanted)))
    return "\n\n".join([*map(_section, wanted), *([_orderings(tested)] if tested else [])]) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _orderings(verdicts: Iterable[Verdict]) -> str:
    rows = [text.ordering_cells(verdict) for verdict in verdicts]
    return f"**Published orderings on our figures.** {text.ORDERINGS}\n\n" + table(text.ORDERING_HEAD, rows)


def _section(section: Section) -> str:
    protocol, metric = section.protocol, section.metric
    caption = f"**{protocol.title}** (`{section.name}`). {text.quantity(metric)}. {text.caption(section)}"
    rows = []
    for row, figures in section.figures.items():
        cells = [_cell(section, figure) for figure in figures.values()]
        rows.append([f"`{row}`", *cells, *([text.with_brackets(*text.averages(section, row))] if protocol.average else [])])
    for name, floors in text.floor_rows(section).items():
        shown = [text.number(floors[c], metric) if c in floors else "" for c in protocol.columns]
        rows.append([f"*{name}*", *shown, *([""] if protocol.average else [])])
    return "\n\n".join([caption, table(["", *text.head(section)], rows), *_notes(section)])


def _cell(section: Section, figure: Figure) -> str:
    said = text.ours(figure)
    return text.with_brackets(f"**{said}**" if section.is_best(figure) else said, text.beside(figure))


def _notes(section: Section) -> list[str]:
    sources, notes = text.sources(section), text.notes(section)
    found = ["Published: " + "; ".join(sources) + "."] if sources else []
    return found + (["\n".join(f"- {note}" for note in notes)] if notes else [])
