"""From a model's name to its folder: what is asked of the Hub, and what each of its refusals says to do."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from pronk.engine.errors import CheckpointNotFoundError
from pronk.engine.weights.hub import resolve_model

NAME = "meta-llama/Llama-3.2-1B-Instruct"
PUBLISHED = [
    ".gitattributes",
    "LICENSE.txt",
    "README.md",
    "USE_POLICY.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "onnx/model.safetensors",
]


class Response:
    """What huggingface_hub's errors read of an HTTP library's response."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code
        self.headers: dict[str, str] = {}
        self.request = None


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Path]:
    """`repository(files)`: a Hub that holds one repository, filtered as huggingface_hub filters."""
    snapshot = tmp_path / "snapshot"

    def hold(files: list[str]) -> Path:
        def snapshot_download(repo_id: str, *, allow_patterns: Any, ignore_patterns: Any) -> str:
            assert repo_id == NAME
            for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / file).touch()
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return snapshot

    return hold


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refused(monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Exception | None = None) -> str:
    """What the user reads when the download ends in `error`."""

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointNotFoundError) as caught:
        resolve_model(NAME)
    assert NAME in str(caught.value)
    return str(caught.value)


def test_an_existing_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(NAME) == Path(NAME)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/meta-llama") == tmp_path / "meta-llama"


@pytest.mark.parametrize(
    "model", ["", "llama", "./llama", "/no/such/folder", "a/b/c", "a/", "-a/b", "../nowhere", "a b/c", "é/b"]
)
def test_no_folder_and_no_name(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="is no folder here: give an existing folder, or owner/name"):
        resolve_model(model)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointNotFoundError, match="is a file: give the folder"):
        resolve_model(str(tmp_path / "model.gguf"))


CONFIG_FILES = {
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
META_FILES = {"original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"}


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_safetensors_are_fetched_and_metas_copy_is_not(repository: Any, load_format: str) -> None:
    snapshot = repository(PUBLISHED)
    assert resolve_model(NAME, load_format=load_format) == snapshot
    assert files_in(snapshot) == {*CONFIG_FILES, "model.safetensors"}


def test_metas_layout_where_there_are_no_safetensors(repository: Any) -> None:
    snapshot = repository([file for file in PUBLISHED if not fnmatch.fnmatch(file, "*.safetensors")])
    assert resolve_model(NAME) == snapshot / "original"
    assert files_in(snapshot) >= META_FILES


def test_metas_layout_when_asked(repository: Any) -> None:
    snapshot = repository(PUBLISHED)
    assert resolve_model(NAME, load_format="pth") == snapshot / "original"
    assert files_in(snapshot) == META_FILES


def test_dummy_weights_need_no_weights(repository: Any) -> None:
    snapshot = repository(PUBLISHED)
    assert resolve_model(NAME, load_format="dummy") == snapshot
    assert files_in(snapshot) == CONFIG_FILES


@pytest.mark.parametrize("error_class", [GatedRepoError, HfHubHTTPError])
@pytest.mark.parametrize("status", [401, 403])
def test_gated(monkeypatch: pytest.MonkeyPatch, error_class: type[HfHubHTTPError], status: int) -> None:
    message = refused(monkeypatch, error_class("Access is restricted", response=Response(status)))
    assert f"accept its licence at {constants.ENDPOINT}/{NAME}" in message
    assert "HF_TOKEN" in message
    assert "hf auth login" in message


def test_gated_found_out_after_the_cache_was_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = HfHubHTTPError("403 Forbidden", response=Response(403))
    assert "accept its licence" in refused(monkeypatch, LocalEntryNotFoundError("no snapshot"), cause)


@pytest.mark.parametrize("status", [401, 404])
def test_not_found_or_private(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    message = refused(monkeypatch, RepositoryNotFoundError("Repository Not Found", response=Response(status)))
    assert "neither a folder here nor a model at" in message
    assert "private" in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize("cause", [ConnectionError("no route"), HfHubHTTPError("503", response=Response(503)), None])
def test_not_reachable(monkeypatch: pytest.MonkeyPatch, cause: Exception | None) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    message = refused(monkeypatch, LocalEntryNotFoundError("no snapshot"), cause)
    assert "not complete in the cache and the Hub cannot be reached" in message
    assert "give a folder" in message


def test_offline_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(monkeypatch, LocalEntryNotFoundError("no snapshot"), OfflineModeIsEnabled("offline"))
    assert "not complete in the cache and HF_HUB_OFFLINE is set" in message


def test_the_real_client_offline_with_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="HF_HUB_OFFLINE is set: go online, or give a folder"):
        resolve_model(NAME)


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No space left on device" in refused(monkeypatch, OSError(28, "No space left on device"))


def test_neither_torch_nor_the_client_is_imported_for_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pronk.engine.weights.hub import resolve_model; resolve_model(sys.argv[1]); "
        "sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60).returncode == 0
