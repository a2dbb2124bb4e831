"""What PEFT and transformers load is what was checked, whatever happens to the file; a refusal leaves the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from models import build, classifier, logits, randomize, refused, skip_without_add_adapter, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import fused_steer.peft
from fused_steer import SteerConfig, patch_model
from fused_steer.peft import PostBlockConfig
from fused_steer.peft.loading import copy_instead_of_mapping

WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, seed: int = 1, **fields: Any) -> nn.Module:
    """An adapter in a folder, and the model that it steers."""
    model = patch_model(build(), SteerConfig(**({"rank": 4} | fields)))
    randomize(model, seed=seed)
    model.steering.save(folder)
    return model


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, 0)


def overwriting(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any], before: bool) -> None:
    """PEFT opens the weights just after they changed, or they change just after it has read them."""
    load = peft.peft_model.load_peft_weights

    def loading(*args: Any, **kwargs: Any) -> Any:
        if before:
            change()
        found = load(*args, **kwargs)
        if not before:
            change()
        return found

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", loading)


@pytest.mark.parametrize("before", [True, False], ids=["before PEFT opens it", "after PEFT has read it"])
def test_loading_a_bit_that_flips_after_the_check(before, tmp_path, monkeypatch):
    write(tmp_path)
    overwriting(monkeypatch, lambda: flip(tmp_path / WEIGHTS), before)
    model = build()
    with refused(ValueError, "contents do not match", "expected sha256", model=model):
        PeftModel.from_pretrained(model, str(tmp_path))
    assert torch.equal(logits(model), logits(build()))


@pytest.mark.parametrize("before", [True, False], ids=["before PEFT opens it", "after PEFT has read it"])
def test_loading_a_file_that_is_cut(before, tmp_path, monkeypatch):
    """Whoever looks at a map of it then is killed."""
    write(tmp_path)
    overwriting(monkeypatch, lambda: cut(tmp_path / WEIGHTS), before)
    child = os.fork()
    if not child:
        try:
            model = build()
            with refused(ValueError, "expected", model=model):
                PeftModel.from_pretrained(model, str(tmp_path))
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def mapped(monkeypatch) -> list[Path]:
    """The files that safetensors maps into memory; they may be cut while it reads their maps."""
    found: list[Path] = []
    safe_open = safetensors.torch.safe_open

    def noted(file: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(Path(file))
        return safe_open(file, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "safe_open", noted)
    return found


def test_loading_maps_no_file_of_steering(tmp_path, mapped):
    expected = logits(write(tmp_path / "a"))
    model = PeftModel.from_pretrained(build(), str(tmp_path / "a"))
    model.load_adapter(str(tmp_path / "a"), "second", low_cpu_mem_usage=True)
    model.load_adapter(str(tmp_path), "third", subfolder="a")
    model.load_adapter(str(tmp_path / "a"), "default")
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        assert torch.equal(logits(model.eval()), expected)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    found = peft.load_peft_weights(str(tmp_path / "linked"), device="cpu")
    assert mapped == []
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)
    flip(tmp_path / "a" / WEIGHTS)
    with refused(ValueError, "expected sha256"):
        peft.load_peft_weights(str(tmp_path / "a"), device="cpu")


def test_loading_of_other_methods_is_pefts_own(tmp_path, mapped):
    lora = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(), str(tmp_path))), logits(lora))
    assert mapped == [tmp_path / WEIGHTS]
    cut(tmp_path / WEIGHTS)
    with pytest.raises(safetensors.SafetensorError):
        PeftModel.from_pretrained(build(), str(tmp_path))


def test_loading_warns_where_peft_reads_by_a_function_of_another_name(monkeypatch):
    monkeypatch.delattr(peft.utils.save_and_load, "safe_load_file")
    with pytest.warns(UserWarning, match="do not change files while PEFT loads them"):
        copy_instead_of_mapping()


@pytest.mark.parametrize("before", [True, False], ids=["before PEFT opens it", "after PEFT has read it"])
def test_loading_another_whole_adapter_that_takes_the_place(before, tmp_path, monkeypatch):
    """Of the same config it is loaded, as if it had been there; of another it is refused."""
    write(tmp_path / "a")
    other = []
    overwriting(monkeypatch, lambda: other.append(write(tmp_path / "a", seed=2)), before)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path / "a"))
    assert torch.equal(logits(loaded), logits(other[0]))
    write(tmp_path / "b")
    monkeypatch.undo()
    overwriting(monkeypatch, lambda: write(tmp_path / "b", activation="tanh"), before)
    model = build()
    with refused(ValueError, str(tmp_path / "b"), "activation 'tanh'", "expected 'silu'", model=model):
        PeftModel.from_pretrained(model, str(tmp_path / "b"))


def test_loading_over_an_adapter_of_the_model(tmp_path):
    """As a Trainer that resumes does. PEFT reads no config then; a refusal leaves the adapter."""
    expected = logits(write(tmp_path / "a"))
    write(tmp_path / "other", activation="tanh")
    write(tmp_path / "flipped", seed=3)
    flip(tmp_path / "flipped" / WEIGHTS)
    model = get_peft_model(build(), PostBlockConfig(r=4)).eval()
    model.load_adapter(str(tmp_path / "a"), "default")
    assert torch.equal(logits(model), expected)
    for name, part in {"other": "activation 'tanh'", "flipped": "expected sha256"}.items():
        with refused(ValueError, part, "expected", model=model):
            model.load_adapter(str(tmp_path / name), "default")
        assert torch.equal(logits(model), expected)


def test_loading_a_further_adapter_that_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a", layers=[1])
    expected = logits(write(tmp_path / "b"))
    model = PeftModel.from_pretrained(build(), str(tmp_path / "a"), is_trainable=True)
    overwriting(monkeypatch, lambda: flip(tmp_path / "b" / WEIGHTS), before=True)
    with refused(ValueError, "expected sha256", model=model):
        model.load_adapter(str(tmp_path / "b"), "second", is_trainable=True)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    monkeypatch.undo()
    flip(tmp_path / "b" / WEIGHTS)
    model.load_adapter(str(tmp_path / "b"), "second")
    model.set_adapter("second")
    assert torch.equal(logits(model.eval()), expected)


def test_loading_tensors_that_somebody_else_has_read(tmp_path):
    """They are of no file that is known here, and are checked for form and for being finite."""
    model = write(tmp_path)
    tensors = peft.peft_model.load_peft_weights(str(tmp_path), device="cpu")
    target = get_peft_model(build(), PostBlockConfig(r=4)).eval()
    peft.set_peft_model_state_dict(target, tensors)
    assert torch.equal(logits(target), logits(model))
    first = next(iter(tensors))
    with refused(ValueError, "NaN", "expected", model=target):
        peft.set_peft_model_state_dict(target, tensors | {first: tensors[first] / 0})


def test_loading_a_head_is_of_the_bytes_that_were_checked(tmp_path, monkeypatch):
    model = get_peft_model(classifier(), PostBlockConfig(r=4)).eval()
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    load = peft.peft_model.load_peft_weights

    def other(*args: Any, **kwargs: Any) -> Any:
        return {name: tensor + 1 for name, tensor in load(*args, **kwargs).items()}

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", other)
    loaded = PeftModel.from_pretrained(classifier(), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()).logits, expected)
    bare = classifier()
    flip(tmp_path / WEIGHTS)
    with refused(ValueError, "expected sha256", model=bare):
        PeftModel.from_pretrained(bare, str(tmp_path))


# --------------------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def whole(tmp_path) -> tuple[Path, nn.Module]:
    """A folder with a base model and its adapter, and the steered model."""
    skip_without_add_adapter()
    model = write(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole")
    return tmp_path, model


def test_loading_by_transformers_is_of_the_bytes_that_were_checked(whole, monkeypatch):
    """transformers opens no weights of an adapter."""
    folder, model = whole
    opened: list[str] = []
    safe_open = transformers.modeling_utils.safe_open

    def noted(file: str, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(file).name)
        return safe_open(file, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", noted)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "whole")
    assert torch.equal(logits(loaded), logits(model)) and opened == ["model.safetensors"]
    added = build()
    added.load_adapter(str(folder / "adapter"))
    assert torch.equal(logits(added.eval()), logits(model)) and opened == ["model.safetensors"]
    added.load_adapter(str(folder / "adapter"), "second", is_trainable=True)
    added.set_adapter("second")
    assert torch.equal(logits(added.eval()), logits(model))
    assert all(p.requires_grad for name, p in added.named_parameters() if ".second." in name)


@pytest.mark.parametrize("change", [flip, cut])
def test_loading_by_transformers_refuses_other_weights(change, whole):
    folder, model = whole
    change(folder / "adapter" / WEIGHTS)
    bare = build()
    with refused(ValueError, str(folder / "adapter" / WEIGHTS), "expected", model=bare):
        bare.load_adapter(str(folder / "adapter"))
    assert torch.equal(logits(bare), logits(build())) and not getattr(bare, "peft_config", None)
    change(folder / "whole" / WEIGHTS)
    with refused(ValueError, str(folder / "whole" / WEIGHTS), "expected"):
        AutoModelForCausalLM.from_pretrained(folder / "whole")
    steered = build()
    write(folder / "good")
    steered.load_adapter(str(folder / "good"))
    expected = logits(steered.eval())
    with refused(ValueError, str(folder / "adapter" / WEIGHTS), "expected", model=steered):
        steered.load_adapter(str(folder / "adapter"), "second")
    assert list(steered.peft_config) == ["default"] and torch.equal(logits(steered), expected)


def test_loading_by_transformers_refuses_weights_of_another_config(whole):
    """Its config is of the file beside; those of two saves would be mixed."""
    folder, _ = whole
    write(folder / "other", scale=3.0, activation="tanh")
    (folder / "adapter" / WEIGHTS).write_bytes((folder / "other" / WEIGHTS).read_bytes())
    bare = build()
    with pytest.warns(UserWarning, match="another save"), refused(ValueError, "activation", "expected", model=bare):
        bare.load_adapter(str(folder / "adapter"))


def test_loading_by_transformers_of_a_lora_beside_is_its_own(whole):
    folder, model = whole
    get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "lora")
    loaded = build()
    loaded.load_adapter(str(folder / "adapter"))
    loaded.load_adapter(str(folder / "lora"), "lora")
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert "_load_pretrained_model" not in vars(loaded)


def test_loading_by_transformers_of_a_hand_written_adapter_is_checked_too(whole):
    folder, _ = whole
    config = folder / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in fields.items() if not name.endswith("sha256")}))
    file = folder / "adapter" / WEIGHTS
    save_file({name: tensor / 0 for name, tensor in load_file(file).items()}, file)
    bare = build()
    with refused(ValueError, str(file), "NaN", "expected", model=bare):
        bare.load_adapter(str(folder / "adapter"))
    assert not fused_steer.peft.is_steered(bare)
