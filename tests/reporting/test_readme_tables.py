"""README's tables are what results/ says, and nothing else of it is touched."""

import subprocess
import sys

import pytest

from efficient_attn import tables
from efficient_attn.reporting import readme
from efficient_attn.workdir import WorkdirError


def test_no_table_of_the_readme_is_stale():
    """Red? Run: python report.py --readme"""
    readme.refresh(check=True)
    assert len(readme.BLOCK.findall(readme.README.read_text())) >= 3


def test_a_stale_table_is_named_and_only_it_is_written(tmp_path):
    copy, text = tmp_path / "README.md", readme.README.read_text()
    old = "| `lax.scan` | 3.7 |"
    assert text.count(old) == 1
    copy.write_text(text.replace(old, "| `lax.scan` | 9.9 |"))
    with pytest.raises(WorkdirError, match=r"selective_scan is not what results/ says.*report.py --readme"):
        readme.refresh(copy, check=True)
    assert "9.9" in copy.read_text()
    readme.refresh(copy)
    assert copy.read_text() == text


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
    with pytest.raises(WorkdirError, match=message):
        readme.refresh(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--readme", "--runs=a,b"], "give one of --table="),
        (["--table=configs/tables/recal.py"], "did you mean 'recall.py'"),
    ],
)
def test_the_command_line_says_in_a_line_what_is_wrong(arguments, message):
    command = [sys.executable, "report.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tables.ROOT)
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr
