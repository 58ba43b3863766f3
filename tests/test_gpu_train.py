"""The benchmark of train steps in small: what is in a row, what it counts, what resumes."""

import argparse
import json
import sys

import jax.numpy as jnp
import pytest

from benchmarks import gpu_train
from benchmarks.gpu_train import Step, Workload
from efficient_attn.steps import TrainState


def test_the_benchmark_writes_after_each_workload_and_resumes(tmp_path, monkeypatch, quick_compile):
    out = tmp_path / "train.json"
    arguments = ["--quick", "--workloads=LM, small", "--contestants", "chunked", "cudnn", "--repeats=2", "--seconds=0.01"]
    monkeypatch.setattr(sys, "argv", ["gpu_train", *arguments, f"--out={out}"])
    gpu_train.main()
    [row] = json.loads(out.read_text())["rows"]
    assert list(row["contestants"]) == ["chunked"] and "NVIDIA" in row["left out"]["cudnn"]
    found = row["contestants"]["chunked"]
    assert found["ms"] > 0 and len(found["times"]) == 2 and found["gigabytes"] > 0
    assert found["tokens_per_second"] == pytest.approx(256e3 / found["ms"])
    # 512 vectors of 64; in two layers four matrices of 64 x 64, two of 64 x 128, and attention to 128 keys, half of them masked
    weights = 512 * 64 + 2 * (4 * 64**2 + 2 * 64 * 128)
    assert found["tflops"] == pytest.approx(6 * 256 * (weights + 2 * 64 * 128) / found["ms"] / 1e9)

    assert "| LM, small, 2 x 128 | chunked |" in out.with_suffix(".md").read_text()

    def measured_again(*_):
        raise AssertionError("a workload that is in the file was measured again")

    monkeypatch.setattr(gpu_train, "measure", measured_again)
    gpu_train.main()


def test_a_step_that_ends_in_no_number_is_left_out(monkeypatch):
    def init():
        return TrainState(jnp.int32(0), {"w": jnp.ones(2)}, (), {}, None, jnp.zeros(2, jnp.uint32))

    def run(state, batch):
        return state.replace(step=state.step + 1), {"loss": (jnp.float32("nan"), jnp.float32(1))}

    monkeypatch.setitem(gpu_train.STEPS, "LM, small", lambda work, implementation: Step(run, init, {}, None))
    row = gpu_train.measure(argparse.Namespace(repeats=1, seconds=0.01), 1.0, Workload("LM, small", 8, 1, ("chunked",)))
    assert row["contestants"] == {} and row["left out"] == {"chunked": "FloatingPointError: the loss is nan after 1 steps"}


def test_language_models_take_the_same_tokens_at_every_context():
    assert {work.tokens for work in gpu_train.workloads(65536) if work.name == "LM 124M"} == {65536}
    assert {work.tokens for work in gpu_train.workloads(65536) if work.name == "Mamba 129M"} == {32768}
