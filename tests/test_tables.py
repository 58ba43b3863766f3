"""Tables as configurations: every one loads, every cell builds, and what is wrong with a file is said in a line."""

import pathlib
import textwrap

import pytest

from efficient_attn import tables
from efficient_attn.arguments import ConfigError
from efficient_attn.config import normal_form
from efficient_attn.plan import make_plan
from efficient_attn.tables import Cell
from efficient_attn.tasks import corpora

FILES = sorted((tables.ROOT / "configs/tables").glob("[a-z]*.py"))
QUICKSTART = dict(config="configs/quickstart.py:softmax", row="softmax", column="a", protocol="p")


@pytest.fixture
def any_text(tmp_path, monkeypatch):
    """In place of every corpus, so that none is downloaded."""
    (tmp_path / "text.txt").write_text("to be or not " * 20_000)
    monkeypatch.setattr(corpora, "locate", lambda name, data_dir: tmp_path / "text.txt")


@pytest.mark.usefixtures("any_text")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_table_loads_and_its_first_cells_build(path):
    """The first cell of each recipe here; every cell of every table with -m exhaustive."""
    table = tables.load(path)
    first = {cell.config: cell for cells in table.cells.values() for cell in cells}
    for cell in list(first.values())[:3]:
        make_plan(cell.get_config())
    assert table.rows(next(iter(table.protocols)))


def test_measured_figures_have_rows_and_columns():
    for path in FILES:
        table = tables.load(path)
        for scale in table.scales:
            for protocol, rows in table.measured(scale).items():
                columns = {column for figures in rows.values() for column in figures}
                assert columns <= set(table.protocols[protocol].columns) and table.measured_by
                assert table.protocols[protocol].scale == scale and all(v > 0 for row in rows.values() for v in row.values())


def test_what_nothing_makes_says_why():
    """Every published figure has a run, a benchmark's figure or a reason of its own; every reason is one of some figure."""
    for path in FILES:
        table = tables.load(path)
        for name, protocol in table.protocols.items():
            made = {place for cells in table.cells.values() for cell in cells for place in cell.places}
            measured = table.measured(protocol.scale).get(name, {})
            given = {
                (row, column): protocol.absence(row, column, published=column in table.published.get(name, {}).get(row, {}))
                for row in table.rows(name)
                for column in protocol.columns
                if (name, row, column) not in made and column not in measured.get(row, {})
            }
            reasons = set(filter(None, given.values()))
            assert reasons <= set(protocol.absent), (path.stem, name, [place for place, why in given.items() if why])
            assert set(protocol.absent) <= reasons, (path.stem, name)


AVERAGES = {
    "lra-original": {"transformer": 54.39, "local": 46.06, "sparse_transformer": 51.24, "longformer": 53.46, "linformer": 51.36,
                     "reformer": 50.67, "synthesizer": 52.88, "bigbird": 55.01, "linear_attention": 50.55, "performer": 51.41},
    "lra-small": {"transformer": 57.37, "nystrom": 58.93, "linformer": 54.69, "performer": 58.00, "bigbird": 59.05},
    "lra-ssm": {"fnet": 54.42, "s4": 86.09, "s4d": 84.89, "dss": 81.88, "mamba": 66.59, "s5": 87.46, "lru": 86.3, "mega": 88.21},
}  # fmt: skip


@pytest.mark.parametrize("protocol", AVERAGES)
def test_published_rows_have_the_averages_that_papers_print(protocol):
    """The printed averages are not in the table: they tell if its figures are right, and over which tasks."""
    table = tables.load(tables.ROOT / "configs/tables/lra.py")
    for row, printed in AVERAGES[protocol].items():
        figures = [table.published[protocol][row][column].number for column in table.protocols[protocol].average]
        mean = sum(50.0 if figure is None else figure for figure in figures) / len(figures)
        assert mean == pytest.approx(printed, abs=0.0101), row


@pytest.mark.exhaustive
@pytest.mark.usefixtures("any_text")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_cell_builds(path):
    """`make_plan` raises where one does not."""
    cells = [cell for cells in tables.load(path).cells.values() for cell in cells]
    for cell in {(cell.config, tuple(cell.overrides.items())): cell for cell in cells}.values():
        make_plan(cell.get_config())


def test_a_command_means_the_configuration_of_its_cell(monkeypatch):
    """The flags, parsed as train.py parses them, give what `get_config` gives."""
    from absl import flags

    from efficient_attn import cli

    overrides = {"train.duration": "70 steps", "optimizer.learning_rate": 1e-4, "train.tensorboard": False, "model.width": 32}
    cell = Cell(**QUICKSTART, overrides=overrides, seed=7)
    command = cell.command("runs/t")
    assert command[:2] == ["python", "train.py"] and command[-1] == f"--workdir={cell.workdir('runs/t')}"
    values = flags.FlagValues()
    holder = cli.config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    monkeypatch.chdir(tables.ROOT)
    monkeypatch.setattr("sys.argv", command[1:-1])
    values(command[1:-1])
    assert normal_form(holder.value) == normal_form(cell.get_config())
    assert normal_form(holder.value)["train"]["duration"] == "70 steps"


