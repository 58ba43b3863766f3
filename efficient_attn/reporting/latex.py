"""A summary as LaTeX: one `table` environment a section; needs the booktabs package."""

import re

from efficient_attn.reporting import text
from efficient_attn.reporting.summary import Figure, Section, Summary

ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "≥": r"$\ge$",
    "†": r"$\dagger$", ">": "$>$",
}  # fmt: skip


def escape(said: str) -> str:
    return re.sub("|".join(map(re.escape, ESCAPES)), lambda match: ESCAPES[match[0]], said)


def render(summary: Summary) -> str:
    return "\n\n".join(_section(summary, section) for section in summary.sections) + "\n"


def _section(summary: Summary, section: Section) -> str:
    protocol, head = section.protocol, text.head(section)
    lines = [" & ".join(["", *map(escape, head)]) + r" \\", r"\midrule"]
    for row, figures in section.figures.items():
        cells = [_cell(section, figure) for figure in figures.values()]
        if protocol.average:
            cells.append(escape(text.with_brackets(*text.averages(section, row))))
        lines.append(" & ".join([escape(row), *cells]) + r" \\")
    for i, (name, floors) in enumerate(text.floor_rows(section).items()):
        shown = [text.number(floors[c], section.metric) if c in floors else "" for c in protocol.columns]
        shown += [""] if protocol.average else []
        lines.append((r"\midrule " if i == 0 else "") + rf"\textit{{{escape(name)}}} & " + " & ".join(shown) + r" \\")
    caption = escape(f"{summary.table.title}. {protocol.title}, {section.metric.unit}. {text.caption(section)}")
    published = escape(" Published: " + "; ".join(text.sources(section)) + ".") if text.sources(section) else ""
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{caption}{published}}}", rf"\begin{{tabular}}{{l{'r' * len(head)}}}",
        r"\toprule", *lines, r"\bottomrule", r"\end{tabular}",
        *(rf"\par\smallskip{{\footnotesize {escape(note)}\par}}" for note in text.notes(section)), r"\end{table}",
    ])  # fmt: skip


def _cell(section: Section, figure: Figure) -> str:
    said = escape(text.ours(figure))
    return text.with_brackets(rf"\textbf{{{said}}}" if section.is_best(figure) else said, escape(text.beside(figure)))
