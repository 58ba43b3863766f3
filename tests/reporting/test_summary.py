"""Figures from runs: what is averaged, what is counted, what is refused; and their Markdown, LaTeX, CSV and JSON."""

import csv
import dataclasses
import io
import json
import shutil
import statistics
import time

import pytest

from efficient_attn import workdir
from efficient_attn.arguments import ConfigError
from efficient_attn.config import normal_form
from efficient_attn.reporting import latex, markdown, orderings, page, records, summary, tables, text
from efficient_attn.runs import State
from efficient_attn.tables import ROOT, Cell, Metric
from tests.reporting.fake_runs import TABLE, write_run, write_table
from tests.test_runs import DAMAGE, edit

SCORES = {("softmax", 0): 0.9, ("softmax", 1): 0.8, ("softmax", 2): 0.7}


@pytest.fixture
def table(tmp_path):
    """The table of fake_runs with three finished runs of softmax in its first column."""
    table = write_table(tmp_path)
    for cell in table.cells["cpu"]:
        if cell.column == "L=64 d=32" and (cell.row, cell.seed) in SCORES:
            write_run(cell, tmp_path / "runs", SCORES[cell.row, cell.seed])
    return table


def first(table, tmp_path) -> summary.Figure:
    """The figure of the three runs."""
    (section,) = summary.summarise(table, tmp_path / "runs", "cpu").sections
    return section.figures["softmax"]["L=64 d=32"]


def test_the_figure_is_mean_and_sample_deviation_over_seeds(table, tmp_path):
    figure = first(table, tmp_path)
    assert figure.mean == pytest.approx(80.0) and figure.sd == pytest.approx(statistics.stdev([90, 80, 70]))
    assert (text.ours(figure), text.seeds(figure), figure.notes, figure.failed) == ("80.0 ± 10.0", "n = 3", [], 0)
    assert figure.published is None and figure.difference is None and figure.beside.number == 99.0


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_does_not_count_leaves_the_mean_and_is_named(table, tmp_path, damage):
    spoil, state, why = DAMAGE[damage]
    spoil(table.cells["cpu"][0].workdir(tmp_path / "runs"))
    figure = first(table, tmp_path)
    assert figure.scores == pytest.approx((80.0, 70.0)) and figure.failed == (state == State.FAILED)
    assert text.seeds(figure).startswith("n = 2 of 3")
    (note,) = figure.notes
    name = "/".join(table.cells["cpu"][0].workdir(tmp_path).parts[-2:])
    assert f"2 of 3 seeds: {state}" in note and why in note and note.endswith(name)
    assert why in (said := markdown.render(summary.summarise(table, tmp_path / "runs", "cpu"))) and f": {name}\n" in said


def test_a_failure_that_the_sweep_recorded_is_counted(table, tmp_path):
    root, folder = tmp_path / "runs", table.cells["cpu"][0].workdir(tmp_path / "runs")
    (folder / "metrics.jsonl").unlink()
    record = {"state": "failed", "reason": "train_loss is not finite at step 7"}
    runs = {str(folder.relative_to(root)): record, "short/gone": record, "short/done": {**record, "state": "done"}}
    workdir.write_json(root / "sweep.json", {"runs": runs})
    figure = first(table, tmp_path)
    assert figure.failed == 1 and text.seeds(figure) == "n = 2 of 3, 1 failed"
    assert figure.notes == [f"2 of 3 seeds: failed (train_loss is not finite at step 7): {folder.relative_to(root)}"]


def test_commands_never_write_into_committed_results(table, tmp_path):
    found = summary.summarise(table, tmp_path / "runs", "cpu")
    assert found.command_root == tmp_path / "runs"
    committed = dataclasses.replace(found, root=ROOT / "results/cpu/tables/table")
    assert str(committed.command_root) == "runs/table"
    figure = found.sections[0].figures["softmax"]["L=64 d=32"]
    assert text.commands(figure, found.command_root)[0].endswith(f"--workdir={figure.candidates[0].members[0][1].folder}")


def test_where_nothing_ran_the_figure_says_so_with_its_commands(table, tmp_path):
    found = summary.summarise(table, tmp_path / "runs", "cpu")
    figure = found.sections[0].figures["<b>s5</b>"]["L=64 d=32"]
    assert (text.ours(figure), figure.mean, figure.scores) == ("not run", None, ())
    train = text.commands(figure, found.root)
    assert len(train) == 3 and all(c.startswith("python train.py --config=configs/quickstart.py:identity") for c in train)
    assert found.states == {State.FINISHED: 3, State.NOT_RUN: 9}


def test_published_figures_are_subtracted_only_within_their_protocol(table, tmp_path):
    for cell in table.cells["paper"][:3]:
        write_run(cell, tmp_path / "runs", 0.98)
    paper, short = summary.summarise(table, tmp_path / "runs").sections
    assert paper.figures["softmax"]["L=64 d=32"].difference == pytest.approx(-1.0)
    assert short.figures["softmax"]["L=64 d=32"].difference is None
    assert paper.average("softmax") is None and paper.published_average("softmax").value == "98.75"
    assert paper.published_average("<b>s5</b>") is None  # a word is no number


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path):
    table = write_table(tmp_path, TABLE.replace('"100 steps"}', '"100 steps" if seed else "90 steps"}'))
    with pytest.raises(ConfigError, match=r"differ in more than their seeds.*mix protocols"):
        summary.summarise(table, tmp_path / "runs", "cpu")


def rates(tmp_path, validation):
    """A table whose first figure has one candidate run for each learning rate, of those validation accuracies."""
    source = TABLE.replace("for seed in range(3):", "for rate in (1e-3, 1e-2, 1e-1):").replace(
        '"100 steps"},', '"100 steps", "optimizer.learning_rate": rate}, choice=f"lr={rate:g}",'
    )
    table = write_table(tmp_path, source.replace("seed=seed,", ""))
    for cell, value in zip(table.cells["cpu"], validation):
        if value is not None:
            folder = write_run(cell, tmp_path / "runs", 1 - value)
            edit(folder / "eval.json", valid_accuracy=value)
    return table


def test_validation_and_not_test_chooses_among_candidates(tmp_path):
    figure = first(rates(tmp_path, (0.5, 0.7, 0.6)), tmp_path)
    assert figure.chosen.choice == "lr=0.01" and figure.mean == pytest.approx(30.0)
    assert figure.notes == ["lr=0.01: best on validation of 3"]


def test_a_grid_that_is_not_whole_is_said(tmp_path):
    figure = first(rates(tmp_path, (0.5, None, 0.6)), tmp_path)
    missing = "not run: short/softmax-L=64_d=32-lr=0.01-s0"
    assert figure.chosen.choice == "lr=0.1" and figure.notes == [f"lr=0.1: best on validation of 3, without {missing}"]


def test_runs_of_a_figure_that_has_none_finished_are_named_unless_none_was_started(tmp_path):
    table = rates(tmp_path, (0.5, None, None))
    (table.cells["cpu"][0].workdir(tmp_path / "runs") / "eval.json").write_text("{")
    (note,) = first(table, tmp_path).notes
    assert "eval.json is not JSON" in note and "short/softmax-L=64_d=32-lr=0.001-s0; not run: short/softmax" in note
    shutil.rmtree(tmp_path / "runs")
    assert first(table, tmp_path).notes == []


def test_other_lengths_of_the_same_runs_are_columns(tmp_path):
    table = write_table(tmp_path)
    cell = dataclasses.replace(table.cells["cpu"][0], lengths={"L=64 d=64": 128})
    table = dataclasses.replace(table, cells={"cpu": (cell,), "paper": ()})
    folder = write_run(cell, tmp_path / "runs", 0.9)
    unscored = summary.summarise(table, tmp_path / "runs", "cpu").sections[0].figures["softmax"]["L=64 d=64"]
    assert (unscored.status, unscored.failed) == ("not scored", 0)
    rows = [{"length": n, "accuracy": a, "seed": 0} for n, a in ((64, 0.9), (128, 0.4))]
    workdir.write_json(folder / "lengths.json", {"rows": rows})
    figures = summary.summarise(table, tmp_path / "runs", "cpu").sections[0].figures["softmax"]
    assert figures["L=64 d=32"].mean == pytest.approx(90) and figures["L=64 d=64"].mean == pytest.approx(40)


def test_seeds_that_diverged_and_seeds_that_are_not_scored_are_told_apart(tmp_path):
    table = write_table(tmp_path)
    cell = dataclasses.replace(table.cells["cpu"][0], replicas=4, lengths={"L=64 d=64": 128})
    table = dataclasses.replace(table, cells={"cpu": (cell,), "paper": ()})
    rows = [{"length": 128, "accuracy": a, "seed": i} for i, a in enumerate((0.4, None, 0.6))]
    workdir.write_json(write_run(cell, tmp_path / "runs", 0.9) / "lengths.json", {"rows": rows})
    figure = summary.summarise(table, tmp_path / "runs", "cpu").sections[0].figures["softmax"]["L=64 d=64"]
    assert (figure.mean, figure.failed) == (pytest.approx(50), 1) and text.seeds(figure) == "n = 2 of 4, 1 failed"
    assert figure.notes == ["2 of 4 seeds: 1 diverged; 1 not scored"]


def test_the_expected_configuration_is_the_cells_own():
    cell = Cell("configs/lra_listops.py:s5_short", "s5", "a", "p", {"model.width": 32, "model.mixer.state_dim": 16}, seed=4)
    assert summary.expected_config(cell) == normal_form(cell.get_config())


def test_an_unknown_scale_is_an_error(table, tmp_path):
    with pytest.raises(ConfigError, match=r"no scale 'cpuu' .did you mean 'cpu'"):
        summary.summarise(table, tmp_path, "cpuu")


def test_every_text_says_the_same(table, tmp_path):
    found = summary.summarise(table, tmp_path / "runs", "cpu")
    assert "| `softmax` | 80.0 ± 10.0 (99.0) | not run (98.50 ± 0.20) | – |" in markdown.render(found)
    assert "| *chance* | 1.6 | 1.6 |  |" in markdown.render(found)
    tex = latex.render(found)
    assert r"softmax & 80.0 $\pm$ 10.0 (99.0) & not run (98.50 $\pm$ 0.20) & -- \\" in tex
    assert tex.count(r"\begin{tabular}") == 1 and r"miniature \& more" in tex and "{lrrr}" in tex
    lines = list(csv.DictReader(io.StringIO(records.as_csv(found))))
    assert (lines[0]["row"], lines[0]["column"], lines[0]["shown"]) == ("softmax", "L=64 d=32", "80.0 ± 10.0")
    assert lines[0]["mean"] == "80" and lines[0]["seeds"] == "3" and lines[1]["status"] == "not run"
    figure = json.loads(records.as_json(found))["figures"][0]
    assert figure["scores"] == pytest.approx([90, 80, 70]) and figure["runs"][0]["commit"] == "57d1e001a503965f"
    assert figure["runs"][0]["command"].startswith("python train.py") and figure["runs"][0]["versions"]["jax"] == "0.10.2"