def test_folders_are_readable_and_apart():
    cell = Cell(**{**QUICKSTART, "row": "softmax (ours)", "column": "L=64 d=32"}, choice="lr=0.001", lengths={"128": 128})
    assert cell.workdir("r") == pathlib.Path("r/p/softmax_ours-L=64_d=32-lr=0.001-s0")
    assert Cell(**QUICKSTART, replicas=3, seed=2).workdir("r").name == "softmax-a-s2-4"
    _train, score, lengths = cell.commands("r")
    assert score[1] == "eval.py" and lengths[-1] == f"--out={cell.workdir('r')}/lengths" and "--lengths=128" in lengths


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"model.widht": 3}, "no field model.widht.*width"),
        ({"modle.width": 3}, "no field modle.width"),
        ({"model.width.x": 3}, "no field"),
        ({"model.width": "wide"}, "wrong type"),
    ],
)
def test_wrong_overrides_are_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        Cell(**QUICKSTART, overrides=override).get_config()
    assert "\n" not in str(error.value)


GOOD = """
'''A table.'''
from efficient_attn import tables
from efficient_attn.tables import Cell, Metric, Protocol, published
TITLE, METRIC, SCALES = "t", Metric(), {"paper": "p"}
PROTOCOLS = {"p": Protocol("P", ("a", "b"))}
PUBLISHED = {"p": published(("a", "b"), "Paper, table 1", {"softmax": "1.0 -", "x": "FAIL 2.00±0.1"})}
def sweep(scale):
    return [Cell("configs/quickstart.py:softmax", "softmax", "a", "p")]
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def sweep(", "def swept(", "no function sweep"),
        ('"t", Metric()', '"t", "accuracy"', "its METRIC is not a Metric"),
        ("return [Cell(", "return [dict(a=1), Cell(", "must yield cells"),
        ('"a", "p")]', '"c", "p")]', "'c' is no column"),
        ('"a", "p")]', '"a", "q")]', "protocol 'q'"),
        ('"a", "p")]', '"a", "p")] * 2', "would share the folder"),
        ('published(("a", "b")', 'published(("a", "bb")', "'bb'.*did you mean 'b'"),
        ('"FAIL 2.00±0.1"', '"FAIL"', "'x' has 1 figures for 2 columns"),
        ('PUBLISHED = {"p"', 'PUBLISHED = {"r"', r"\['r'\]"),
        ('("a", "b"))}', '("a", "b"), average=("z",))}', "average or floors"),
        ('("a", "b"))}', '("a", "b"), scale="cpu")}', "scale 'cpu'"),
        ('("a", "b"))}', '("a", "b"), beside="o")}', "beside 'o'"),
        ('("a", "b"))}', '("a", "b"), absent=(tables.Absent("why", ("y",)),))}', "absent names 'y'"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, old, new, message):
    assert old in GOOD
    path = tmp_path / "table.py"
    path.write_text(textwrap.dedent(GOOD.replace(old, new)))
    with pytest.raises(ConfigError, match=message) as error:
        tables.load(path)
    assert "\n" not in str(error.value)


def test_a_grid_of_ones_own_is_a_table_too(tmp_path):
    path = tmp_path / "grid.py"
    path.write_text(
        "from efficient_attn.tables import Cell\n"
        "def sweep(scale):\n"
        "    return [Cell('configs/quickstart.py:softmax', 'softmax', f'd={d}', 'grid', {'model.width': d}) for d in (32, 64)]\n"
    )
    grid = tables.load(path)
    assert grid.title == "grid.py" and grid.metric.key == "test_accuracy" and grid.published == {}
    assert grid.protocols["grid"].columns == ("d=32", "d=64") and grid.rows("grid") == ["softmax"]


def test_published_figures_keep_words_deviations_and_gaps(tmp_path):
    path = tmp_path / "table.py"
    path.write_text(GOOD)
    figures = tables.load(path).published["p"]
    assert figures["softmax"]["a"].number == 1.0 and "b" not in figures["softmax"]
    word, figure = figures["x"]["a"], figures["x"]["b"]
    assert (word.value, word.number, figure.value, figure.number, figure.std) == ("FAIL", None, "2.00", 2.0, "0.1")
    with pytest.raises(ConfigError, match="no configuration file"):
        tables.load(tmp_path / "tabel.py")
