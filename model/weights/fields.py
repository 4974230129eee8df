"""Strict reading of the values that a config or header holds, with errors that say where.

JSON and GGUF give untyped values; nothing passes here by being merely convertible: a bool is
not an integer, 4096.0 is not 4096, NaN is not a number.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from model.config import shown
from model.errors import ConfigError

MAX_JSON_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, object]:
    """Read a file that holds one JSON object. Raises ConfigError."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: is {size} bytes long, more than any config")
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json_object(text, str(path))


def parse_json_object(text: bytes, where: str) -> dict[str, object]:
    """Parse bytes that hold one JSON object, without duplicate keys. Raises ConfigError."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise ConfigError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must hold a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{shown(name)} appears twice in one object")
            seen.add(name)
    return found


class Fields:
    """The fields of one object; each is read by type. Null means absent."""

    def __init__(self, values: Mapping[str, object], where: str, prefix: str = "") -> None:
        self.where = where
        self._values = values
        self._prefix = prefix  # of names in messages, where the object lies inside another

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def names(self) -> list[str]:
        """Return the names of all fields."""
        return list(self._values)

    def fail(self, name: str, what: str) -> ConfigError:
        """Build the error for a field, to be raised by the caller."""
        return ConfigError(f"{self.where}: {self._prefix}{name} {what}")

    def raw(self, name: str) -> object:
        """Return the value as it stands, None when absent."""
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, f"must be an integer, not {shown(value)}")
        if abs(value) >= 2**63:
            raise self.fail(name, f"is out of range: {shown(value)}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return self.integer(name) if name in self else None

    def number(self, name: str, default: float | None = None) -> float:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, f"must be a number, not {shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.fail(name, f"must be a finite number, not {shown(value)}")
        return number

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if name in self else None

    def flag(self, name: str, default: bool) -> bool:
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, f"must be true or false, not {shown(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._required(name, default)
        if not isinstance(value, str):
            raise self.fail(name, f"must be a string, not {shown(value)}")
        return value

    def inner(self, name: str) -> "Fields | None":
        """Return the fields of an object held in this one, or None when absent or empty."""
        value = self._values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.fail(name, f"must be an object, not {shown(value)}")
        return Fields(value, self.where, f"{self._prefix}{name}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return a field that holds one id or a list of ids; empty when absent."""
        value = self._values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise self.fail(name, f"must hold token ids, not {shown(value)}")
        return tuple(ids)

    def _required(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.fail(name, "is missing")
        return value
