"""Names of members: what is a key, what a suffix, and what is no sample by its name or type."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass

from pipeline.inputs.sample import KeyUntil


def skip_reason(member: tarfile.TarInfo) -> str | None:
    """Why a member is neither an image nor a sidecar, by its type or as a hidden one; None where it may be either.

    A hard link is a file of another name. macOS adds hidden files beside those that a user packs.
    """
    if member.isdir():
        return "folder"
    if member.issym():
        return "symlink"
    if not (member.isfile() or member.islnk()):
        return "not a file"
    parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
    return "hidden" if not parts or "__MACOSX" in parts or any(part.startswith(".") for part in parts) else None


@dataclass(frozen=True)
class Names:
    """Keys end at the first dot of a file name, as WebDataset has it, or at the last."""

    until: KeyUntil

    def split(self, name: str) -> tuple[str, str]:
        """A member's key and suffix: of `a/b.left.jpg` they are `a/b` and `left.jpg`, or `a/b.left` and `jpg`."""
        folder, slash, _ = name.removeprefix("./").rpartition("/")
        stem, suffix = self.split_file(name)
        return folder + slash + stem, suffix

    def split_file(self, name: str) -> tuple[str, str]:
        """The same of the file name alone."""
        file = name.rpartition("/")[2]
        if self.until == "first-dot":
            stem, _, suffix = file.partition(".")
        else:
            stem, dot, suffix = file.rpartition(".")
            stem, suffix = (stem, suffix) if dot else (suffix, "")
        return stem, suffix

    @staticmethod
    def last_suffix(name: str) -> str:
        """`.json` of `a.b.JSON`, as skipped files are counted."""
        return os.path.splitext(name)[1].lower() or "no suffix"

    def twice(self, key: str, first: str, second: str) -> str:
        """Why a second image of one key is an error, and which option solves it."""
        found = f"the key {key!r} stands twice in this shard, for {first!r} and {second!r}"
        suffixes = [self.split_file(name)[1] for name in (first, second)]
        if suffixes[0].lower() == suffixes[1].lower():
            return f"{found}; rename one of them"
        of_images = f"choose one of a sample's images with --image-column {suffixes[0]} or {suffixes[1]}"
        if self.last_suffix(first) != self.last_suffix(second):
            return f"{found}; {of_images}"
        return (
            f"{found}; where names have dots, have keys end at the last one with --key-until last-dot, or {of_images}"
        )
