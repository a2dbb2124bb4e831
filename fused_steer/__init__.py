"""fused-steer: post-block activation steering (arXiv 2603.00425), fused into the residual add of each decoder block.

The map, in reading order. A file imports what stands above it, never what stands below.

    _version.py          the version
    _requirements.py     which versions of other libraries were tried
    kernels/             the Triton kernels; its own map is in its docstring
    positions.py         which tokens are steered, by name
    config.py            SteerConfig: what an adapter computes
    adapters/            what an adapter is and how it is kept
        parameters.py    the format: names, paths, shapes of its tensors, which model it fits; its module in a layer
        saving.py        files that are replaced whole, by any number of processes
        weights.py       its weights file: safetensors with the config in the header
        files.py         its two files: written whole or not at all, checked when read
        hub.py           its upload, and its model card
        distributed.py   an adapter that several processes share: who writes, gathering its parts
    model/               how a decoder layer is reached
        decoder.py       finds the decoder layers and the device that each runs on
        heads.py         finds heads that were not loaded, of classifiers and reward models
        residual.py      rewrites a layer's forward so that the last residual add goes to the site
        scopes.py        which thread or task may run or change a model inside `disabled`, `mode` and `batch`
        watch.py         an error for a layer that ran unsteered; the report
        passes.py        packed weights, which live for one forward pass
        site.py          the site: the module in a layer that steers it
        layer.py         a layer with its site: how it is reached, and the way back
        decoder_hooks.py what is done before and after each pass of the decoder
        patched.py       a patched model: its steered layers, its frozen base
        stored.py        an adapter of a patched model as files have it, and back
    lora/                steering beside a LoRA
        layers.py        which modules carry a LoRA
        writers.py       which modules write into the residual stream
        orthogonality.py Joint-Orth: keeps an adapter orthogonal to the LoRA
        constraints.py   the adapters of a model that are kept so
    serving/             many adapters at a time
        slots.py         room for several adapters at one layer
        requests.py      what a batch asks for: an adapter, a strength, positions for each row
        caches.py        how many tokens a key-value cache holds
        rows.py          steers one layer of a batch by rows
        batch.py         steers each row of a batch by its own adapter
        mixed.py         an adapter for each row of a batch of PEFT's
        pool.py          AdapterPool: thousands of adapters in files, some in slots
        holding.py       the adapters of a batch in slots
        gains.py         which tokens of a pass are steered, where an adapter has positions
        plan.py          memory and bandwidth that many adapters take
    importers/           adapters of other codes
        reading.py       opening and checking a foreign file
        steerling.py     the paper's released code
        pyreft.py        pyreft, both ways
        vectors.py       control vectors: GGUF, plain tensors
    peft/                steering as a PEFT method
        config.py        PostBlockConfig
        site.py          the site of PEFT's steering in a layer
        tuner.py         adds, saves, loads, mixes and sums adapters as PEFT asks
    whole.py             save_pretrained of a patched model
    steering.py          Steering, which is model.steering
    patch.py             patch_model: the front door
    joint.py             LoRA and steering: parameter groups, save_joint, load_joint
    tools/               what the verbs of the command run
        listops.py       the task of the demo
        demo.py          fused-steer demo
        coverage.py      fused-steer coverage
        kernel_table.py  fused-steer kernels
        doctor.py        fused-steer doctor
        inspect.py       fused-steer inspect
    trainer.py           SteeringTrainer: adapters in the checkpoints of transformers' Trainer
    diagnostics/         what steering does to a model, in five figures
        records.py       the numbers of a layer
        figures.py       the pictures
        diagnosis.py     the whole, and how it is saved
        measure.py       diagnose
        command.py       fused-steer diagnose
    vllm.py              the vLLM plug-in
    trl.py               TRL's trainers
    cli.py               the command fused-steer
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import SteerConfig
    from .joint import load_joint, lora_parameters, save_joint, steering_parameters
    from .kernels import post_block
    from .patch import patch_model
    from .trainer import SteeringCallback, SteeringTrainer

__all__ = [
    "SteerConfig",
    "SteeringCallback",
    "SteeringTrainer",
    "__version__",
    "load_joint",
    "lora_parameters",
    "patch_model",
    "post_block",
    "save_joint",
    "steering_parameters",
]

_HOMES = {
    "SteerConfig": ".config",
    "SteeringCallback": ".trainer",
    "SteeringTrainer": ".trainer",
    "load_joint": ".joint",
    "lora_parameters": ".joint",
    "patch_model": ".patch",
    "post_block": ".kernels",
    "save_joint": ".joint",
    "steering_parameters": ".joint",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for, so that the command answers `--help` without importing torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value
