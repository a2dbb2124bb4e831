"""Tests of the files for PEFT: added to a copy of the installed PEFT, they train, save and load as its methods do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest

ROOT = Path(__file__).parents[1]
APPLY = ROOT / "integrations" / "peft" / "apply.py"
CODE = """
import sys
import torch
from models import build, tokens
from peft import PeftModel, PostBlockConfig, get_peft_model
from fused_steer.kernels import post_block

torch.manual_seed(0)
ids = tokens()
base = build()
before = base(ids).logits.detach()
model = get_peft_model(base, PostBlockConfig(r=4, scale=0.5, task_type="CAUSAL_LM"))
assert torch.equal(model(ids).logits, before)  # a fresh adapter changes nothing
trained = [name for name, p in model.named_parameters() if p.requires_grad]
assert len(trained) == 2 * 3 and all(".steer_" in name for name in trained), trained
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(8):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]
model.eval()
after = model(ids).logits.detach()
with model.disable_adapter():
    assert torch.equal(model(ids).logits, before)
model.save_pretrained(sys.argv[1])
again = PeftModel.from_pretrained(build(), sys.argv[1])
assert torch.equal(again(ids).logits, after) and not torch.equal(after, before)
layer = model.base_model.model.model.layers[1]
x = torch.randn(2, 3, 32)
down, up = layer.steer_down["default"].weight, layer.steer_up["default"].weight
torch.testing.assert_close(layer._steer(x), post_block(x, torch.zeros_like(x), down, up, activation="silu", scale=0.5))
try:
    model.merge_and_unload()
except NotImplementedError as error:
    assert "cannot be merged" in str(error)
else:
    raise AssertionError("merged")
print("worked")
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Lay the installed PEFT out as its repository does."""
    package = Path(peft.__file__).parent
    shutil.copytree(package, tmp_path / "src" / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def apply(checkout):
    return subprocess.run([sys.executable, APPLY, checkout], capture_output=True, text=True)


def test_upstream_peft_method_trains_saves_and_loads(checkout, tmp_path):
    result = apply(checkout)
    assert result.returncode == 0, result.stderr
    path = os.pathsep.join([str(checkout / "src"), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": path, "FUSED_STEER_BACKEND": "torch"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "saved")]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout.endswith("worked\n"), result.stdout + result.stderr


def test_upstream_peft_another_form_is_refused_before_anything_changes(checkout):
    types = checkout / "src" / "peft" / "utils" / "peft_types.py"
    tuners = (checkout / "src" / "peft" / "tuners" / "__init__.py").read_text()
    types.write_text(types.read_text().replace('    ROAD = "ROAD"\n', ""))
    result = apply(checkout)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "expected once" in result.stderr
    assert (checkout / "src" / "peft" / "tuners" / "__init__.py").read_text() == tuners
    assert not (checkout / "src" / "peft" / "tuners" / "post_block").exists()
