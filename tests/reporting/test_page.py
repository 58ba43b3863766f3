"""The page: what it holds and escapes, and what a browser makes of it. The browser tests need chromium on the PATH."""

import base64
import csv
import html
import html.parser
import io
import itertools
import json
import re
import shutil
import subprocess

import pytest
from matplotlib.figure import Figure
from PIL import Image

from efficient_attn import workdir
from efficient_attn.reporting import compare, costs, figures, plots, tables, text
from efficient_attn.tables import Metric
from tests.reporting.fake_runs import TABLE, write_run, write_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-extensions", "--force-color-profile=srgb",
         "--host-resolver-rules=MAP * ~NOTFOUND")  # fmt: skip
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (apt-get install chromium)")


class Parser(html.parser.HTMLParser):
    """figures: (protocol, row, column) -> text of the cell; hrefs, ids: of the page; tags: how often each occurs."""

    def __init__(self, source: str):
        super().__init__()
        self.figures, self.hrefs, self.ids, self.tags = {}, [], [], {}
        self._protocol = self._cell = None
        self._depth = 0
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.hrefs += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        self._protocol = attributes.get("data-protocol", self._protocol)
        if "data-row" in attributes:
            self._cell = (self._protocol, attributes["data-row"], attributes["data-column"])
        if tag == "span" and (self._depth or (self._cell and attributes.get("class") == "ours")):
            self._depth += 1

    def handle_endtag(self, tag):
        if tag == "span" and self._depth:
            self._depth -= 1
        if tag == "td":
            self._cell = None

    def handle_data(self, data):
        if self._depth:
            self.figures[self._cell] = self.figures.get(self._cell, "") + data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder with the files of a table whose runs are finished, failed, of another protocol and missing."""
    folder = tmp_path_factory.mktemp("report")
    table = write_table(folder)
    for cell in table.cells["cpu"][:9]:
        run = write_run(cell, folder / "runs", 0.6 + 0.1 * cell.seed)
    (run / "eval.json").write_text("{")
    cost = costs.Cost(parameters=54272, flops_per_token=3e5, flops_loops=1, step_bytes=2**25, state_bytes=4096, backend="cpu")
    cell = table.cells["cpu"][0]
    costs.write(folder / "runs", {cell.workdir(folder / "runs"): cost})
    tables.write(table.path, folder / "out", root=folder / "runs")
    return folder


def shown(folder) -> dict:
    lines = csv.DictReader(io.StringIO((folder / "out/table.csv").read_text()))
    return {(line["protocol"], line["row"], line["column"]): line["shown"] for line in lines}


def test_the_page_says_what_the_csv_says(report):
    page = Parser((report / "out/table.html").read_text())
    assert page.figures == shown(report) and len(page.figures) == 12
    assert (
        page.figures["short", "softmax", "L=64 d=32"] == "70.0 ± 10.0" and page.figures["short", "softmax", "Average"] == "70.0"
    )


def test_every_figure_leads_to_its_runs(report):
    source = (report / "out/table.html").read_text()
    page = Parser(source)
    assert len(set(page.ids)) == len(page.ids)
    assert {href[1:] for href in page.hrefs if href.startswith("#")} <= set(page.ids)
    assert page.tags["article"] == 8 and "57d1e001a503" in source and "jax 0.10.2" in source
    assert "at least 300,000 FLOPs a token" in source and "32.0 MB" in source
    assert "damaged" in source and "n = 2 of 3" in source


def test_everything_is_escaped_and_nothing_is_fetched(report):
    source = (report / "out/table.html").read_text()
    assert "<b>s5</b>" not in source and "&lt;b&gt;s5&lt;/b&gt;" in source
    assert "A <processor>" not in source and "A &lt;processor&gt;" in source
    page = Parser(source)
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", source) and "url(http" not in source and "@import" not in source


def test_a_page_is_the_same_whenever_it_is_made(report, tmp_path):
    tables.write(report / "table.py", tmp_path, root=report / "runs")
    for name in ("table.html", "table.json", "table.md"):
        assert (tmp_path / name).read_text() == (report / "out" / name).read_text()


def test_attention_that_was_looked_at_is_shown(tmp_path):
    table = write_table(tmp_path)
    folders = [write_run(cell, tmp_path / "runs") for cell in table.cells["cpu"][:3]]
    tables.write(table.path, tmp_path / "out", root=tmp_path / "runs")
    assert "<img" not in (tmp_path / "out/table.html").read_text()
    figures.save(Figure(figsize=(1, 1)), folders[1] / "analysis/attention_maps.png")
    tables.write(table.path, tmp_path / "out", root=tmp_path / "runs")
    page = (tmp_path / "out/table.html").read_text()
    data = base64.b64encode((folders[1] / "analysis/attention_maps.png").read_bytes()).decode()
    assert page.count("<img") == 1 and f'<img src="data:image/png;base64,{data}" alt="attention of softmax, L=64 d=32">' in page


def test_long_curves_are_thinned_to_their_ends():
    points = [(i, 1.0) for i in range(1000)]
    thinned = plots.thinned(points)
    assert (
        len(thinned) == 160 and thinned[0] == (0, 1.0) and thinned[-1] == (999, 1.0) and plots.thinned(points[:9]) == points[:9]
    )


def labels(svg: str) -> list[float]:
    """The numbers of a figure's text, in their order: those of the horizontal axis, then those of the vertical one."""
    return [float(said) for said in re.findall(r"<text[^>]*>(-?[\d.]+(?:e[+-]?\d+)?)</text>", svg.replace("\N{MINUS SIGN}", "-"))]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((2.7, 3.1, 4.3), [3, 3.5, 4]),
        ((0.0, 0.03, 0.06), [0, 0.02, 0.04, 0.06]),
        ((3, 20, 40), [5, 10, 20]),
        ((1, 10, 5e5), [1, 10, 100, 1e3, 1e4, 1e5]),
        ((-8e-6, -2e-5, -3.2e-5), [-3e-5, -2e-5, -1e-5]),
    ],
)
def test_a_trend_has_round_numbers_up_its_axis(values, shown):
    lines = [plots.Line(plots.style(0), list(zip((64, 128, 256), values)))]
    svg = plots.trend(lines, {}, "length", unit="nats", log_y=plots.spans_a_decade(lines))
    assert labels(svg) == [64, 128, 256, *shown] and len(shown) >= 2


def test_evenly_spaced_sizes_stand_evenly_and_labels_that_would_collide_are_left_out():
    sizes = [24 * i for i in range(1, 9)]
    line = plots.Line(plots.style(0), [(n, n / 100) for n in sizes])
    svg = plots.trend([line], {}, "first tokens changed", unit="nats")
    places = [float(x) for x in re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>\d+</text>', svg)[:8]]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert labels(svg)[:8] == sizes and max(gaps) - min(gaps) < 0.1
    assert plots.roomy([0, 9, 9.1, 18], ["512", "532", "602", "15512"]) == ["512", "532", "", "15512"]
    assert plots.roomy([0, 9, 17.9, 18], ["512", "532", "602", "15512"]) == ["512", "532", "", "15512"]


def test_ids_of_two_figures_on_a_page_differ():
    figures = [plots.curves([plots.Line(plots.style(0), [(0, 0), (1, y)])], {}, True) for y in (1, 2)]
    first, second = (set(re.findall(r'id="([^"]+)"', svg)) for svg in figures)
    assert first and not first & second
    for svg in figures:
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) == set(re.findall(r' id="([^"]+)"', svg))
        assert "var(--series-0)" in svg and "currentColor" in svg and "#a1b2" not in svg


def browse(page, folder, *options) -> tuple[str, list[str], list[str]]:
    """Chromium's output for a page, what the page said on the console, and what it asked the network for."""
    log = folder / "network.json"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr"]
    run = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=240, check=True)
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    requests = [e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"]
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line], requests


