"""Log-probabilities in OpenAI's two forms: the chat's and the legacy one of completions."""

from collections.abc import Sequence

from model.step import TokenLogprobs
from model.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text; as "bytes:\\x.." where its bytes are no text, as OpenAI does."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float, as_ids: bool) -> dict[str, object]:
    data = tokenizer.token_bytes(token_id)
    return {
        "token": f"token_id:{token_id}" if as_ids else data.decode("utf-8", errors="replace"),
        "logprob": max(logprob, -9999.0),  # JSON has no infinity
        "bytes": list(data),
    }


def chat_logprobs(
    tokenizer: Tokenizer,
    entries: Sequence[TokenLogprobs],
    *,
    skip_special_tokens: bool,
    as_ids: bool = False,
) -> dict[str, object]:
    """Return the `logprobs` object of a chat choice: what is not in its text is not in it."""
    content = []
    for entry in entries:
        if skip_special_tokens and tokenizer.is_special(entry.token_id):
            continue
        item = _entry(tokenizer, entry.token_id, entry.logprob, as_ids)
        item["top_logprobs"] = [
            _entry(tokenizer, token_id, logprob, as_ids)
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ]
        content.append(item)
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """Builds the `logprobs` objects of one completion choice; offsets run through all of them."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_ids = as_ids
        self._offset = 0

    def build(self, entries: Sequence[TokenLogprobs | int]) -> dict[str, object]:
        """Return the object of the next tokens; a bare id is a token without a probability."""
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            token_id = entry if isinstance(entry, int) else entry.token_id
            tokens.append(self._text(token_id))
            offsets.append(self._offset)
            self._offset += len(self._tokenizer.token_bytes(token_id).decode("utf-8", "replace"))
            logprobs.append(None if isinstance(entry, int) else max(entry.logprob, -9999.0))
            tops.append(None if isinstance(entry, int) else self._top(entry))
        built: dict[str, object] = {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "text_offset": offsets,
        }
        return built | {"top_logprobs": tops} if self._num_top else built

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Return the alternatives, the chosen token among them even if it is not of the best."""
        pairs = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[: self._num_top]
        top: dict[str, float] = {}
        for token_id, logprob in [*pairs, (entry.token_id, entry.logprob)]:
            top.setdefault(self._text(token_id), max(logprob, -9999.0))
        return top

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else token_text(self._tokenizer, token_id)


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]
) -> list[dict[str, object] | None]:
    """Return vLLM's `prompt_logprobs`: for each token of the prompt its candidates by id."""
    scored: list[dict[str, object] | None] = [None]  # nothing comes before the first
    for entry in entries:
        ranked = enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1)
        candidates = {token_id: (logprob, rank) for rank, (token_id, logprob) in ranked}
        candidates[entry.token_id] = (entry.logprob, entry.rank)
        scored.append(
            {
                str(token_id): {
                    "logprob": max(logprob, -9999.0),
                    "rank": rank,
                    "decoded_token": token_text(tokenizer, token_id),
                }
                for token_id, (logprob, rank) in candidates.items()
            }
        )
    return scored
