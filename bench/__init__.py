"""Benchmarks: the fused op and what people use instead, side by side in one run, against what the hardware allows.

    checkout.py     runs bench and tests from a checkout that is not installed
    geometries.py   the sizes of real models, and the grid of op sizes
    contenders.py   who is measured: ours, the rivals, the floor
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
    report.py       `python -m bench.report`: results as tables and plots
    stub/           a CUDA driver that does nothing: the kernels' host side without a GPU
    matrix.py       `python -m bench.matrix`: the core tests with sets of library versions
    joint.py        `python -m bench.joint`: what is learnt by LoRA, by steering and by both, on a CPU

`pytest bench` runs the same levels through pytest-benchmark. Nothing imports this package.
"""

from .checkout import make_importable

make_importable()