def test_words_and_signs_mean_something_wherever_they_stand(tmp_path):
    """A published row that nothing makes, an average that is formed here, and one that cannot be formed."""
    table = write_table(tmp_path, TABLE.replace(', "<b>s5</b>": "identity"}', "}").replace("FAIL 36.4", "FAIL -"))
    found = summary.summarise(table, tmp_path / "runs", "paper")
    for said in (markdown.render(found), latex.render(found), page.render(found, {}, {}), records.as_csv(found)):
        assert "no recipe" in said and "this table has no run of it" in said and "98.75" in said and summary.FORMED in said
    for said, nothing, formed in ((markdown.render(found), "–", "†"), (latex.render(found), "--", r"$\dagger$")):
        assert f"{nothing}: nothing is published" in said and f"{nothing} under Average:" in said and f"98.75{formed}" in said
    statuses = {line["status"] for line in records.records(found)}
    assert statuses == {"not run", "no recipe", "not published", "a figure of this row is missing"}


def test_what_is_within_a_deviation_of_the_best_is_bold_too(table, tmp_path):
    rivals = [cell for cell in table.cells["cpu"] if cell.row != "softmax" and cell.column == "L=64 d=32"]
    for cell, accuracy in zip(rivals, (0.71, 0.70, 0.72)):
        write_run(cell, tmp_path / "runs", accuracy)
    found = markdown.render(summary.summarise(table, tmp_path / "runs", "cpu"))
    assert "**80.0 ± 10.0**" in found and "**71.0 ± 1.0**" in found and "Bold: the best" in found
    for cell in rivals[1:]:
        shutil.rmtree(cell.workdir(tmp_path / "runs"))
    found = markdown.render(summary.summarise(table, tmp_path / "runs", "cpu"))
    assert "**80.0 ± 10.0**" in found and "**71.0" not in found  # of one seed no spread is known


@pytest.mark.parametrize("better", ["max", "min"])
def test_a_change_has_no_best_and_further_up_is_not_always_better(table, tmp_path, better):
    for cell in table.cells["cpu"]:
        if cell.row != "softmax" and cell.column == "L=64 d=32":
            write_run(cell, tmp_path / "runs", 0.6 + 0.01 * cell.seed)
    found = summary.summarise(table, tmp_path / "runs", "cpu")

    def shown(**metric) -> tuple[str, str]:
        own = Metric(better=better, **metric)
        (section,) = found.sections
        sections = (dataclasses.replace(section, metric=own),)
        changed = dataclasses.replace(found, sections=sections)
        return markdown.render(changed), page.render(changed, {}, {})

    for said in shown():
        assert "**80" in said or "**61" in said or 'class="best"' in said
    assert f"Further {'up' if better == 'max' else 'down'} is better" in shown()[1]
    for said in shown(change=True):
        assert "**80" not in said and "**61" not in said and 'class="best"' not in said and "is better" not in said


def test_the_best_of_a_column_is_bold_and_alone_it_is_not(table, tmp_path):
    found = summary.summarise(table, tmp_path / "runs", "cpu")
    assert "**80.0" not in markdown.render(found)
    for cell in table.cells["cpu"]:
        if cell.row != "softmax" and cell.column == "L=64 d=32":
            write_run(cell, tmp_path / "runs", 0.6)
    found = summary.summarise(table, tmp_path / "runs", "cpu")
    assert (
        "**60.0" not in markdown.render(found)
        and "**80.0 ± 10.0**" in markdown.render(found)
        and r"\textbf{80.0 $\pm$ 10.0}" in latex.render(found)
    )


def test_five_hundred_runs_take_less_than_ten_seconds(tmp_path):
    """Of this process's own time, so that other work on the machine does not count."""
    table = write_table(tmp_path, TABLE.replace("range(3)", "range(125)"))
    for cell in table.cells["cpu"]:
        write_run(cell, tmp_path / "runs", 0.5, points=40)
    start = time.process_time()
    tables.write(table.path, tmp_path / "out", root=tmp_path / "runs", scale="cpu")
    assert time.process_time() - start < 10
    assert "n = 125" in (tmp_path / "out/table-cpu.html").read_text()


