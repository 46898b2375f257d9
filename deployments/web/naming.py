"""What the one model is called by those who name it in a URL."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import PurePosixPath

from deployments.web.problems import Problem
from pipeline.model_info import ModelInfo

VERSION = "1"  # protocols want a number; the revision stands beside it where there is room for it


def short_name(info: ModelInfo) -> str:
    """The last part of a hub id or of a folder's path."""
    return PurePosixPath(info.model.partition("@")[0]).name


def check_name(name: str, info: ModelInfo, version: str = VERSION) -> None:
    """Raises `Problem` where the model is not called so, or has no such version."""
    known = (short_name(info), info.model, info.model.partition("@")[0])
    if name not in known and f"/{name}" not in known:
        raise Problem(HTTPStatus.NOT_FOUND, f"no model {name!r} is served here; there is {short_name(info)!r}")
    if version not in (VERSION, info.revision):
        detail = f"the model {name!r} has no version {version!r} here; there is {VERSION!r}"
        raise Problem(HTTPStatus.NOT_FOUND, detail)
