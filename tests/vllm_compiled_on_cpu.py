"""A plug-in of vLLM, for tests: LoRA and torch.compile together on a CPU, in the mode that a GPU has.

vLLM compiles nothing on a CPU as soon as LoRA is enabled, since its LoRA layers there keep numbers of a batch in the
graph. A steering point does not, and with `lora_target_modules=["post_block"]` it is the only one that LoRA wraps.
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
    # A pass of its compiler names GPU ops that its CPU build has not.
    CpuPlatform.import_kernels()  # those that it has
    source = Path(vllm.__file__).parent / "compilation/passes/utility/fix_functionalization.py"
    for name in sorted(set(re.findall(r"torch\.ops\._C\.(\w+)", source.read_text()))):
        if not hasattr(torch.ops._C, name):
            torch.library.define(f"_C::{name}", "(Tensor x) -> ()")


def install(folder: Path) -> Path:
    """Make a folder that, on PYTHONPATH, has this plug-in."""
    information = folder / "vllm_compiled_on_cpu-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-compiled-on-cpu\nVersion: 1.0\n")
    entry = "compiled_on_cpu = vllm_compiled_on_cpu:register"
    (information / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")
    (folder / "vllm_compiled_on_cpu.py").write_text(Path(__file__).read_text())
    return folder
