"""Names for interchangeable parts: exact, and an unknown one lists those that exist."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from llava_core.runtime import ConfigError

T = TypeVar("T")
MOST_LISTED = 40


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that does not exist: the nearest one, and all known ones, of many the nearest."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    if len(names) <= MOST_LISTED:
        return f"unknown {kind} '{name}'{guess} (known: {', '.join(names) or 'none'})"
    nearest = difflib.get_close_matches(str(name), names, n=5, cutoff=0)
    return f"unknown {kind} '{name}'{guess} (of {len(names)} known, the nearest: {', '.join(nearest)})"


class Registry(Generic[T]):
    """Parts of one kind by exact name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its object under `name`, once."""

        def enter(part: T) -> T:
            if name in self._parts:
                raise ConfigError(f"{self.kind} '{name}' is registered twice; give one of them another name")
            self._parts[name] = part
            return part

        return enter

    def get(self, name: str) -> T:
        """Return the part called `name`, or raise a ConfigError that names the nearest and lists all."""
        try:
            return self._parts[name]
        except (KeyError, TypeError):  # a TypeError of a list or a mapping
            raise ConfigError(unknown(self.kind, name, self._parts)) from None

    def names(self) -> list[str]:
        return list(self._parts)
