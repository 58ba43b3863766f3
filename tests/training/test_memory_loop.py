"""A model with memory in the train loop: its memory is saved, continued bit for bit, and carried through evaluation."""

import jax
import numpy as np
import pytest

from configs.lm_memory import get_config
from efficient_attn.arguments import ConfigError
from efficient_attn.evaluation import score_once
from efficient_attn.plan import make_plan
from efficient_attn.steps import MEMORY
from efficient_attn.training import train_and_evaluate


def config_of(tmp_path, steps, recipe="compressive_transformer"):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} squared is {number * number}. " for number in range(400)))
    config = get_config(recipe)
    config.task.update(path=str(path), data_dir=str(tmp_path / "data"), context=8)
    config.model.update(depth=1, width=8, feed_forward_width=8)
    config.model.mixer.update(num_heads=1, memory_length=8, eval_memory_length=16, compressed_length=4)
    config.train.update(
        batch_size=4, eval_batch_size=2, duration=f"{steps} steps", eval_every="100 steps", checkpoint_every="100 steps",
        tensorboard=False, max_eval_batches=2,
    )  # fmt: skip
    config.optimizer.update(schedule="constant", warmup="0 steps")
    return config


@pytest.mark.usefixtures("quick_compile")
def test_memory_is_saved_and_continued_bit_for_bit(tmp_path):
    whole, _ = train_and_evaluate(config_of(tmp_path, 4), tmp_path / "whole")
    train_and_evaluate(config_of(tmp_path, 2), tmp_path / "parts")
    continued, _ = train_and_evaluate(config_of(tmp_path, 4), tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, continued)
    memory = whole.variables[MEMORY]["layer_0"]["mixer"]
    assert (
        memory["states"].shape == (4, 8, 8) and np.all(memory["compressed_ids"] > 0) and np.all(np.any(memory["compressed"], -1))
    )
    assert 0 < score_once(tmp_path / "whole")["test_loss"] < 10


def test_memory_needs_a_task_of_streams(tmp_path):
    config = config_of(tmp_path, 2)
    config.task.order = "shuffled"
    with pytest.raises(ConfigError, match="order='streams'"):
        make_plan(config)


def test_memory_is_not_rolled_back_past_batches_left_out(tmp_path):
    config = config_of(tmp_path, 2)
    config.train.on_divergence = "rollback"
    with pytest.raises(ConfigError, match=r"rollback.* leaves batches out"):
        make_plan(config)