ORDERED = """
from efficient_attn.tables import Ordering

SHORT = ("short", "softmax", COLUMNS[0])
ORDERINGS = (
    Ordering("softmax before s5", "Nobody et al. 2020", SHORT, ("short", "<b>s5</b>", COLUMNS[0])),
    Ordering("narrow before wide", "Nobody et al. 2020", SHORT, ("short", "softmax", COLUMNS[1])),
    Ordering("wide before narrow", "Nobody et al. 2020", ("short", "softmax", COLUMNS[1]), SHORT),
    Ordering("s5: narrow before wide", "-", ("short", "<b>s5</b>", COLUMNS[0]), ("short", "<b>s5</b>", COLUMNS[1])),
)
"""


def test_orderings_are_tested_on_pairs_of_seeds(tmp_path):
    """Spreads of 10 points hide nothing where the pairs differ by 20 ± 1; where they differ by 20 ± 15 they do."""
    table = write_table(tmp_path, TABLE + ORDERED)
    scores = {("softmax", 0): (90, 70, 50), ("softmax", 1): (70, 51, 29), ("<b>s5</b>", 0): (85, 55, 15)}
    for cell in table.cells["cpu"]:
        found = scores.get((cell.row, table.protocols["short"].columns.index(cell.column)))
        if found:
            write_run(cell, tmp_path / "runs", found[cell.seed] / 100)
    found = summary.summarise(table, tmp_path / "runs", "cpu")
    verdicts = orderings.judge(found)
    assert verdicts[1].differences == pytest.approx((20, 19, 21)) and verdicts[1].sd == pytest.approx(1.0)
    assert [v.says for v in verdicts] == ["does not show", "shows", "the other way round", "not run"]
    assert "| narrow before wide | Nobody et al. 2020 | +20 ± 1 % | 3 | shows |" in markdown.render(found)
    assert [entry["says"] for entry in json.loads(records.as_json(found))["orderings"]] == [v.says for v in verdicts]
    assert orderings.judge(summary.summarise(table, tmp_path / "runs", "paper")) == []
    with pytest.raises(ConfigError, match="which no run makes"):
        write_table(tmp_path, TABLE + ORDERED.replace('"short", "softmax", COLUMNS[1]', '"short", "softmax", "L=1"'))


FOUND = """
from efficient_attn.tables import Finding

PROTOCOLS["other"] = Protocol("Other", ("a",), scale="cpu")


def sweep(scale):
    if scale == "cpu":
        there = {("short", "softmax", COLUMNS[1]): Finding("windows", "nats", {"protocol": "sliding"})}
        there["other", "elsewhere", "a"] = Finding("windows", "nats", {"protocol": "plain"})
        yield Cell("configs/quickstart.py:softmax", "softmax", COLUMNS[0], "short", {}, replicas=2, findings=there, tokens=64)
"""


def test_one_run_fills_places_of_several_sections_by_its_analyses(tmp_path):
    table = write_table(tmp_path, TABLE + FOUND)
    (cell,) = table.cells["cpu"]
    assert cell.commands("runs")[-1][2:] == [
        f"--workdir={cell.workdir('runs')}",
        "--analysis=windows",
        "--split=test",
        "--tokens=64",
    ]
    folder = write_run(cell, tmp_path / "runs", 0.5)
    rows = [{"seed": s, "protocol": p, "nats": x + s / 10} for s in (0, 1) for p, x in (("sliding", 0.2), ("plain", 0.4))]
    (folder / "analysis").mkdir()
    (folder / "analysis" / "windows.json").write_text(json.dumps({"rows": rows}))
    short, other = summary.summarise(table, tmp_path / "runs", "cpu").sections
    assert short.figures["softmax"]["L=64 d=64"].scores == pytest.approx((20.0, 30.0))
    assert short.figures["softmax"]["L=64 d=32"].scores == pytest.approx((50.0, 50.0))
    assert other.figures["elsewhere"]["a"].scores == pytest.approx((40.0, 50.0))
