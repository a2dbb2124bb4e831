"""One of the processes that `torchrun` starts for test_distributed.py: trains a model and writes the results.

Usage: process_worker.py DIRECTORY SCENARIO... Each process writes `<run>-<rank>.json` and `<run>-<rank>.safetensors` to
a scenario's folder, and saves adapters there. The code that wraps a model comes from docs/many-processes.md.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from models import build, randomize, tokens
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from fused_steer import SteerConfig, SteeringCallback, patch_model, save_joint
from fused_steer.peft import PostBlockConfig

PAGE = Path(__file__).parents[1] / "docs" / "many-processes.md"
CONFIG = SteerConfig(rank=4, down_bias=True, up_bias=True)
JOINT = SteerConfig(rank=4, up_bias=True, orthogonal_to="lora")
WIDE = SteerConfig(rank=200)  # more parameters than the layer, so that FSDP1 cuts its flat parameter inside one of them
STEPS, BATCH = 3, 4

Wrap = Callable[[nn.Module], nn.Module]


def page_code(marker: str) -> str:
    """Return the code block under a marker of the page."""
    after = PAGE.read_text(encoding="utf-8").partition(f"<!-- {marker} -->\n\n```python\n")[2]
    assert after, f"{PAGE.name} has no block under {marker}"
    return after.partition("```")[0]


def run_page(marker: str, **names: Any) -> dict[str, Any]:
    names |= {"torch": torch, "patch_model": patch_model, "device": torch.device("cpu")}
    exec(compile(page_code(marker), PAGE.name, "exec"), names)
    return names


# ------------------------------------------------------------------------------------------------------------- models


def steered(base: nn.Module, checkpointing: bool = False, config: SteerConfig = CONFIG) -> nn.Module:
    """Patch the model; the adapter's values are the same in every process."""
    randomize(patch_model(base, config))
    return checkpointed(base) if checkpointing else base


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model


def with_lora(checkpointing: bool = False) -> nn.Module:
    """Build a model with LoRA, B not zero, and steering that is kept orthogonal to it."""
    model = build()
    if checkpointing:
        checkpointed(model)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    patch_model(model, JOINT)
    randomize(model.get_base_model())
    return model


