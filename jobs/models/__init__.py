"""Model checkpoints that ship with Tandem, each a folder in the layout of `save_pretrained`."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UsageError

FOLDER = Path(__file__).parent


def shipped(name: str) -> Path:
    """The folder of a shipped checkpoint, such as `digits-vit`.

    Raises UsageError, which lists the names there are, if there is none of that name.
    """
    names = sorted(config.parent.name for config in FOLDER.glob("*/config.json"))
    if name not in names:
        raise UsageError(f"no model named {name!r} ships with Tandem; choose from: {', '.join(names)}")
    return FOLDER / name
