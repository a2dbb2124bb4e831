"""fused-steer: post-block activation steering (arXiv 2603.00425), fused into the residual add of each decoder block.

The map, in reading order. A file imports only files that stand above it.

    _version.py          the version
    _tried.py            the series of libraries that passed the core tests, written by `python -m bench.matrix`
    _requirements.py     the tested versions of other libraries
    kernels/             the Triton kernels; its docstring has its own map
    _hub_access.py       asks whether the hub can be reached, before libraries wait for it
    positions.py         names of token positions, and the tokens that they mean
    config.py            SteerConfig: the configuration of an adapter
    adapters/            adapters and how they are stored
        saving.py        replaces files whole, with any number of saving processes
        fields.py        reads JSON objects with each name once
        kinds.py         what an adapter's directory holds: steering, a LoRA, or both
        parameters.py    the format: names, paths and shapes of the tensors
        factors.py       an adapter's modules in a layer
        locating.py      finds an adapter's files in a directory or on the hub
        weights.py       the weights file: safetensors with the config in the header
        files.py         reads and writes an adapter's two files, with checks
        combining.py     adds up adapters of one activation
        card.py          model cards
        hub.py           uploads an adapter with a model card
        distributed.py   models that several processes share: who writes, gathering shards
    model/               reaching and patching decoder layers
        weak.py          references that do not keep the model alive
        residual.py      finds a layer's last residual add, and rewrites forwards
        decoder.py       finds the decoder layers and their devices
        heads.py         finds heads that were not loaded from a checkpoint
        sublayers.py     finds a layer's attention and MLP
        scopes.py        guards the steering against other threads and tasks
        watch.py         raises for a layer that ran unsteered; the report
        passes.py        LoReFT's rotations for one forward pass
        site.py          the site: the module in a layer that steers it
        trial.py         runs a model once, to see what its layers do
        layer.py         patches and unpatches one layer
        following.py     finds the RMSNorm that reads a layer's output, and tells its kind
        norms.py         fuses the norms that follow steered layers into the steering
        frozen.py        the frozen base: which parameters trained before
        decoder_hooks.py hooks before and after each pass of the decoder
        patched.py       a patched model: its steered layers and its frozen base
        stored.py        converts an adapter of a patched model to file contents and back
    lora/                steering beside a LoRA
        layers.py        finds the modules with a LoRA
        writers.py       finds the modules that write into the residual stream
        orthogonality.py Joint-Orth: keeps an adapter orthogonal to the LoRA
        constraints.py   the constrained adapters of a model
    serving/             many adapters at a time
        slots.py         slots: the adapters of one place in stacked tensors
        requests.py      checks the arguments of a batch
        options.py       the scale and the positions of one served request
        caches.py        finds key-value caches and their lengths
        rows.py          steers one place while each row has its own adapter
        replaced.py      replaces methods of a model, such as generate
        continuous.py    the tokens of each request in transformers' continuous batching
        batch.py         steers each row of a batch by its own adapter
        mixed.py         PEFT's batches with an adapter for each row
        pool.py          AdapterPool: thousands of adapters in files, a few in slots
        holding.py       puts the adapters of a batch into slots
        gains.py         finds the steered tokens of a pass, for an adapter with positions
        plan.py          computes the memory and bandwidth of many adapters
    importers/           adapters of other libraries, in and out
        reading.py       opens and checks a foreign file
        steerling.py     the paper's released code
        pyreft.py        imports pyreft's interventions
        pyreft_export.py exports to pyreft
        gguf.py          reads and writes GGUF files
        vectors.py       control vectors, both ways: GGUF and plain tensors
    peft/                steering as a PEFT method
        config.py        PostBlockConfig
        loading.py       reads the files that PEFT and transformers load
        site.py          the site with PEFT's adapters
        saving.py        checks adapters before PEFT writes them
        tuner.py         adds, saves, loads, mixes and sums adapters for PEFT
    whole.py             save_pretrained of a patched model
    merging/             merges an adapter into the model's own weights
        affine.py        the shift as an affine function, and linear layers that contain it
        layers.py        finds the linear layers that take the shift
        checking.py      checks a merged layer in float64
        merged.py        the merged weights: rounded, and written all or none
        biases.py        biases that only an option of the config gives
    steering.py          Steering, available as model.steering
    patch.py             patch_model, the entry point
    joint.py             LoRA and steering: parameter groups, save_joint, load_joint
    tools/               the command's verbs
        listops.py       the demo's task
        loading.py       loads models and tokenizers for commands
        sources.py       adapters that a command is given: names, and steering, LoRA or both
        variants.py      loads several adapters into one model and switches between them
        prompts.py       read prompts from files, batches of their tokens, and their room in a model
        demo.py          fused-steer demo
        coverage_table.py the table of fused-steer coverage
        coverage.py      fused-steer coverage
        kernel_table.py  fused-steer kernels
        doctor.py        fused-steer doctor
        quick_bench.py   fused-steer bench
        inspect.py       fused-steer inspect
        throwaway.py     random adapters for a trial, and Hugging Face's verdict on steered answers
        engines.py       vLLM engines in processes of their own
        verify_vllm.py   fused-steer verify-vllm
        compare.py       fused-steer compare
        merge.py         fused-steer merge
        chat.py          a chat with a steered model
        chat_terminal.py fused-steer chat
    trainer.py           SteeringTrainer: adapters in the checkpoints of transformers' Trainer
    diagnostics/         measures steering's effect on a model, in five figures
        records.py       the measured quantities of a layer
        figures.py       draws the figures
        diagnosis.py     the result, as JSON and pictures
        flow.py          finds the MLP's output in a layer
        measure.py       diagnose
        command.py       fused-steer diagnose
    playground/          compares adapters in the browser
        exporting.py     a variant of a model: as an adapter, and as a request to vLLM
        answers.py       answers of several variants in one batch, token by token
        page.py          the page, built with Gradio
        command.py       fused-steer playground
    theory/              weight updates as shifts of activations, and the best adapter for a tuned model
        regression.py    reduced-rank regression: the best linear map of a rank
        nonlinear.py     the best adapter with a nonlinear φ, by descent
        statements.py    the paper's theorem and propositions as functions
        lockstep.py      run models one layer at a time
        fitting.py       `fit`
        next_token.py    `divergence`: compares two models' next-token distributions
        command.py       `fused-steer fit`
    vectors/             steering vectors from contrasting texts
        pairs.py         reads pairs, or two sets of texts
        hidden.py        hidden states of texts after each layer
        directions.py    mean difference, PCA, and separation
        extraction.py    `extract`
        sweeping.py      `sweep`: perplexity and preference at several strengths
        figures.py       draws an extraction
        command.py       `fused-steer extract`
    vllm/                the vLLM plug-in
        options.py       the options of a server
        dose.py          bounds the relative dose of requests, and measures it in each token
        room.py          the room of a server's slots for adapters
        sources.py       finds, checks and copies the adapters of requests
        batch.py         the slot and the gain of each token of a batch
        layers.py        the steering point of a decoder layer, which steers its output
        norms.py         fuses it with the norm that reads the output
        reached.py       finds a model's decoder layers and gives them their points
        adapters.py      loads adapters into the slots of a worker
        cache.py         keys of cached blocks and of compiled graphs
        beams.py         steers the beams of a search as the search says
        frontend.py      checks requests before the engine gets them
        gains.py         follows the batches of vLLM's model runners
        endpoint.py      routes of the server: list, load, unload, the default adapter
    trl.py               TRL's trainers
    axolotl.py           the plug-in for axolotl
    paper/               the paper's six tasks
        tasks.py         prompts, answers, and readers of answers
        listops.py       ListOps as Long Range Arena generates it
        data.py          examples from the hub, from files, or generated; the splits
        answering.py     answers prompts by greedy generation
    evaluation/          evaluation by lm-evaluation-harness and on the paper's tasks
        harness.py       its model `fused-steer`
        on_paper.py      outcomes on the paper's tasks
        comparing.py     scores of several adapters, with intervals
        command.py       `fused-steer eval`
        __main__.py      python -m fused_steer.evaluation, the harness's own command
    recipes/             training by a recipe
        recipe.py        the recipe, read from YAML and checked
        rows.py          the rows, brought into TRL's form
        figures.py       draws losses and shifts
        running.py       `train`
        command.py       `fused-steer train`
    cli/                 the command fused-steer
        shared.py        the app, its one-line errors, shared options
        making.py        demo, fit, extract, train
        playground.py    playground
        serving.py       serve-plan, eval, chat
        examining.py     doctor, inspect, compare, kernels, coverage, diagnose, bench
        converting.py    import, export, merge
    __main__.py          python -m fused_steer
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
