"""Tests of SteeringTrainer: checkpoints with only the adapter, resumption bit for bit, and uploads to the hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from models import build, logits, randomize, refused, steering_parameters
from pages import run_page
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from trainers import CONFIG, DATASET, STEPS, trainer
from transformers import AutoModelForCausalLM, Trainer

from fused_steer import SteeringTrainer, patch_model
from fused_steer.trainer import training_of

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def patched(seed: int = 0, lora: bool = False) -> nn.Module:
    """Build a patched model. The base is the same for every seed; the fresh adapters differ."""
    model = build(attention_dropout=0.1)  # so that the random state matters too
    torch.manual_seed(seed)
    if lora:
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.1))
    return patch_model(model, CONFIG)


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def losses(run: Trainer) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.state.log_history if "loss" in row}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_trainer_a_checkpoint_is_an_adapter_and_not_the_base(tmp_path):
    model = patched()
    run = trainer(model, tmp_path)
    run.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    files = {path.name for path in checkpoint.rglob("*") if path.is_file()}
    assert files >= ADAPTER and not any(name.startswith(("model", "pytorch_model")) for name in files)
    assert torch.equal(logits(patch_model(build(), checkpoint)), logits(model.eval()))
    run.save_model(str(tmp_path / "final"))
    assert torch.equal(logits(patch_model(build(), tmp_path / "final")), logits(model))


@pytest.mark.parametrize("lora", [False, True], ids=["steering", "steering and LoRA"])
def test_trainer_a_run_into_the_folder_of_another_kind_is_refused_before_it_trains(tmp_path, lora):
    """PEFT wrote over the steering of an earlier checkpoint, and steering was refused at its first save."""
    trainer(patched(lora=not lora), tmp_path).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run = trainer(patched(lora=lora), tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-3 holds an adapter of \w+; expected another directory"):
        run.train()
    with pytest.raises(ValueError, match="expected another directory, to leave it alone"):
        run.save_model(str(tmp_path / "checkpoint-3"))
    assert run.state.global_step == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_trainer_saves_to_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(patched(), tmp_path / "run").save_model(".")
    assert ADAPTER <= {path.name for path in tmp_path.iterdir()}


RUNS = pytest.mark.parametrize(
    ("lora", "cls"),
    [(False, SteeringTrainer), (True, SteeringTrainer), (False, Trainer)],
    ids=["steering", "steering and LoRA", "plain Trainer"],
)


@RUNS
def test_trainer_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, lora, cls):
    model = patched(lora=lora)
    fresh = trained_values(model)
    run = trainer(model, tmp_path, cls)
    run.train()
    learnt = trained_values(model)
    assert not any(torch.equal(learnt[name], fresh[name]) for name in learnt)

    resumed = patched(seed=1, lora=lora)
    half = trainer(resumed, tmp_path, cls)
    half.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same(trained_values(resumed), learnt)
    assert losses(half) == losses(run)


def test_trainer_a_plain_trainers_checkpoint_is_an_adapter_too(tmp_path):
    model = patched()
    trainer(model, tmp_path, Trainer).train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    assert {path.name for path in checkpoint.iterdir()} >= ADAPTER | {"model.safetensors"}
    learnt = logits(model.eval())
    assert not torch.equal(learnt, logits(build()))
    assert torch.equal(logits(patch_model(build(), checkpoint)), learnt)
    resumed = patched(seed=1)
    trainer(resumed, tmp_path / "other").train(resume_from_checkpoint=str(checkpoint))  # with a SteeringTrainer
    assert torch.equal(logits(resumed.eval()), learnt)


@RUNS
def test_trainer_the_best_is_loaded_at_the_end(tmp_path, lora, cls):
    class Notes(cls):
        """A trainer that records the parameters saved at each step."""

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            super().save_model(output_dir, _internal_call)
            saved[self.state.global_step] = trained_values(self.model)

    saved: dict[int, dict[str, Tensor]] = {}
    options = {"eval_strategy": "steps", "eval_steps": STEPS // 2, "metric_for_best_model": "eval_x"}
    model = patched(lora=lora)
    run = trainer(model, tmp_path, Notes, load_best_model_at_end=True, **options)
    scores = iter([2.0, 1.0])
    run.compute_metrics = lambda _: {"x": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{STEPS // 2}")
    now = {name: p.detach() for name, p in model.named_parameters()}  # PEFT freezes what it loads
    assert saved.keys() == {STEPS // 2, STEPS}
    assert_same({name: now[name] for name in saved[STEPS]}, saved[STEPS // 2])
    assert not all(torch.equal(now[name], value) for name, value in saved[STEPS].items())


def test_trainer_the_adapter_in_use_is_the_one_saved_and_restored(tmp_path):
    model = patched()
    other = replace(CONFIG, rank=2)
    model.steering.add("second", other)
    model.steering.use("second")
    trainer(model, tmp_path).train()
    again = patched(seed=1)
    again.steering.add("second", other)
    again.steering.use("second")
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same(trained_values(again), trained_values(model))
    with refused(ValueError, "rank", "expected"):
        trainer(patched(), tmp_path).train(resume_from_checkpoint=True)


def test_trainer_what_a_checkpoint_would_lose_is_refused(tmp_path):
    with refused(ValueError, "LlamaForCausalLM is not steered", "expected"):
        trainer(build(), tmp_path).train()
    model = patched()
    model.steering.use(None)
    with refused(ValueError, "no steering adapter", "expected"):
        trainer(model, tmp_path).train()
    model = patched()
    model.lm_head.weight.requires_grad_(True)
    run = trainer(model, tmp_path)
    with refused(ValueError, "lm_head.weight trains", "expected only the steering", model=model):
        run.train()
    with refused(ValueError, "lm_head.weight trains"):
        run.save_model(str(tmp_path / "out"))
    added = build()
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj"]), added)
    with refused(ValueError, "lora_A", "get_peft_model"):
        trainer(patch_model(added, CONFIG), tmp_path).train()
    run = trainer(patched(), tmp_path)
    run.is_fsdp_enabled = True
    with refused(ValueError, "SteeringTrainer runs under FSDP", "expected"):
        run.train()
    assert not list(tmp_path.iterdir())


def test_trainer_checkpoints_of_another_kind_are_not_resumed(tmp_path):
    bare = build()
    bare.requires_grad_(False).lm_head.requires_grad_(True)
    trainer(bare, tmp_path / "whole", Trainer).train()
    model = patched()
    with refused(FileNotFoundError, "has no adapter_config.json", "expected", model=model):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    trainer(patched(), tmp_path / "adapter").train()
    with refused(ValueError, "checkpoint"):
        trainer(patched(), tmp_path, Trainer).train(resume_from_checkpoint=str(tmp_path / "adapter" / "checkpoint-3"))
    best = trainer(model, tmp_path / "adapter")
    best.state.best_model_checkpoint = str(tmp_path / "gone")
    with refused(FileNotFoundError, "gone"):
        best._load_best_model()


# ---------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """Replace the hub's network calls; record the uploads by repository and path."""
    uploads: dict[str, dict[str, bytes]] = {}
    hub = SimpleNamespace(uploads=uploads, created=[], messages=[], tokens=[], revisions=[])

    def create_repo(api: HfApi, repo_id: str, *, private=None, exist_ok=False, token=None, **_: Any) -> Any:
        assert exist_ok
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        hub.created.append((full, private))
        uploads.setdefault(full, {})
        return SimpleNamespace(repo_id=full)

    def upload_folder(
        api: HfApi, *, repo_id: str, folder_path: Any, commit_message=None, revision=None, **_: Any
    ) -> Any:
        hub.revisions.append(revision)
        hub.messages.append(commit_message)
        hub.tokens.append(api.token)
        folder = Path(folder_path)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        uploads[repo_id] |= {name: data for name, data in files.items() if not name.startswith("checkpoint-")}
        url = f"https://huggingface.co/{repo_id}/commit/1"
        return SimpleNamespace(commit_url=url, is_done=lambda: True, done=lambda: True)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "file_exists", lambda api, repo, name, **_: name in uploads[repo])
    return hub