@needs_browser
def test_errors_and_requests_of_a_page_would_be_noticed(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://example.invalid/x.png"><script>console.error("broken")</script>')
    _, console, requests = browse(page, tmp_path, "--dump-dom")
    assert requests == ["http://example.invalid/x.png"] and len(console) == 1 and "broken" in console[0]


@needs_browser
def test_a_browser_shows_the_table_without_errors_and_without_the_network(report, tmp_path):
    dom, console, requests = browse(report / "out/table.html", tmp_path, "--dump-dom")
    assert (console, requests) == ([], [])
    dom = Parser(dom)
    assert dom.figures == shown(report)
    assert dom.tags["figure"] == 6 and dom.tags["path"] > 60  # curves 2, against width, bubbles, cost 2


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_plots_in_the_colours_of_its_scheme(report, tmp_path, scheme):
    image = tmp_path / "page.png"
    preferred = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    browse(report / "out/table.html", tmp_path, "--window-size=1000,2600", preferred, f"--screenshot={image}")
    pixels = Image.open(image).convert("RGB")
    colours = {"#%02x%02x%02x" % colour: n for n, colour in pixels.getcolors(2**24)}  # noqa: UP031
    _, light, dark = next(plots.palette())
    paper = {"light": "#fdfcf9", "dark": "#15171b"}[scheme]
    line = {"light": light, "dark": dark}[scheme]
    assert max(colours, key=colours.get) == paper and colours.get(line, 0) > 100


def test_runs_are_compared(tmp_path, monkeypatch):
    table = write_table(tmp_path)
    folders = [write_run(table.cells["cpu"][i], tmp_path / "runs", 0.5 + 0.1 * i) for i in (0, 3)]
    cost = costs.Cost(parameters=10, flops_per_token=2e6, flops_loops=0, step_bytes=2**20, state_bytes=4096, backend="cpu")
    monkeypatch.setattr(costs, "measure", lambda config: cost | {"parameters": config["model"]["width"]})
    markdown, page = compare.write(folders, tmp_path / "out")
    said = markdown.read_text()
    assert "| parameters | 32 | 64 |" in said and "| `model.width` | 32 | 64 |" in said and "0.8" in said
    assert "| FLOPs a token, training | 2,000,000 | 2,000,000 |" in said and "`task" not in said
    parsed = Parser(page.read_text())
    assert parsed.tags["svg"] > 4 and "A &lt;processor&gt;" in page.read_text()


def test_comparisons_that_make_no_sense_are_refused(tmp_path):
    folder = write_run(write_table(tmp_path).cells["cpu"][0], tmp_path / "runs")
    for folders, message in (([folder], "two folders or more"), ([folder, folder], "one folder twice")):
        with pytest.raises(compare.ConfigError, match=message):
            compare.write(folders, tmp_path / "out")
    with pytest.raises(workdir.WorkdirError, match=r"no run.json"):
        compare.write([folder, tmp_path], tmp_path / "out")
    assert compare.distinct_names([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]


def test_a_command_on_the_page_is_the_command(report):
    """Its arguments stand in elements of their own, so that lines are not broken at hyphens; the text is what to paste."""
    source = (report / "out/table.html").read_text()
    shown = re.findall(r'<pre class="command">(.*?)</pre>', source, re.S)
    texts = [html.unescape(re.sub(r"</?i>", "", block)).strip().splitlines() for block in shown]
    with open(report / "out/table.csv", newline="") as file:
        said = [line["command"].splitlines() for line in csv.DictReader(file) if line["command"]]
    assert sorted(texts) == sorted(said) and len(texts) == 8


def test_labels_are_moved_apart_in_their_order_and_stay_inside():
    assert plots.apart([0.1, 0.9, 0.5], 0.1) == [0.1, 0.9, 0.5]
    assert plots.apart([0.98, 0.97, 0.2, 0.99], 0.1) == pytest.approx([0.9, 0.8, 0.2, 1.0])
    assert plots.apart([], 0.1) == []


def test_a_run_that_fills_several_columns_has_one_learning_curve(tmp_path):
    first = TABLE.replace("zip(COLUMNS, (32, 64))", "zip(COLUMNS[:1], (32,))")
    table = write_table(tmp_path, first.replace("seed=seed,", 'seed=seed, lengths={"L=64 d=64": 64},'))
    for cell in table.cells["cpu"]:
        folder = write_run(cell, tmp_path / "runs", 0.5 + 0.1 * cell.seed)
        rows = [{"length": 64, "accuracy": 0.4, "seed": cell.seed}]
        workdir.write_json(folder / "lengths.json", {"rows": rows})
    tables.write(table.path, tmp_path / "out", root=tmp_path / "runs", scale="cpu")
    page = (tmp_path / "out/table-cpu.html").read_text()
    assert page.count('aria-label="Learning curves"') == 1 and page.count('aria-label="Quality against speed') == 1


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(99.96, "%", "100.0"), (2.784, "bits", "2.78"), (406.01, "ppl", "406"), (0.02584, "x", "0.0258"), (-5e-6, "x", "0.0000")],
)
def test_numbers_have_three_digits_and_no_exponent(value, unit, shown):
    assert text.number(value, Metric(unit=unit)) == shown
