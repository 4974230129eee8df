"""What the operator asks for: flags and environment as frozen configs.

The only reader of the environment and of the file of API keys. Knows nothing of models or HTTP.
"""

import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model.errors import ConfigError

MAX_REQUEST_BYTES = 2 << 20  # parsing holds the interpreter: a larger body would stall all streams
_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[^\s\x00-\x1f\x7f]{1,1024}")
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
_SHARES = ("weight", *_LIMITS, "cache_salt")
_OPTIONAL = (*_SHARES, "scope")
MAX_LIMIT = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key and the name of who holds it; only the name is ever shown.

    Of what keys compete for, one of weight 2 is due twice as much as one of weight 1. A limit of
    None is none. Keys of one `cache_salt` share cached prefixes with each other and nobody else.
    One of the scope "metrics" opens /metrics alone: whoever scrapes need hold no other.
    """

    name: str
    key: str = field(repr=False)
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    cache_salt: str = field(default="", repr=False)
    scope: Literal["all", "metrics"] = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where and how the HTTP service listens, and whom it lets in. A limit of 0 is none."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    named_keys: tuple[ApiKey, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    max_connections: int = 4096
    max_connections_per_client: int = 2048
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    shutdown_timeout_s: float = 30.0
    resume_window_s: float = 30.0
    log_level: str = "info"
    otlp_traces_endpoint: str | None = None
    max_request_bytes: int = MAX_REQUEST_BYTES

    def keys(self) -> tuple[ApiKey, ...]:
        """Return every key with a name; those from the command line are numbered."""
        numbered = enumerate(self.api_keys, start=1)
        unnamed = (ApiKey(name=f"key-{number}", key=key) for number, key in numbered)
        return (*self.named_keys, *unnamed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is taken from environment variables, and from nowhere else."""

    cache_dir: Path  # of the demo model
    api_keys: tuple[str, ...]  # ARRIERO_API_KEY
    metrics_keys: tuple[ApiKey, ...] = ()  # ARRIERO_METRICS_KEY
    hf_token: str | None  # HF_TOKEN
    is_offline: bool  # HF_HUB_OFFLINE


def read_environment() -> Environment:
    """Read the environment once."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    key = os.environ.get("ARRIERO_API_KEY")
    metrics_key = os.environ.get("ARRIERO_METRICS_KEY")
    return Environment(
        cache_dir=Path(cache) / "arriero",
        api_keys=(key,) if key else (),
        metrics_keys=(
            (ApiKey(name="ARRIERO_METRICS_KEY", key=metrics_key, scope="metrics"),)
            if metrics_key
            else ()
        ),
        hf_token=os.environ.get("HF_TOKEN") or None,
        is_offline=os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"),
    )


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read a TOML file with a table a key: `[alice]`, `key = "..."`, and if need be more of it.

    What more, `ApiKey` says. Raises ConfigError.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        # The decoder's own text may quote the line, and with it a key.
        reason = error.strerror if isinstance(error, OSError) else "is not TOML in UTF-8"
        raise ConfigError(f"--api-key-file {path}: {reason}") from None
    keys: dict[str, ApiKey] = {}
    for name, table in tables.items():
        where = f"--api-key-file {path}: [{name}]"
        if not _KEY_NAME.fullmatch(name):
            raise ConfigError(f"{where}: a name is 1 to 64 letters, digits and ._-")
        found = _read_key(where, name, table)
        if found.key in keys:
            raise ConfigError(f"{where}: has the key of [{keys[found.key].name}]")
        keys[found.key] = found
    if not keys:
        raise ConfigError(f"--api-key-file {path}: holds no key")
    return tuple(keys.values())


def _read_key(where: str, name: str, table: object) -> ApiKey:
    """Read the table of one key. Raises ConfigError."""
    if not isinstance(table, dict) or not {"key"} <= set(table) <= {"key", *_OPTIONAL}:
        names = ", ".join(_OPTIONAL)
        raise ConfigError(f"{where}: needs a field key, may have {names}, and nothing else")
    weight = table.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0.01 <= weight <= 1000:
        raise ConfigError(f"{where}: a weight is a number from 0.01 to 1000")
    key = table["key"]
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ConfigError(f"{where}: a key is 1 to 1024 characters without spaces")
    salt = table.get("cache_salt", "")
    if not isinstance(salt, str) or not ("cache_salt" not in table or 0 < len(salt) <= 256):
        raise ConfigError(f"{where}: a cache_salt is a text of 1 to 256 characters")
    limits = {limit: table.get(limit) for limit in _LIMITS}
    for limit, value in limits.items():
        if value is not None and (type(value) is not int or not 0 < value <= MAX_LIMIT):
            raise ConfigError(f"{where}: {limit} is a whole number from 1 to {MAX_LIMIT}")
    scope = table.get("scope", "all")
    if scope not in ("all", "metrics"):
        raise ConfigError(f'{where}: a scope is "all" or "metrics"')
    if scope == "metrics" and (idle := [name for name in _SHARES if name in table]):
        raise ConfigError(f'{where}: a key of the scope "metrics" has no use for {idle[0]}')
    return ApiKey(name=name, key=key, weight=float(weight), cache_salt=salt, scope=scope, **limits)
