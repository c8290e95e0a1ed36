"""A model's name -> the folder that holds it, fetched from the Hugging Face Hub when it is no folder yet.

Token, cache and mirror are huggingface_hub's own: HF_TOKEN or `hf auth login`, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE. It
imports no torch, and huggingface_hub only when there is something to fetch. It knows nothing of what the files hold.
"""

from __future__ import annotations

import re
from pathlib import Path

from pronk.engine.errors import CheckpointNotFoundError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

CONFIG_FILES = ["*.json", "*.jinja", "tokenizer.model"]
META_FILES = ["original/params.json", "original/tokenizer.model", "original/consolidated*.pth"]


def resolve_model(model: str, *, load_format: str = "auto") -> Path:
    """The folder of `model`: an existing folder, or "owner/name" on the Hub, downloaded with a progress bar or cached.

    load_format: which weights to fetch, see `checkpoint.open_checkpoint`; "auto" fetches Meta's files where a
    repository holds no safetensors, "dummy" fetches no weights.
    Raises CheckpointNotFoundError: no such folder, no such repository, no right to read it, no way to reach it.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointNotFoundError(f"{model} is a file: give the folder that holds it and its config")
    if not REPOSITORY.fullmatch(model):
        raise CheckpointNotFoundError(
            f"{model!r} is no folder here: give an existing folder, or owner/name of a model on the Hugging Face Hub"
        )
    return _fetch(model, load_format)


def _fetch(repository: str, load_format: str) -> Path:
    if load_format == "pth":
        return _download(repository, META_FILES) / "original"
    weights = [] if load_format == "dummy" else ["*.safetensors"]
    # Without the second list, "*" would match in folders too, such as Meta's gigabytes in original/.
    folder = _download(repository, CONFIG_FILES + weights, ["*/*"])
    if load_format != "auto" or any(folder.glob("*.safetensors")):
        return folder
    return _download(repository, META_FILES) / "original"


def _download(repository: str, allow: list[str], ignore: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=allow, ignore_patterns=ignore))
    except Exception as error:  # several HTTP libraries and the disk take part, each with errors of its own
        raise CheckpointNotFoundError(_explain(repository, error)) from error


def _explain(repository: str, error: Exception) -> str:
    """What happened, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    # A refusal comes wrapped when the cache was looked into after it.
    origin = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(origin, GatedRepoError) or (
        _status(origin) in (401, 403) and not isinstance(origin, RepositoryNotFoundError)
    ):
        return (
            f"{repository} may not be read: accept its licence at {page}, then set HF_TOKEN or run `hf auth login` "
            "with the account that accepted it"
        )
    if isinstance(origin, RepositoryNotFoundError):
        return (
            f"{repository} is neither a folder here nor a model at {page}, or it is private: check the name, or set "
            "HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, LocalEntryNotFoundError):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        return (
            f"{repository} is not complete in the cache and {reason}: go online, or give a folder that holds the model"
        )
    return f"{repository} could not be downloaded ({type(error).__name__}: {error}): try again, or give a folder"


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error that carries a response."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
