"""Tests of the plug-in for axolotl, against the interface of axolotl 0.19, or of the installed one."""

import importlib
import importlib.util
import inspect
import sys
import types

import pytest
import torch
from models import build, logits, steering_parameters
from peft import LoraConfig, get_peft_model
from trainers import STEPS, trainer
from transformers import Trainer

from fused_steer import SteerConfig, patch_model

#: The methods of axolotl's BasePlugin that the plug-in overrides, with their parameters (axolotl 0.19).
INTERFACE = {
    "register": ["self", "cfg"],
    "get_input_args": ["self"],
    "post_model_load": ["self", "cfg", "model"],
    "add_callbacks_post_trainer": ["self", "cfg", "trainer"],
    "post_train": ["self", "cfg", "model"],
}
INSTALLED = importlib.util.find_spec("axolotl") is not None


@pytest.fixture
def plugin(monkeypatch):
    """Make the plug-in as axolotl does: import the module by its name and call the class without arguments."""
    if not INSTALLED:
        base = types.ModuleType("axolotl.integrations.base")
        base.BasePlugin = type("BasePlugin", (), {})
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.delitem(sys.modules, "fused_steer.axolotl", raising=False)
    return importlib.import_module("fused_steer.axolotl").SteeringPlugin()


def test_axolotl_interface_is_the_one_that_the_plugin_overrides(plugin):
    own = {name: value for name, value in vars(type(plugin)).items() if inspect.isfunction(value)}
    assert {name: list(inspect.signature(value).parameters) for name, value in own.items()} == INTERFACE
    if INSTALLED:
        base = type(plugin).__mro__[1]
        for name, parameters in INTERFACE.items():
            assert list(inspect.signature(getattr(base, name)).parameters) == parameters
    module, _, name = plugin.get_input_args().rpartition(".")
    fields = getattr(importlib.import_module(module), name)
    assert fields(fused_steer={"rank": 4}).fused_steer == {"rank": 4} and fields().fused_steer is None


@pytest.mark.parametrize("lora", [False, True], ids=["steering", "steering and LoRA"])
def test_axolotl_a_run_trains_saves_and_resumes(plugin, tmp_path, lora):
    cfg = {"fused_steer": {"rank": 4}, "output_dir": str(tmp_path)}
    plugin.register(cfg)

    def run(**more):
        model = build()
        if lora:
            model = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
        plugin.post_model_load(cfg, model)
        run = trainer(model, tmp_path, Trainer)
        for callback in plugin.add_callbacks_post_trainer(cfg | more, run):
            run.add_callback(callback)
        return model, run

    torch.manual_seed(0)
    model, whole = run()
    whole.train()
    plugin.post_train(cfg, model)
    saved = tmp_path / "fused_steer" / "default"
    again = patch_model(build(), saved)
    assert again.steering.config().rank == 4
    if not lora:
        assert torch.equal(logits(again), logits(model.eval())) and not torch.equal(logits(again), logits(build()))
    middle = str(tmp_path / f"checkpoint-{STEPS // 2}")
    torch.manual_seed(1)
    resumed, rest = run(resume_from_checkpoint=middle)
    rest.train(resume_from_checkpoint=middle)
    for name, parameter in steering_parameters(resumed).items():
        assert torch.equal(parameter, steering_parameters(model)[name]), name


@pytest.mark.parametrize(
    "given, error, message",
    [({"ranks": 4}, TypeError, "ranks"), ({"rank": 0}, ValueError, "rank is 0"), ([8], TypeError, "fused_steer is")],
)
def test_axolotl_bad_fields_are_refused_when_the_plugin_is_registered(plugin, given, error, message):
    with pytest.raises(error, match=message):
        plugin.register({"fused_steer": given})


@pytest.mark.skipif(not INSTALLED, reason="needs `pip install --no-deps axolotl==0.19.0 addict`")
def test_axolotl_itself_validates_and_runs_the_plugin(monkeypatch, tmp_path):
    """axolotl's own code registers the plug-in, merges its key into the configuration, and calls its hooks."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.setattr(PluginManager, "_instance", None)
    given = {
        "base_model": "a/b",
        "plugins": ["fused_steer.axolotl.SteeringPlugin"],
        "fused_steer": {"rank": 4, "layers": [1]},
        "output_dir": str(tmp_path),
        "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 1e-3,
    }
    cfg = DictDefault(given)
    prepare_plugins(cfg)
    cfg, manager, model = validate_config(cfg), PluginManager.get_instance(), build()
    manager.post_model_load(cfg, model)
    assert model.steering.config() == SteerConfig(rank=4, layers=[1])
    run = trainer(model, tmp_path, Trainer)
    for callback in manager.add_callbacks_post_trainer(cfg, run):
        run.add_callback(callback)
    run.train()
    manager.post_train(cfg, model)
    assert (tmp_path / f"checkpoint-{STEPS}" / "fused_steer" / "default" / "adapter_config.json").is_file()
    again = patch_model(build(), tmp_path / "fused_steer" / "default")
    assert torch.equal(logits(again), logits(model.eval())) and not torch.equal(logits(again), logits(build()))
    with pytest.raises(TypeError, match="ranks"):
        prepare_plugins(DictDefault(given | {"fused_steer": {"ranks": 4}}))
