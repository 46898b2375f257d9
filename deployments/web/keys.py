"""API keys: who may ask for what, and how often.

A key is a long random string, of which only the SHA-256 is kept: with 256 random bits there is nothing to guess, and so
no need for a slow hash. It stands in a line with the name of who has it and what it is for:

    nightly predict 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from pipeline.errors import UsageError

KEY_BYTES = 32
PREFIX = "tandem_"  # by which scanners of repositories can tell it
BURST_S = 1.0  # of a key's rate may come at once


class Scope(StrEnum):
    """What a key may be for; `ADMIN` is for all."""

    PREDICT = "predict"
    JOBS = "jobs"
    ADMIN = "admin"


@dataclass(frozen=True)
class Key:
    """A key as it is kept."""

    name: str
    scopes: frozenset[Scope]
    sha256: str

    @classmethod
    def parse(cls, line: str) -> Key:
        """The key in a line. Raises `UsageError`, without the line, which may hold a secret by mistake."""
        match line.split():
            case [name, scopes, sha256] if re.fullmatch(r"[0-9a-f]{64}", sha256):
                try:
                    return cls(name, frozenset(map(Scope, scopes.split(","))), sha256)
                except ValueError as error:
                    known = ", ".join(Scope)
                    raise UsageError(f"the key of {name!r} has a scope that there is not; there are {known}") from error
        raise UsageError("a key is a line of a name, scopes and a SHA-256 in hex, as `tandem key` prints it")

    def __str__(self) -> str:
        return f"{self.name} {','.join(sorted(self.scopes))} {self.sha256}"

    def may(self, scope: Scope) -> bool:
        """Whether the key is for that."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


def new_key(name: str, scopes: Iterable[Scope]) -> tuple[str, Key]:
    """A new secret, and the key that knows it. Raises `UsageError` for a name that is not one word."""
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise UsageError(f"the name {name!r} cannot be a key's; use letters, digits and _ . @ -")
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return secret, Key(name, frozenset(scopes), _sha256(secret))


def parse_keys(text: str) -> tuple[str, ...]:
    """The lines of keys in a file, without comments and empty ones. Raises `UsageError`."""
    lines = [line.strip() for line in text.splitlines()]
    return tuple(str(Key.parse(line)) for line in lines if line and not line.startswith("#"))


class Keys:
    """The keys that an endpoint knows, and how much of each one's rate is left.

    `rate_per_s` is of requests with one key, for this process; None is no limit.
    """

    def __init__(
        self, keys: Iterable[Key], rate_per_s: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys, self._rate_per_s, self._clock = tuple(keys), rate_per_s, clock
        self._left: dict[str, tuple[float, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, secret: str) -> Key | None:
        """The key of that secret. It takes as long whichever it is, and if it is none."""
        sha256, found = _sha256(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, sha256):
                found = key
        return found

    def wait_s(self, key: Key) -> float:
        """Takes a request off the key's rate; 0 where it may be answered, otherwise when to come again."""
        if self._rate_per_s is None:
            return 0.0
        most, now_s = max(1.0, BURST_S * self._rate_per_s), self._clock()
        left, then_s = self._left.get(key.name, (most, now_s))
        left = min(most, left + (now_s - then_s) * self._rate_per_s)
        if left < 1:
            self._left[key.name] = (left, now_s)
            return (1 - left) / self._rate_per_s
        self._left[key.name] = (left - 1, now_s)
        return 0.0


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
