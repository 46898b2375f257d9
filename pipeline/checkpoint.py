"""Where a model's files are, and which revision of it they hold."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.errors import HubUnreachable, ModelError

# Configuration and safetensors: no pickles, no Python.
_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
FILES = (*_FILES, "*.safetensors", "*.safetensors.index.json")
HUB_TIMEOUT_S = 10.0
_COMMIT = re.compile("[0-9a-f]{40}")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder as `save_pretrained` makes it. `revision` is the hub's commit, or a digest of the folder's files."""

    name: str
    path: Path
    revision: str


def find_checkpoint(name: str) -> Checkpoint:
    """The checkpoint that MODEL names: a folder, or a hub id with an optional `@REVISION`.

    Files of the hub are fetched into Hugging Face's own cache. Raises `ModelError`, and `HubUnreachable` where the hub
    does not answer and the cache has no copy.
    """
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return Checkpoint(name=name, path=path, revision=_digest(path))
    match = _HUB_ID.fullmatch(name)
    if not match or name.startswith("."):
        raise ModelError(f"model {name!r}: no such folder on {os.uname().nodename}, and not a hub id")
    return _from_hub(name, match["repo"], match["revision"])


def _from_hub(name: str, repo: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import errors

    try:
        path = _snapshot(repo, revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        hint = "check the id; a private or gated model needs HF_TOKEN"
        raise ModelError(f"model {name!r}: the hub has no such model or revision; {hint}") from error
    except errors.HFValidationError as error:
        raise ModelError(f"model {name!r}: no such folder on {os.uname().nodename}, and not a hub id") from error
    except Exception as error:  # of whatever kind: the HTTP library under huggingface_hub differs between its releases
        raise HubUnreachable(
            f"model {name!r}: no such folder here, and the model hub cannot be reached; give a folder made by "
            "save_pretrained, or fill the Hugging Face cache first"
        ) from error
    return Checkpoint(name=name, path=path, revision=path.name)


def _snapshot(repo: str, revision: str | None) -> Path:
    """The folder in Hugging Face's cache. Raises whatever huggingface_hub and the HTTP library under it raise."""
    from huggingface_hub import HfApi, errors, snapshot_download

    fetch = partial(snapshot_download, repo, revision=revision, allow_patterns=list(FILES))
    if _COMMIT.fullmatch(revision or ""):  # what a commit holds never changes, so the hub need not be asked
        with suppress(errors.LocalEntryNotFoundError):
            return Path(fetch(local_files_only=True))
    try:
        # a question with a timeout first: snapshot_download waits without end for a hub that does not answer
        HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as refusal:
        try:
            return Path(fetch(local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise refusal from None
    return Path(fetch())


def _digest(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {str(folder)!r}: the folder has no config.json; give one made by save_pretrained")
    digest = hashlib.sha256()
    try:
        for file in sorted({file for pattern in FILES for file in folder.glob(pattern)}):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    except OSError as error:
        raise ModelError(f"model {str(folder)!r}: {error.filename}: {error.strerror}") from error
    return f"sha256-{digest.hexdigest()[:40]}"
