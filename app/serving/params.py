"""From the fields of a request to the engine's sampling parameters."""

import asyncio
import secrets
from dataclasses import replace

from app.errors import ContextLengthExceeded, InvalidRequest
from app.protocol.common import SamplingFields
from app.serving.context import ServingContext
from model.errors import TokenizerError
from model.step import SamplingParams

# No tokenizer of this family has tokens longer than this on the average of a long text.
MAX_CHARACTERS_PER_TOKEN = 64
OFFLOADED_CHARACTERS = 4096  # longer texts are tokenised off the event loop


def sampling_params(
    context: ServingContext,
    fields: SamplingFields,
    *,
    count: int,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> tuple[SamplingParams, ...]:
    """Return one set of parameters for each choice; all share a seed and differ by their index."""
    if fields.prompt_logprobs is not None and fields.stream:
        raise InvalidRequest(
            "'prompt_logprobs' come with whole answers only, not with 'stream'.",
            param="prompt_logprobs",
        )
    wanted = [n for n in (prompt_logprobs, fields.prompt_logprobs) if n is not None]
    defaults = context.defaults
    seed = fields.seed
    if seed is None:
        seed = secrets.randbits(63)

    def pick(value: float | None, default: float | None, otherwise: float) -> float:
        return next(item for item in (value, default, otherwise) if item is not None)

    stops = frozenset(fields.stop_token_ids or ())
    if not fields.ignore_eos:
        stops |= context.eos_token_ids
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' ({min_tokens}) is more than the {max_tokens} tokens allowed.",
            param="min_tokens",
        )
    params = SamplingParams(
        temperature=pick(fields.temperature, defaults.temperature, 1.0),
        top_k=max(0, int(pick(fields.top_k, defaults.top_k, 0))),
        top_p=pick(fields.top_p, defaults.top_p, 1.0),
        min_p=pick(fields.min_p, defaults.min_p, 0.0),
        repetition_penalty=pick(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=_logit_bias(context, fields),
        allowed_token_ids=_allowed(context, fields),
        bad_words_token_ids=_bad_words(context, fields),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stops,
        logprobs=logprobs,
        prompt_logprobs=max(wanted, default=None),
    )
    _check_something_left(context, params)
    return tuple(replace(params, choice=choice) for choice in range(count))


def _check_something_left(context: ServingContext, params: SamplingParams) -> None:
    """Refuse masks that leave no first token to choose: the step would blame the model."""
    banned = {word[0] for word in params.bad_words_token_ids if len(word) == 1}
    if params.min_tokens:
        banned |= params.stop_token_ids
    if params.allowed_token_ids is not None:
        is_empty, param = banned.issuperset(params.allowed_token_ids), "allowed_token_ids"
    else:
        num_banned = sum(token_id < context.vocab_size for token_id in banned)
        is_empty, param = num_banned == context.vocab_size, "stop_token_ids"
    if is_empty:
        raise InvalidRequest(
            f"'{param}': 'bad_words' and the ends that 'min_tokens' puts off leave no token.",
            param=param,
        )


def _logit_bias(context: ServingContext, fields: SamplingFields) -> tuple[tuple[int, float], ...]:
    biases = []
    for name, bias in (fields.logit_bias or {}).items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise InvalidRequest("'logit_bias' must map token ids to numbers.", param="logit_bias")
        biases.append((_check_id(context, int(name), "logit_bias"), bias))
    return tuple(biases)


def _allowed(context: ServingContext, fields: SamplingFields) -> tuple[int, ...] | None:
    if fields.allowed_token_ids is None:
        return None
    if not fields.allowed_token_ids:
        raise InvalidRequest("'allowed_token_ids' is empty.", param="allowed_token_ids")
    ids = sorted(set(fields.allowed_token_ids))
    return tuple(_check_id(context, token_id, "allowed_token_ids") for token_id in ids)


def _bad_words(context: ServingContext, fields: SamplingFields) -> tuple[tuple[int, ...], ...]:
    """Return the ids of each word, at the start of a text and, as is usual, behind a space."""
    words = set()
    for word in fields.bad_words or ():
        for text in (word, " " + word.lstrip()):
            ids = context.tokenizer.encode(text, add_special_tokens=False, parse_special=False)
            words.add(tuple(ids))
    return tuple(sorted(words))


def _check_id(context: ServingContext, token_id: int, param: str) -> int:
    if not 0 <= token_id < context.vocab_size:
        raise InvalidRequest(
            f"'{param}': token id {token_id} is outside the vocabulary of {context.vocab_size}.",
            param=param,
        )
    return token_id


def check_ids(context: ServingContext, ids: list[int], param: str) -> list[int]:
    """Raise InvalidRequest unless all ids are in the vocabulary."""
    if ids and max(ids) >= context.vocab_size:
        _check_id(context, max(ids), param)
    return ids


async def tokenize_text(
    context: ServingContext,
    text: str,
    *,
    param: str,
    add_special_tokens: bool = True,
    parse_special: bool = True,
) -> list[int]:
    """Encode a text, off the event loop if it is long; absurdly long ones are refused unread."""
    check_characters(context, len(text), param)

    def encode() -> list[int]:
        return context.tokenizer.encode(
            text, add_special_tokens=add_special_tokens, parse_special=parse_special
        )

    try:
        return await asyncio.to_thread(encode) if len(text) > OFFLOADED_CHARACTERS else encode()
    except TokenizerError as error:
        raise InvalidRequest(f"'{param}': {error}.", param=param) from None


def check_characters(context: ServingContext, num_characters: int, param: str) -> None:
    """Refuse a text that cannot fit the context, however well it compresses into tokens."""
    if num_characters > context.max_model_len * MAX_CHARACTERS_PER_TOKEN:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context.max_model_len} tokens, which "
            f"{num_characters} characters cannot fit.",
            param=param,
        )


def truncated(context: ServingContext, fields: SamplingFields, ids: list[int]) -> list[int]:
    """Return the end of a prompt, if it asks to be cut: -1 means to what the context holds."""
    limit = fields.truncate_prompt_tokens
    if limit is None:
        return ids
    if limit == 0:
        raise InvalidRequest(
            "'truncate_prompt_tokens' leaves no token.", param="truncate_prompt_tokens"
        )
    if limit < 0:
        limit = context.max_model_len - 1
    return ids[-limit:]


def check_length(
    context: ServingContext, num_prompt_tokens: int, max_tokens: int | None, *, param: str
) -> int:
    """Return how many tokens may be generated; raises ContextLengthExceeded with the counts.

    None asks for the rest of the context. `param` is the field of the prompt.
    """
    room = context.max_model_len - num_prompt_tokens
    if room < 1 if max_tokens is None else max_tokens > room:
        wanted = "" if max_tokens is None else f" and {max_tokens} for the completion"
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context.max_model_len} tokens. However, "
            f"your request has {num_prompt_tokens} in the prompt{wanted}. Please reduce either.",
            param=param if room < 1 or max_tokens is None else "max_tokens",
        )
    return room if max_tokens is None else max_tokens
