"""Upload adapters to the Hugging Face hub, with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from .card import CARD_NAME, LIBRARY, Training, model_card
from .files import AdapterFile, write_adapter


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options of `push_adapter` before a repository is created.

    Raises:
        TypeError: an option is unknown, or training is no record of `training_of`.
    """
    known = ("private", "token", "revision", "commit_message", "training")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"push_to_hub has no option {', '.join(map(repr, unknown))}; expected {', '.join(known)}")
    training = options.get("training")
    if training is not None and not isinstance(training, Training):
        raise TypeError(
            f"training is a {type(training).__name__}; expected a record of fused_steer.trainer.training_of(trainer)"
        )


def push_adapter(
    repo_id: str,
    adapter: AdapterFile,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    training: Training | None = None,
) -> str:
    """Upload an adapter's two files, and a model card if the repository has none. Return the commit's URL.

    Args:
        training: how the adapter was trained, for the card.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, adapter)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, CARD_NAME, revision=revision):
            Path(folder, CARD_NAME).write_text(model_card(adapter, repo_id, training), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return commit.commit_url
