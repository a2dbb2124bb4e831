"""A vLLM plug-in for tests: makes vLLM compile with LoRA on a CPU, in the same mode as on a GPU.

On a CPU vLLM compiles nothing once LoRA is enabled, because its LoRA layers there store a batch's numbers in the graph.
A steering layer does not. With `lora_target_modules=["post_block"]` LoRA wraps only steering layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def register() -> None:
    import torch
    import vllm
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    if getattr(CpuPlatform, "compiles_anyway", False):
        return
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.backend = "inductor"
        vllm_config.compilation_config.compile_sizes = []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    CpuPlatform.compiles_anyway = True
    # A pass of vLLM's compiler names GPU ops that its CPU build lacks.
    CpuPlatform.import_kernels()  # registers the CPU ops
    source = Path(vllm.__file__).parent / "compilation/passes/utility/fix_functionalization.py"
    for name in sorted(set(re.findall(r"torch\.ops\._C\.(\w+)", source.read_text()))):
        if not hasattr(torch.ops._C, name):
            torch.library.define(f"_C::{name}", "(Tensor x) -> ()")


def install(folder: Path) -> Path:
    """Write a folder that provides this plug-in when it is on PYTHONPATH."""
    information = folder / "vllm_compiled_on_cpu-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-compiled-on-cpu\nVersion: 1.0\n")
    entry = "compiled_on_cpu = vllm_compiled_on_cpu:register"
    (information / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")
    (folder / "vllm_compiled_on_cpu.py").write_text(Path(__file__).read_text())
    return folder
