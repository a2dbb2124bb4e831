"""Benchmarks: the fused op and its rivals, measured side by side in one run.

    checkout.py     run benchmarks and tests from a checkout that is not installed
    geometries.py   the sizes of real models, and the sizes at which the op is measured
    contenders.py   the contenders: the fused op, its rivals, and the plain add as the floor
    counted.py      memory passes and launches at the end of a layer: unsteered, with a hook, fused
    timing.py       timing: cold cache, graph replay, interleaving, quantiles; counts of launches and bytes
    projection.py   the orthogonal projection of joint training, against a loop of SVDs
    grouped.py      the op with an adapter for each token, against a gather of weights
    serving.py      batches served by transformers with one adapter per row
    adapters.py     `python -m bench.adapters`: a batch of transformers with 1 to 256 adapters, as ratios to one
    vllm.py         `python -m bench.vllm`: batches served by vLLM, steered and unsteered
    vllm_host.py    `python -m bench.vllm_host`: host time of a vLLM step, idle and with many strengths
    levels.py       measurements of the op, of a model and of memory: from a case to rows of results
    norm.py         the op with the norm behind it, against the hook and a norm
    results.py      the results file
    host.py         `python -m bench.host`: host time of a steered block's call, against a hooked block's
    counters.py     L2 hit rate and stall reasons of the fused kernels, counted by ncu
    goals.py        the performance goals, judged from results
    gpu.py          `python -m bench.gpu`: every measurement on one GPU, most important first
    sweep/          `python -m bench.sweep`: every candidate layout of the op, timed on a GPU
        forward.py  the candidates of the forward
        backward.py the candidates of the backward
        __main__.py the command
    cores.py        a candidate that the sweep times: whole rows on tensor cores
    rehearsal.py    `python -m bench.gpu --rehearse`: the same run over the stub driver, to find mistakes without a GPU
    report/         `python -m bench.report`: results as tables and plots
        read.py         read and check results files
        tables.py       Markdown tables
        plots.py        SVG plots
        pages.py        docs/benchmarks.md and README's blocks, and the check that they are up to date
        __main__.py     the command
    stub/           a CUDA driver that does nothing: runs the kernels' host code without a GPU
    matrix.py       `python -m bench.matrix`: the core tests with sets of library versions
    joint.py        `python -m bench.joint`: LoRA, steering and both, trained on ListOps on a CPU
    fit.py          `python -m bench.fit`: adapters fitted to a LoRA in closed form, tested on ListOps on a CPU
    paper/          `python -m bench.paper`: the experiments of arXiv 2603.00425, with its rivals
        heads.py    LoFiT and JoLA
        released.py the projection of the paper's released code
        settings.py the settings of a run; the learning rates
        methods.py  the parameters that each method adds and trains
        training.py training with the Trainer, and the test
        runs.py     the list of runs, their order, their files
        smoke.py    a tiny model and made-up rows
        cost.py     the estimated cost of a run
        report.py   the tables and pictures
        __main__.py the command
    study.py        `python -m bench.study`: sites, activations and rivals of steering on ListOps on a CPU

`pytest bench` runs the measurements of `levels.py` through pytest-benchmark. Nothing imports this package.
"""

from .checkout import make_importable

make_importable()
