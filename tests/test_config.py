"""Configurations: completed, comparable, overridable, and wrong ones refused; every file in configs/ makes a plan."""

import importlib
import json
import pathlib
import re

import pytest

from efficient_attn import models
from efficient_attn.arguments import ConfigError, arguments_of
from efficient_attn.config import TrainConfig, differences, experiment, normal_form, with_defaults
from efficient_attn.mixers import Attention
from efficient_attn.plan import describe, make_plan

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith(("__", "recipes")))
MODULES = {name: importlib.import_module(f"configs.{name}") for name in FILES}
RECIPES = [
    pytest.param(name, recipe, marks=[pytest.mark.exhaustive] if recipe in getattr(module, "FAILED", {}) else [])
    for name, module in MODULES.items()
    for recipe in module.RECIPES
]
NEEDS_DATA_TO_COUNT = {"lm_text"}


def small(**changes):
    recipe = dict(
        model=dict(depth=1, width=8, mixer=dict(name="softmax", num_heads=2)), train=dict(batch_size=4, duration="3 steps")
    )
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values
    return experiment(name="small", task=dict(name="multi_query_recall", vocab_size=128), recipes={"a": recipe}, recipe="a")


@pytest.mark.parametrize("name, recipe", RECIPES)
def test_every_recipe_makes_a_plan(name, recipe, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config(recipe)
    if config.task.get("corpus"):
        config.task.path = str(ROOT / "README.md")  # instead of a download
    if config.task.name == "lm_tokens":  # it makes its tokens to count them; layers are alike, up to 36 of them
        pytest.importorskip("tokenizers", reason="lm_tokens needs the optional package tokenizers")
        config.task.data_dir, config.model.depth = str(tmp_path), 1
    if config.model.get("depth", 0) > 2 and not any(isinstance(value, tuple) for value in config.model.values()):
        config.model.depth = 2  # further layers are the same again
    plan = make_plan(config)
    text = describe(plan)
    assert plan.total > 0 and f"{plan.total:,} steps" in text and plan.task.name in text


def test_a_warm_up_longer_than_the_run_is_told():
    for warmup, is_long in (("3 steps", False), ("4 steps", True)):
        assert ("longer than the run" in describe(make_plan(small(optimizer=dict(warmup=warmup))))) == is_long


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_to_expect(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert f"python train.py --config=configs/{name}.py" in doc
    assert re.search("[Pp]ublished|[Ee]xpected", doc) and "time" in doc


def test_defaults_of_all_constructors_are_filled_in():
    config = small()
    assert set(config.model.mixer.keys()) == {"name", *arguments_of(Attention)}
    assert set(config.train.keys()) == set(arguments_of(TrainConfig))
    assert set(config.model.keys()) == set(arguments_of(models.LanguageModel)) - set(models.FROM_TASK) | {"dtype"}
    assert config.model.mixer.rotation.name == "none" and config.model.mixer.causal is True


def test_overrides_reach_the_model():
    config = small()
    config.model.mixer.num_kv_heads = 1  # its default is None
    config.model.mixer.num_heads = 4
    params = make_plan(config).state.params["layer_0"]["mixer"]
    assert params["query"]["kernel"].shape == (8, 4, 2) and params["key"]["kernel"].shape == (8, 1, 2)
    with pytest.raises(AttributeError):
        config.model.mixer.num_head = 4


def test_normal_form_survives_json_and_makes_the_same_plan():
    config = small(optimizer=dict(rules=((r".*/bias", dict(weight_decay=0.0)), (r".*", {}))))
    normal = normal_form(config)
    assert normal == json.loads(json.dumps(normal))
    assert make_plan(normal).config == make_plan(config).config
    assert differences(normal, normal_form(small())) == {
        "optimizer.rules": ([[".*/bias", {"weight_decay": 0.0}], [".*", {}]], [[".*", {}]])
    }


def test_hybrids_are_completed_each():
    config = small(model=dict(depth=2, mixer=(dict(name="softmax", num_heads=2), dict(name="s5", state_dim=8))))
    assert [m["name"] for m in config.model.mixer] == ["softmax", "s5"]
    assert config.model.mixer[1]["dt_min"] == 0.001 and config.model.mixer[1]["causal"] is True
    assert "Lambda_re" in make_plan(config).state.params["layer_1"]["mixer"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model=dict(mixer=dict(name="sofmax"))), r"model.mixer.name='sofmax' is unknown \(did you mean 'softmax'\?\)"),
        (dict(model=dict(mixer=dict(name="softmax", heads=2))), r"model.mixer has no argument 'heads'"),
        (dict(model=dict(mixer="softmax")), r"model.mixer must be a dict\(name=...\)"),
        (dict(model=dict(mixer=dict(name="softmax", rotation="rotary"))), r"model.mixer.rotation must be dict\(name=...,"),
        (dict(model=dict(widht=8)), r"model has no argument 'widht' \(did you mean 'width'\?\)"),
        (dict(train=dict(batchsize=8)), r"train has no argument 'batchsize' \(did you mean 'batch_size'\?\)"),
        (dict(optimizer=dict(lr=1)), r"optimizer has no argument 'lr'"),
        (dict(task=dict(lenght=1)), r"task has no argument 'lenght' \(did you mean 'length'\?\)"),
        (dict(train=dict(log_every=0)), r"train.log_every=0 must be at least 1"),
        (dict(model=dict(dropout=2.0)), r"model.dropout=2.0 must be at least 0 and less than 1"),
        (dict(optimizer=dict(learning_rate=-1.0)), r"optimizer.learning_rate=-1.0 must be more than 0"),
        (dict(modell=dict()), r"unknown sections \['modell'\]"),
    ],
)
def test_misspelt_fields_are_errors_with_a_hint(changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_missing_recipe_is_an_error():
    with pytest.raises(ConfigError, match=r"recipe of configs/small.py='b' is unknown; one of: a"):
        experiment(name="small", task=dict(name="listops"), recipes={"a": {}}, recipe="b")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train=dict(batch_size=5, accumulate=2)), r"train.batch_size=5 must be a positive multiple of .* the next one is 6"),
        (dict(train=dict(duration="3")), r"train.duration='3' is no duration"),
        (dict(train=dict(duration="0 steps")), r"train.duration='0 steps' is less than one step"),
        (dict(train=dict(eval_every="0 steps")), r"train.eval_every='0 steps' is less than one step"),
        (dict(train=dict(checkpoint_every="0 epochs")), r"train.checkpoint_every='0 epochs' is less than one step"),
        (dict(optimizer=dict(schedule="cos")), r"optimizer.schedule='cos' is unknown \(did you mean 'cosine'\?\)"),
        (dict(optimizer=dict(rules=((".*/B", {}),))), r"optimizer.rules: no rule matches parameter"),
        (dict(model=dict(mixer=dict(name="softmax", num_heads=3))), r"width 8 is not divisible by num_heads=3"),
        (dict(model=dict(mixer=dict(name="softmax", causal=False))), r"a language model needs causal mixers"),
        (dict(task=dict(num_pairs=40)), r"task: multi_query_recall: .*num_pairs=40"),
    ],
)
def test_what_only_fits_together_wrongly_is_found_before_compiling(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(small(**changes))


@pytest.mark.parametrize(
    ("recipe", "section", "changes", "message"),
    [
        ("linear_attention_cpu", "task", {"max_tokens": 2**31}, "sequences have 2,147,483,648 tokens; positions are int32"),
        ("nystrom_small", "model", {"mixer": {"name": "nystrom", "bias": {}}}, r"model.mixer.bias.name=None is unknown"),
    ],
)
def test_what_a_recipe_cannot_be_changed_to_is_told(recipe, section, changes, message):
    config = normal_form(importlib.import_module("configs.lra_listops").get_config(recipe))
    with pytest.raises(ConfigError, match=message):
        make_plan({**config, section: {**config[section], **changes}})


@pytest.mark.parametrize("name", ["lra_listops:bigbird", "lm_jamba:small", "synthetic_recall:softmax"])
def test_defaults_of_a_complete_configuration_change_nothing(name):
    file, recipe = name.split(":")
    config = normal_form(importlib.import_module(f"configs.{file}").get_config(recipe))
    assert with_defaults(config) == config
    del config["optimizer"]["clip_norm"]
    assert differences(with_defaults(config), config) == {"optimizer.clip_norm": (0.0, None)}
