"""A summary as CSV and JSON: a flat record a figure, and with every run behind it."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

from efficient_attn import workdir
from efficient_attn.reporting import orderings, text
from efficient_attn.reporting.summary import Figure, Section, Summary
from efficient_attn.runs import Run

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
    shown = {"column": text.AVERAGE, "shown": text.averages(section, row)[0], "mean": mean}
    printed = {"published": published.value, "source": published.source} if published else {}
    difference = None if mean is None or published is None else mean - published.number
    shown["status"] = "of the figures of this row" if mean is not None else "a figure of this row is missing"
    about = {"scale": section.protocol.scale, "protocol": section.name, "row": row, "unit": section.metric.unit}
    return dict.fromkeys(CSV_FIELDS) | about | shown | printed | {"difference": difference}


def _record(summary: Summary, section: Section, figure: Figure) -> dict[str, Any]:
    published, beside = figure.published, figure.beside
    return {
        "scale": section.protocol.scale, "protocol": section.name, "row": figure.row, "column": figure.column,
        "shown": text.ours(figure), "mean": figure.mean, "sd": figure.sd,
        "seeds": len(figure.scores), "expected": figure.expected, "failed": figure.failed,
        "status": figure.status or ("finished" if figure.mean is not None else "not published"),
        "choice": figure.chosen.choice if figure.chosen else "", "unit": figure.metric.unit,
        "published": published.value if published else None, "published_sd": published.std if published else None,
        "difference": figure.difference, "source": published.source if published else "",
        "beside": beside.value if beside else None, "beside_source": beside.source if beside else "",
        "notes": "; ".join(figure.notes), "command": _command(summary, section, figure),
    }  # fmt: skip


def _command(summary: Summary, section: Section, figure: Figure) -> str:
    """A line for each run of the figure; the benchmark's where no run makes it."""
    return "\n".join(text.commands(figure, summary.command_root)) or section.measured_by


def as_csv(summary: Summary) -> str:
    """RFC 4180, one line a figure; an empty field where there is nothing, six digits of what is no whole number."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for record in records(summary):
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in record.items()})
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
                    "command": text.paste(cell, summary.command_root),
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
