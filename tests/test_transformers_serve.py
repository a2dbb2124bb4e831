"""Tests of steering behind `transformers serve`, over HTTP on loopback. They run in vLLM's environment."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from vllm_models import NEW_TOKENS, save_adapter, save_model

from fused_steer import SteerConfig, patch_model

pytestmark = pytest.mark.vllm

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"


def commands() -> tuple[str, str]:
    """Return the page's two commands: one makes a directory of base and adapter, one serves it."""
    section = PAGE.read_text(encoding="utf-8").partition("## transformers serve")[2].partition("\n## ")[0]
    join, serve = re.findall(r"```bash\n(.*?)\n```", section, re.DOTALL)
    return join, serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with BASE and ADAPTER, and served/ by the page's command."""
    root = tmp_path_factory.mktemp("served")
    save_model(root / "BASE")
    save_adapter(root / "BASE", root / "ADAPTER", SteerConfig(rank=4), 3)
    subprocess.run(["bash", "-euc", commands()[0]], cwd=root, check=True)
    return root


def completion(root: Path, adapter: Path | None) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "BASE")
    model = AutoModelForCausalLM.from_pretrained(root / "BASE")
    if adapter is not None:
        patch_model(model, adapter)
    ids = tokenizer("a cat sat", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True)


def test_transformers_serve_an_adapter_with_its_base_is_served_as_a_model(folder, tmp_path):
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(commands()[1])
    assert words[0] == "python"
    command = [sys.executable, *words[1:-1], "--host", "127.0.0.1", "--port", str(port)]  # requests name their models
    log = tmp_path / "server.log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, cwd=folder, env=os.environ, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(480):
            assert server.poll() is None, log.read_text()[-5000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.25)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        found = {
            name: client.completions.create(
                model=str(folder / name), prompt="a cat sat", max_tokens=NEW_TOKENS, temperature=0
            )
            .choices[0]
            .text
            for name in ("served", "BASE")
        }
    finally:
        server.terminate()
        server.wait(60)
    assert found["served"].strip() == completion(folder, folder / "ADAPTER").strip()
    assert found["BASE"].strip() == completion(folder, None).strip()
    assert found["served"] != found["BASE"]
