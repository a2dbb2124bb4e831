"""Benchmarks: the fused op and what people use instead, side by side in one run, against what the hardware allows.

    checkout.py     runs bench and tests from a checkout that is not installed
    geometries.py   the sizes of real models, and the grid of op sizes
    contenders.py   who is measured: ours, the rivals, the floor
    counted.py      what a layer's end moves and launches: unsteered, with a hook, fused
    timing.py       how: cold cache, graph replay, interleaving, quantiles; launches and bytes counted
    projection.py   Joint-Orth's projection against a loop of SVDs
    grouped.py      the op with an adapter for each token against a gather of weights
    serving.py      batches served through transformers, each row by its own adapter
    vllm.py         `python -m bench.vllm`: the same through vLLM, steered and unsteered
    levels.py       what: op, model, memory -- from a case to rows of results
    results.py      the results file
    host.py         `python -m bench.host`: a block's call as the host pays for it, against the hooked block
    counters.py     the L2 hit rate and stall reasons of our kernels, by ncu
    goals.py        what is to be reached, computed from results
    gpu.py          `python -m bench.gpu`: everything on one GPU, most important first
    rehearsal.py    `python -m bench.gpu --rehearse`: all of it over the stub driver, so that no name is misspelt
    report/         `python -m bench.report`: results as tables and plots
        read.py         results files, read and checked
        tables.py       Markdown tables
        plots.py        SVG plots
        pages.py        docs/benchmarks.md, README's block, and what of them is out of date
        __main__.py     the command
    stub/           a CUDA driver that does nothing: the kernels' host side without a GPU
    matrix.py       `python -m bench.matrix`: the core tests with sets of library versions
    joint.py        `python -m bench.joint`: what is learnt by LoRA, by steering and by both, on a CPU
    fit.py          `python -m bench.fit`: what fitted adapters express of a LoRA, on a CPU
    paper/          `python -m bench.paper`: the experiments of arXiv 2603.00425, with its rivals
        tasks.py    the six tasks: prompts, answers, readers
        listops.py  ListOps as Long Range Arena generates it
        data.py     examples from the hub, from files, or generated; the splits
        heads.py    LoFiT and JoLA
        reft.py     LoReFT in plain PyTorch
        released.py the projection of the paper's released code
        settings.py what a run depends on; the learning rates
        methods.py  what each method adds and trains
        training.py the Trainer and the test
        runs.py     which runs, their order, their files
        smoke.py    a tiny model and made-up rows
        cost.py     the estimated cost of a run
        report.py   the tables and pictures
        __main__.py the command

`pytest bench` runs the same levels through pytest-benchmark. Nothing imports this package.
"""

from .checkout import make_importable

make_importable()