def stored(hub: SimpleNamespace, repo: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make downloads of `repo` return its recorded uploads."""
    for name, data in hub.uploads[repo].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **_: {repo: str(folder)}[repo_id])


def test_trainer_push_to_hub(hub, tmp_path, monkeypatch):
    model = patched()
    model.config._name_or_path = "org/base"
    randomize(model)
    url = model.steering.push_to_hub("polite", private=True, token="t", commit_message="First")
    assert url == "https://huggingface.co/me/polite/commit/1"
    assert (hub.created, hub.messages, hub.tokens) == ([("me/polite", True)], ["First"], ["t"])
    files = hub.uploads["me/polite"]
    assert files.keys() == ADAPTER | {"README.md"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("org/base", "fused-steer")
    assert card.data.base_model_relation == "adapter" and "post-block-steering" in card.data.tags
    assert "patch_model(model, 'me/polite')" in card.text and "| `rank` | `4` |" in card.text
    assert "import fused_steer.peft\nfrom peft import PeftModel" in card.text

    hub.uploads["me/polite"]["README.md"] = b"by hand"
    model.steering.push_to_hub("me/polite")
    assert hub.uploads["me/polite"]["README.md"] == b"by hand"
    stored(hub, "me/polite", tmp_path, monkeypatch)
    again = build()
    again.config._name_or_path = "org/base"
    assert torch.equal(logits(patch_model(again, "me/polite")), logits(model))


def test_trainer_card_tells_how_the_adapter_was_trained(hub, tmp_path):
    """A card of `push_to_hub` has the run's hyper-parameters, data and evaluations, and both ways of loading."""
    model = patched()
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=STEPS // 2, weight_decay=0.25)
    run.train()
    model.steering.push_to_hub("me/polite", training=training_of(run))
    text = ModelCard(hub.uploads["me/polite"]["README.md"].decode()).text
    for told in ("| `learning_rate` | `0.01` |", "| `weight_decay` | `0.25` |", f"| `steps_done` | `{STEPS}` |"):
        assert told in text
    assert f"- training: {len(DATASET)} rows\n" in text and "- evaluation: 4 rows\n" in text
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and all(f"| {loss:.6g} |" in text for loss in losses)
    assert f"{sum(p.numel() for p in model.steering.parameters()):,} steering parameters" in text
    assert "patch_model(model, 'me/polite')" in text and "PeftModel.from_pretrained(model, 'me/polite')" in text
    assert "| `rank` | `4` |" in text


def test_trainer_card_names_a_data_set_of_the_hub(tmp_path):
    data = SimpleNamespace(builder_name="org/name", split="train", column_names=["input_ids", "labels"])
    run = trainer(patched(), tmp_path)
    run.train_dataset = data
    assert training_of(run).data["training"] == ("a stream of rows of org/name, split train, columns input_ids, labels")


def test_trainer_push_to_a_branch(hub, monkeypatch):
    branches = []
    monkeypatch.setattr(HfApi, "create_branch", lambda api, repo, *, branch, exist_ok: branches.append((repo, branch)))
    patched().steering.push_to_hub("me/x", revision="next")
    assert branches == [("me/x", "next")] and hub.revisions == ["next"]


def test_trainer_a_path_is_no_base_model_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("local/model").mkdir(parents=True)
    model = patched()
    for name in ("local/model", "/data/models/base", ""):
        model.config._name_or_path = name
        model.steering.push_to_hub("me/x")
        assert ModelCard(hub.uploads["me/x"].pop("README.md").decode()).data.base_model is None
    with refused(KeyError, "no adapter 'none'", model=model):
        model.steering.push_to_hub("me/x", "none")
    with refused(TypeError, "push_to_hub has no option 'privat'; expected private, token"):
        model.steering.push_to_hub("me/x", privat=True)
    with refused(TypeError, "training is a dict; expected a record of fused_steer.trainer.training_of"):
        model.steering.push_to_hub("me/x", training={})


@pytest.mark.parametrize("lora", [False, True], ids=["steering", "steering and LoRA"])
def test_trainer_pushes_adapters(hub, tmp_path, monkeypatch, lora):
    model = patched(lora=lora)
    run = trainer(model, tmp_path / "out", push_to_hub=True, hub_model_id="me/run", hub_always_push=True)
    run.train()
    beside = {f"fused_steer/default/{name}" for name in ADAPTER}
    assert hub.uploads["me/run"].keys() >= (ADAPTER | beside if lora else ADAPTER)  # uploaded by the checkpoints
    hub.uploads["me/run"].clear()
    run.push_to_hub()
    files = hub.uploads["me/run"]
    assert files.keys() >= (ADAPTER | beside if lora else ADAPTER) | {"README.md"}
    assert not any(name.startswith("model") for name in files)
    steering = "fused_steer/default/" if lora else ""
    assert json.loads(files[f"{steering}adapter_config.json"])["peft_type"] == "POST_BLOCK"
    stored(hub, "me/run", tmp_path / "stored", monkeypatch)
    again = patch_model(build(), tmp_path / "stored" / steering)
    assert_same({n: p.detach() for n, p in steering_parameters(again).items()}, values_of(model))
    if not lora:
        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == "fused-steer" and "fused-steer" in card.data.tags
        assert "Training hyperparameters" in card.text and "patch_model(model, 'me/run')" in card.text
        assert "## Hyper-parameters" not in card.text and "| `rank` | `4` |" in card.text
        assert f"- training: {len(DATASET)} rows" in card.text


def values_of(model: nn.Module) -> dict[str, Tensor]:
    named = steering_parameters(model).items()
    return {name.removeprefix("base_model.model."): p.detach() for name, p in named}


# ---------------------------------------------------------------------------------------------------------------------
# docs/trainer.md


def test_trainer_the_page_runs(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = {"model": build(), "dataset": DATASET, "held_out": DATASET[:4], "Trainer": Trainer}

    class AutoModel:
        @staticmethod
        def from_pretrained(source: str) -> nn.Module:
            return build() if source == "base" else AutoModelForCausalLM.from_pretrained(source)

    names["AutoModelForCausalLM"] = AutoModel
    run_page("trainer.md", names)
    for source in ("polite", "whole/checkpoint-2"):
        assert not torch.equal(logits(patch_model(build(), source)), logits(build()))
    assert torch.equal(logits(names["model"]), logits(patch_model(build(), "whole/checkpoint-2")))
    assert Path("out/checkpoint-4/adapter_config.json").is_file() and hub.created == [("me/polite", True)]
