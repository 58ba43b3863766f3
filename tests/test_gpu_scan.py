"""The scans' benchmark and numerics in small: what is in a row, what resumes, what is found wrong, what becomes the default."""

import json
import sys

import jax.numpy as jnp
import pytest

from benchmarks import cards, gpu_scan, scan_numerics, scan_tuning
from kernels import devices
from kernels.dispatch import Implementation, anything
from kernels.scan import numerics, selective_blocks, selective_portable
from kernels.scan.numerics import Case
from kernels.scan.selective_blocks import Blocks


def test_the_benchmark_writes_after_each_case_and_resumes(tmp_path, monkeypatch, quick_compile):
    out = tmp_path / "scan.json"
    monkeypatch.setattr(sys, "argv", ["gpu_scan", "--quick", "--ops=linear_scan", "--repeats=1", f"--out={out}"])
    gpu_scan.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert set(row["contestants"]) == {"chunked", "associative", "reference"}
        for x in row["contestants"].values():
            assert x["ms"] > 0 and x["over"].keys() == {"lax.scan", "lax.associative_scan"}
        assert "interpreted" in row["left out"]["portable"]
    assert rows[0]["io_gigabytes"] == 3 * 4 * 64 * 32 / 1e9  # a and b in, h out

    assert "| linear_scan | 1 x 64 x 32 x 1 | forward | – | – |" in out.with_suffix(".md").read_text()

    def measured_again(*_):
        raise AssertionError("a case that is in the file was measured again")

    monkeypatch.setattr(gpu_scan, "measure", measured_again)
    gpu_scan.main()
    assert json.loads(out.read_text())["rows"] == rows


def test_states_kept_are_counted_for_the_backward_pass_alone(monkeypatch):
    case = gpu_scan.CASES[0]
    found = gpu_scan.Found(1.0, {"forward": 10**9, "backward": 10**9}, {}, 1)
    programs = gpu_scan.Programs(*[lambda *_: (jnp.zeros(()), None)] * 3)
    monkeypatch.setattr(gpu_scan, "_first", lambda run: 2.0)
    monkeypatch.setattr(gpu_scan.Programs, "megabytes", lambda programs: 1.0)
    found.start("chunked", programs, None, None)
    rows = [found.row(case, which, 1) for which in ("forward", "backward")]
    found = [row["contestants"]["chunked"] for row in rows]
    assert [x["timed"] for x in found] == [1, 1]  # two seconds are slow
    kept = 4 * case.batch * case.length // 32 * case.channels * case.states
    assert [x["with states"] for x in found] == pytest.approx([0.5, 0.5 * (1 + kept / 1e9)])


def test_numerics_find_a_wrong_gradient_and_runs_that_differ(monkeypatch, quick_compile):
    case = Case("linear_scan", 9, "float32", channels=4, reset=True)
    chunked = numerics.OPS["linear_scan"].implementations["chunked"]
    assert numerics.check("chunked", case)["passed"]
    wrong = Implementation(lambda a, b, *rest: chunked.run(a + 1e-3 * b, b, *rest), anything, "")
    monkeypatch.setitem(numerics.OPS["linear_scan"].implementations, "chunked", wrong)
    found = numerics.check("chunked", case)
    assert not found["passed"] and found["repeats"] and not found["da"]["passed"] and not found["y"]["passed"]
    row = scan_numerics.one(("no such", case))
    assert not row["passed"] and "ValueError" in row["verdict"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place for files of devices, and a device."""
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    monkeypatch.setattr(devices, "here", lambda: "NVIDIA Test 1")
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    devices.verified.cache_clear()
    devices._fastest.cache_clear()


def test_a_kernel_becomes_the_default_where_it_is_right_and_was_measured(folder):
    otherwise = ("chunked", "reference")
    assert devices.preference("selective_scan", "gpu", otherwise) == otherwise
    cards.commit("attend", {"mosaic": {"passed": True, "cases": 3}})
    cards.commit("selective_scan", {"triton": {"passed": True, "cases": 9}, "portable": {"passed": False, "cases": 9}})
    _forget()
    assert devices.preference("selective_scan", "gpu", otherwise) == otherwise  # right, but not measured
    cards.commit("fastest", {"selective_scan": ["portable", "triton", "chunked", "reference"]})
    _forget()
    assert devices.preference("selective_scan", "gpu", otherwise) == ("triton", "chunked", "reference")
    assert devices.preference("selective_scan", "cpu", otherwise) == otherwise
    assert devices.verified("attend", "NVIDIA Test 1") == {"mosaic"}  # other sections stay


def test_the_order_is_that_of_both_passes_of_the_first_case():
    def row(case, which, **ms):
        return case._asdict() | {"pass": which, "contestants": {name: {"ms": value} for name, value in ms.items()}}

    first, second = [case for case in gpu_scan.CASES if case.op == "ssd"]
    rows = [row(second, "forward", chunked=1.0, triton=9.0), row(second, "backward", chunked=1.0, triton=9.0)]
    rows += [row(first, "forward", chunked=3.0, triton=1.0), row(first, "backward", chunked=5.0, triton=4.0)]
    assert gpu_scan.fastest(rows) == {"ssd": ["triton", "chunked"]}


def test_tuning_times_candidates_and_keeps_the_table_elsewhere():
    small = gpu_scan.Case("selective_scan", 1, 4, 8, 2, "float32")
    row = {"implementation": "portable", "states": 2, **Blocks(8, 2, 2, 4, 1)._asdict()}
    assert scan_tuning.timed(1, row, small)["median_ms"] > 0
    failed = scan_tuning.timed(1, row | {"implementation": "triton"}, small)
    assert "median_ms" not in failed and failed["error"]
    rows = [row | {"states": 16, "channels": channels, "median_ms": ms} for channels, ms in ((64, 3.0), (32, 1.0), (128, 2.0))]
    best = scan_tuning.best([*rows, failed], "portable")
    own = selective_portable.table()
    assert best["16"]["channels"] == 32 and best["64"] == own[64]._asdict()
    for (name, states), blocks in scan_tuning.CANDIDATES.items():
        assert blocks[0] == selective_blocks.table(name, devices.FALLBACK)[states]
        assert all(entry.K % entry.forward == entry.K % entry.backward == 0 for entry in blocks)
