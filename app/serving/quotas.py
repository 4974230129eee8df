"""What each API key may use: requests and tokens a minute, requests at once, a cache of its own.

Method: a token bucket for each limit. It starts full, holds a minute's worth and fills evenly, so
that a burst is taken at once and the mean is kept whatever the pattern. The tokens of a request,
prompt and longest completion, are taken before it runs, and what it did not use is given back at
its end. One that asks for more than the bucket holds takes all of it; should it use more, the level
is below 0 and the next one waits for it. Knows nothing of shares in the engine: see app/engine.
"""

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterable

from app.errors import RateLimited
from app.settings import ApiKey

MINUTE_S = 60.0
RETRY_CONCURRENT_S = 1.0  # nobody knows when a request will end
QUOTA_HEADERS = tuple(
    f"x-ratelimit-{kind}-{what}"
    for what in ("requests", "tokens")
    for kind in ("limit", "remaining", "reset")
)
_ROUNDING = 1e-6  # of a level that was filled by many small steps


class Bucket:
    """A limit a minute. Used on the event loop only."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._level = float(limit)
        self._filled_s = clock()

    @property
    def level(self) -> float:
        """What may be taken now; below 0, what is owed."""
        now = self._clock()
        gained = (now - self._filled_s) * self.limit / MINUTE_S
        self._level, self._filled_s = min(self._level + gained, float(self.limit)), now
        return self._level

    @property
    def remaining(self) -> int:
        return max(0, math.floor(self.level + _ROUNDING))

    @property
    def reset_s(self) -> float:
        """Seconds until the bucket is full."""
        return self.wait_s(self.limit)

    def wait_s(self, amount: int) -> float:
        """Return how long it takes until an amount is there; 0 if it is."""
        missing = amount - self.level
        return missing * MINUTE_S / self.limit if missing > _ROUNDING else 0.0

    def take(self, amount: float) -> None:
        """Take an amount, or give one back if it is below 0."""
        self._level = min(self.level - amount, float(self.limit))


class Reservation:
    """Tokens taken for a request under way."""

    def __init__(self, bucket: Bucket | None, num_tokens: int) -> None:
        self._bucket = bucket
        self._num_tokens = num_tokens

    def settle(self, num_used: int) -> None:
        """Give back what was not used; a second time it does nothing."""
        if self._bucket is not None:
            self._bucket.take(num_used - self._num_tokens)
            self._bucket = None


NOTHING_RESERVED = Reservation(None, 0)


class Quota:
    """The limits of one key, and how much of them is left."""

    def __init__(self, key: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = key.name
        self._max_concurrent = key.max_concurrent
        self._num_running = 0
        self._requests = self._tokens = None
        if key.requests_per_minute is not None:
            self._requests = Bucket(key.requests_per_minute, clock)
        if key.tokens_per_minute is not None:
            self._tokens = Bucket(key.tokens_per_minute, clock)

    def enter(self) -> None:
        """Count a request, before anything is done for it; `leave` follows. Raises RateLimited."""
        most = self._max_concurrent
        if most is not None and self._num_running >= most:
            raise self._refusal("requests at once", "concurrent_requests", most, RETRY_CONCURRENT_S)
        if self._requests is not None:
            if wait_s := self._requests.wait_s(1):
                limit = self._requests.limit
                raise self._refusal("requests per minute", "requests", limit, wait_s)
            self._requests.take(1)
        self._num_running += 1

    def leave(self) -> None:
        self._num_running -= 1

    def reserve(self, num_prompt_tokens: int, max_tokens: int) -> Reservation:
        """Take the tokens that a request may use at most. Raises RateLimited."""
        bucket = self._tokens
        if bucket is None:
            return NOTHING_RESERVED
        if num_prompt_tokens > bucket.limit:
            raise self._refusal("tokens per minute", "tokens", bucket.limit, None)
        num_tokens = min(num_prompt_tokens + max_tokens, bucket.limit)
        if wait_s := bucket.wait_s(num_tokens):
            raise self._refusal("tokens per minute", "tokens", bucket.limit, wait_s)
        bucket.take(num_tokens)
        return Reservation(bucket, num_tokens)

    def headers(self) -> dict[str, str]:
        """Return what is left as OpenAI tells it."""
        headers = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{what}"] = str(bucket.remaining)
                headers[f"x-ratelimit-reset-{what}"] = format_duration(bucket.reset_s)
        return headers

    def _refusal(self, what: str, kind: str, limit: int, wait_s: float | None) -> RateLimited:
        advice = "The prompt alone is over it."
        if wait_s is not None:
            advice = f"Please try again in {format_duration(wait_s)}."
        message = f"Rate limit reached for the key '{self._name}': {limit} {what}. {advice}"
        return RateLimited(message, kind=kind, retry_after_s=wait_s)


class Tenants:
    """What is known of those who hold keys, by name; "" is whoever needs none."""

    def __init__(
        self, keys: Iterable[ApiKey] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        keys = list(keys)
        self._quotas = {key.name: Quota(key, clock) for key in keys}
        self._salts = {key.name: key.cache_salt for key in keys if key.cache_salt}
        self._unlimited = Quota(ApiKey(name="", key=""), clock)
        self._secret = secrets.token_bytes(32)

    def quota(self, name: str) -> Quota:
        return self._quotas.get(name, self._unlimited)

    def cache_salt(self, name: str, given: str | None) -> str:
        """Return the salt of a request: its own, under that of its key if the key has one.

        That of a key stands as a digest under a secret of the process: no field of a request of
        another key can spell it.
        """
        salt = self._salts.get(name)
        if salt is None:
            return given or ""
        digest = hmac.new(self._secret, salt.encode("utf-8"), hashlib.sha256).hexdigest()
        return f"{digest}/{given or ''}"


def format_duration(seconds: float) -> str:
    """Return a duration in the form of OpenAI's headers: 20ms, 1.5s, 6m0s; rounded up."""
    milliseconds = math.ceil(seconds * 1000 - _ROUNDING)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    in_seconds = f"{rest / 1000:g}s"
    return f"{minutes}m{in_seconds}" if minutes else in_seconds
