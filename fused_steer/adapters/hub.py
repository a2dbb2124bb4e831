"""Upload adapters to the Hugging Face hub, with a model card."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from .._version import __version__
from .files import (
    HUB_ID,
    AdapterFile,
    write_adapter,
)

CARD_NAME = "README.md"
LIBRARY, CARD_TAGS = "fused-steer", ("fused-steer", "post-block-steering", "arxiv:2603.00425")


def model_card(adapter: AdapterFile, repo_id: str) -> str:
    """Return the README.md of an adapter on the hub: searchable metadata, and instructions."""
    from huggingface_hub import ModelCardData

    # The hub refuses a path as the name of a base model.
    name = adapter.layout.base
    base = name if HUB_ID.fullmatch(name) and not os.path.exists(name) else None
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if base else {}
    data = ModelCardData(
        base_model=base,
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        tags=list(CARD_TAGS),
        **relation,
    )
    fields = "\n".join(f"| `{name}` | `{value!r}` |" for name, value in adapter.config.to_dict().items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\n"
        f"{card_usage(repo_id, base)}\n| field | value |\n|---|---|\n{fields}\n"
    )


def card_usage(repo_id: str, base: str | None) -> str:
    """Return the part of a model card that tells what the adapter is and how to load it."""
    return (
        "A post-block steering adapter ([arXiv 2603.00425](https://arxiv.org/abs/2603.00425)) of "
        f"{f'[{base}](https://huggingface.co/{base})' if base else 'a language model'}, made with fused-steer "
        f"{__version__}.\n\n```python\nfrom fused_steer import patch_model\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({base or 'BASE_MODEL'!r})\n"
        f"model = patch_model(model, {repo_id!r})\n```\n\n"
        "PEFT loads it too, once `fused_steer.peft` is imported, which makes the method known:\n\n"
        "```python\nimport fused_steer.peft\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({base or 'BASE_MODEL'!r})\n"
        f"model = PeftModel.from_pretrained(model, {repo_id!r})\n```\n"
    )


def push_adapter(
    repo_id: str,
    adapter: AdapterFile,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Upload an adapter's two files, and a model card if the repository has none. Return the commit's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, adapter)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, CARD_NAME, revision=revision):
            Path(folder, CARD_NAME).write_text(model_card(adapter, repo_id), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return commit.commit_url
