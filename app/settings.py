"""What the operator asks for: flags and environment as frozen configs.

The only reader of the environment. Knows nothing of models or HTTP.
"""

import os
from dataclasses import dataclass
from pathlib import Path

MAX_REQUEST_BYTES = 2 << 20  # parsing holds the interpreter: a larger body would stall all streams


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where and how the HTTP service listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    shutdown_timeout_s: float = 30.0
    log_level: str = "info"
    max_request_bytes: int = MAX_REQUEST_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is taken from environment variables, and from nowhere else."""

    cache_dir: Path  # of the demo model
    api_keys: tuple[str, ...]  # ARRIERO_API_KEY
    hf_token: str | None  # HF_TOKEN
    is_offline: bool  # HF_HUB_OFFLINE


def read_environment() -> Environment:
    """Read the environment once."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    key = os.environ.get("ARRIERO_API_KEY")
    return Environment(
        cache_dir=Path(cache) / "arriero",
        api_keys=(key,) if key else (),
        hf_token=os.environ.get("HF_TOKEN") or None,
        is_offline=os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"),
    )