def whole(name: str, parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, f"{name} has no gradient"
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone().contiguous()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    named = ((n.replace("_fsdp_wrapped_module.", ""), p) for n, p in model.named_parameters() if p.requires_grad)
    return {name.replace(".another.", ".default."): parameter for name, parameter in named}


def gradients(model: nn.Module, wrapped: nn.Module) -> dict[str, Tensor]:
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            return {name: whole(name, p) for name, p in trained_parameters(model).items()}
    return {name: whole(name, p) for name, p in trained_parameters(model).items()}


# ----------------------------------------------------------------------------------------------------------- training


def batch(step: int, rank: int = 0, processes: int = 1) -> Tensor:
    """Return a process's share of a step's batch; with `processes` = 1, the whole batch."""
    return tokens(step, BATCH).chunk(processes)[rank]


def train(
    model: nn.Module,
    wrapped: nn.Module,
    rank: int = 0,
    processes: int = 1,
    after_step: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train a few steps of AdamW; return losses (of this process's share), calls per step, and the first gradients."""
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-2)
    wrapped.train()
    result: dict[str, Any] = {"losses": [], "after_step": []}
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        model.steering.reset_calls()
        ids = batch(step, rank, processes)
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        result["losses"].append(loss.item())
        result["calls"] = [row.calls for row in model.steering.report()]
        first = first or gradients(model, wrapped)
        optimizer.step()
        optimizer.zero_grad()
        result["after_step"].append(after_step())
    return result, first


def evaluate(wrapped: nn.Module) -> float:
    ids = tokens(99)
    with torch.no_grad():
        return wrapped.eval()(input_ids=ids, labels=ids).loss.item()


def attempt(action: Callable[[], Any]) -> str:
    """Run the action; return "" or the one line of its refusal."""
    try:
        action()
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def overlap(model: nn.Module) -> float:
    """Compute the largest ‖BᵀW2‖ / (‖B‖ ‖W2‖) of any layer."""
    found = []
    for layer in model.get_base_model().model.layers:
        b, w = layer.mlp.down_proj.lora_B["default"].weight, layer.post_block.steer_up["default"].weight
        found.append(((b.T @ w).norm() / (b.norm() * w.norm())).item())
    return max(found)


# ---------------------------------------------------------------------------------------------------------- scenarios


def write(directory: Path, run: str, result: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = f"{run}-{dist.get_rank()}"
    (directory / f"{name}.json").write_text(json.dumps(result))
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, directory / f"{name}.safetensors")


def parallel(directory: Path, wrap: Wrap, *, share: bool = True, bare: Callable[[], nn.Module] = build) -> None:
    """Train, save, load and restore with the model wrapped.

    share: each process works on its share of a batch; otherwise each works on the whole batch.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    for run in ("plain", "checkpointing", "another"):
        model = steered(bare(), checkpointing=run == "checkpointing")
        if run == "another":  # of the same values, used after wrapping
            model.steering.add("another", CONFIG)
            randomize(model, "another")
        wrapped = wrap(model)
        if run == "another":
            model.steering.use("another")
            if isinstance(wrapped, DistributedDataParallel):
                wrapped = wrap(model)
        model.steering.save(directory / f"{run}-start")  # before the first forward pass
        result, first = train(model, wrapped, rank, processes)
        model.steering.save(directory / run)
        dist.barrier()
        result["evaluated"] = evaluate(wrapped)
        model.steering.save(directory / f"{run}-evaluated")
        # The Trainer calls this in each process.
        arguments, state = SimpleNamespace(output_dir=directory / f"{run}-trainer"), TrainerState(global_step=STEPS)
        state.is_world_process_zero = dist.get_rank() == 0
        SteeringCallback().on_save(arguments, state, TrainerControl(), model=model)
        write(directory, run, result, first)

    model = patch_model(bare(), directory / "plain")
    result = {"loaded": evaluate(wrap(model))}
    model = steered(bare())
    wrapped = wrap(model)
    result["restore"] = attempt(lambda: model.steering.restore(directory / "plain"))
    result["restored"] = evaluate(wrapped)
    result["load"] = attempt(lambda: model.steering.load(directory / "plain", name="more"))
    result["save"] = attempt(lambda: model.steering.save(directory / "plain" / "adapter_config.json"))
    result["batch"] = attempt(lambda: batch_by_rows(model, wrapped))
    result["unpatch"] = attempt(model.steering.unpatch)
    write(directory, "files", result, {})


def batch_by_rows(model: nn.Module, wrapped: nn.Module) -> None:
    with torch.no_grad(), model.steering.batch(["default", None]):
        wrapped.eval()(tokens())


def ddp(directory: Path) -> None:
    parallel(directory, lambda model: run_page("ddp", model=model)["wrapped"])

    model = steered(build())
    wrapped = run_page("ddp", model=model)["wrapped"].train()
    model.steering.add("another", CONFIG)
    model.steering.use("another")
    write(directory, "not-averaged", {"train": attempt(lambda: wrapped(input_ids=batch(0), labels=batch(0)))}, {})


def fsdp2(directory: Path) -> None:
    parallel(directory, lambda model: run_page("fsdp2", model=model)["wrapped"])


def fsdp1(directory: Path) -> None:
    parallel(directory, lambda model: run_page("fsdp1", model=model)["wrapped"])

    # accelerate wraps by the name of a layer's class. The other run wraps only the root.
    model = steered(build())
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    plugin.set_auto_wrap_policy(model)
    for run, options in (("by-name", {"auto_wrap_policy": plugin.auto_wrap_policy}), ("root", {})):
        model = steered(build())
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), **options)
        result, first = train(model, wrapped, dist.get_rank(), dist.get_world_size())
        model.steering.save(directory / run)
        result["wrapped"] = [isinstance(layer, FullyShardedDataParallel) for layer in model.model.layers]
        write(directory, run, result, first)

    model = steered(build(), config=WIDE)
    wrapped = run_page("fsdp1", model=model)["wrapped"]
    model.steering.save(directory / "wide")
    with FullyShardedDataParallel.summon_full_params(wrapped):
        model.steering.save(directory / "summoned")
    parts = [p.numel() for p in model.model.layers[0].post_block.parameters()]
    write(directory, "wide", {"parts": parts}, {})


def tensor(directory: Path) -> None:
    def bare() -> nn.Module:
        return run_page("tensor", base=directory / "base")["model"]

    if dist.get_rank() == 0:
        build().save_pretrained(directory / "base")
    dist.barrier()
    parallel(directory, lambda model: model, share=False, bare=bare)
    sharded = bare().model.layers[0].mlp.down_proj.weight
    assert isinstance(sharded, DTensor) and sharded.to_local().shape[1] * 2 == sharded.shape[1]


def zero(directory: Path) -> None:
    import deepspeed

    def wrap(model: nn.Module, stage: int) -> Any:
        # Partition small parameters too; ZeRO's default threshold would leave these whole.
        code = page_code("zero").replace('"stage": 3', f'"stage": {stage}, "stage3_param_persistence_threshold": 0')
        names = {"torch": torch, "model": model}
        exec(compile(code, PAGE.name, "exec"), names)
        return names["engine"]

    rank, processes = dist.get_rank(), dist.get_world_size()
    for stage in (1, 2, 3):
        for run in ("plain", "checkpointing"):
            model = steered(build(), checkpointing=run == "checkpointing")
            engine = wrap(model, stage)
            result: dict[str, Any] = {"losses": []}
            for step in range(STEPS):
                ids = batch(step, rank, processes)
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                result["losses"].append(loss.item())
            if stage == 3:
                result["save"] = attempt(lambda model=model: model.steering.save(directory / "refused"))
            saved = directory / f"{run}-{stage}"
            run_page("zero-save", deepspeed=deepspeed, model=model, directory=saved)
            dist.barrier()
            result["restore"] = attempt(lambda model=model, saved=saved: model.steering.restore(saved))
            result["load"] = attempt(lambda model=model, saved=saved: model.steering.load(saved, name="more"))
            write(directory, f"{run}-{stage}", result, {})
        model = with_lora()
        engine = wrap(model, stage)
        result = {
            "train": attempt(lambda engine=engine: engine(input_ids=batch(0), labels=batch(0))),
            "save": attempt(lambda model=model: model.steering.save(directory / "refused")),
            "save_joint": attempt(lambda model=model: save_joint(model, directory / "refused")),
        }
        write(directory, f"joint-{stage}", result, {})


def pipeline(directory: Path) -> None:
    """Each process keeps and changes its own layers, as a stage of a pipeline does."""
    model = steered(build())
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList(layers[:1] if dist.get_rank() == 0 else layers[1:])
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(2)
    model.steering.save(directory / "saved")
    write(directory, "saved", {}, {})


def joint(directory: Path) -> None:
    for run in ("plain", "checkpointing"):
        model = with_lora(checkpointing=run == "checkpointing")
        wrapped = DistributedDataParallel(model)
        result, first = train(
            model, wrapped, dist.get_rank(), dist.get_world_size(), after_step=lambda model=model: overlap(model)
        )
        write(directory, run, result, first)
        write(directory, f"{run}-weights", {}, trained_parameters(model))
        save_joint(model, directory / run)

    model = with_lora()
    model.add_adapter("another", LoraConfig(r=3, target_modules=["down_proj"]))
    wrapped = DistributedDataParallel(model).train()

    def attempt_training() -> str:
        return attempt(lambda: wrapped(input_ids=batch(0), labels=batch(0)))

    result = {"before": attempt_training()}
    model.set_adapter("another")
    result["after"] = attempt_training()
    with model.steering.mode("lora"):
        result["lora"] = attempt_training()
    with model.steering.mode("steering"):  # the LoRA does not train
        result["steering"] = attempt_training()
    model = get_peft_model(build(), PostBlockConfig(r=2))
    model.add_adapter("another", PostBlockConfig(r=2))
    wrapped = DistributedDataParallel(model).train()
    result["peft before"] = attempt_training()
    model.set_adapter("another")
    result["peft"] = attempt_training()
    write(directory, "not-averaged", result, {})

    model = with_lora()
    arguments = TrainingArguments(
        str(directory / "trainer"), max_steps=2, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    dataset = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=16)]
    Trainer(model, arguments, train_dataset=dataset, callbacks=[SteeringCallback()]).train()
    write(directory, "trainer", {}, trained_parameters(model))

    model = with_lora()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    result = {
        "train": attempt(lambda: model.train()(input_ids=batch(0), labels=batch(0))),
        "save": attempt(lambda: model.steering.save(directory / "sharded")),
        "save_joint": attempt(lambda: save_joint(model, directory / "sharded")),
    }
    write(directory, "sharded", result, {})


if __name__ == "__main__":
    scenarios = {"ddp": ddp, "fsdp2": fsdp2, "fsdp1": fsdp1, "tensor": tensor, "joint": joint, "zero": zero}
    scenarios["pipeline"] = pipeline
    dist.init_process_group("gloo")
    for scenario in sys.argv[2:]:
        folder = Path(sys.argv[1], scenario)
        folder.mkdir(parents=True, exist_ok=True)
        scenarios[scenario](folder)
    # All results are written. A normal exit sometimes aborts, because a thread is still running.
    dist.barrier()
    os._exit(0)
