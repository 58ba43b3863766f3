"""README's tables are what results/ says, and nothing else of it is touched."""

import re
import subprocess
import sys

import pytest

from efficient_attn import tables, workdir
from efficient_attn.reporting import readme
from tests.reporting.fake_runs import write_run
from tests.test_runs import edit


def test_no_table_of_the_readme_is_stale():
    """Red? Run: python report.py --readme"""
    readme.refresh(check=True)
    assert len(readme.BLOCK.findall(readme.README.read_text())) >= 3


def test_a_stale_table_is_named_and_only_it_is_written(tmp_path):
    copy, text = tmp_path / "README.md", readme.README.read_text()
    (old,) = re.findall(r"\| `lax.scan` \| [\d.]+ \|", text)
    copy.write_text(text.replace(old, "| `lax.scan` | 99.9 |"))
    with pytest.raises(workdir.WorkdirError, match=r"selective_scan is not what results/ says.*report.py --readme"):
        readme.refresh(copy, check=True)
    assert "| 99.9 |" in copy.read_text()
    readme.refresh(copy)
    assert copy.read_text() == text


def test_a_committed_run_that_cannot_stand_in_its_table_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    cell = tables.load(tables.ROOT / "configs/tables/recall.py").cells["cpu"][0]
    folder = write_run(cell, tmp_path / "tables/recall")
    assert cell.row in readme.table("recall", "cpu")
    config = workdir.read_json(folder / "run.json")["config"]
    edit(folder / "run.json", config={**config, "train": {**config["train"], "batch_size": 7}})
    with pytest.raises(workdir.WorkdirError, match=r"other protocol, train.batch_size is 7, here 32; remove or rerun it"):
        readme.table("recall", "cpu")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("table selective_scan:", "table selective_scam:", "did you mean 'selective_scan'"),
        ("<!-- end of table -->", "", "not closed"),
    ],
)
def test_markers_that_are_wrong_are_errors(tmp_path, old, new, message):
    copy = tmp_path / "README.md"
    copy.write_text(readme.README.read_text().replace(old, new, 1))
    with pytest.raises(workdir.WorkdirError, match=message):
        readme.refresh(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--readme", "--runs=a,b"], "give one of --table="),
        (["--table=configs/tables/recal.py"], "did you mean 'recall.py'"),
        (["--table=configs/tables/recall.py", "--root=runs/recal"], "--root=runs/recal is no folder"),
    ],
)
def test_the_command_line_says_in_a_line_what_is_wrong(arguments, message):
    command = [sys.executable, "report.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tables.ROOT)
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr
