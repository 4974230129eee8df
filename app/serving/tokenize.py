"""POST /tokenize and /detokenize: ids of a text or a conversation, and back."""

import asyncio

from app.errors import InvalidRequest
from app.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from app.serving.answer import JsonObject
from app.serving.context import ServingContext
from app.serving.conversation import Rendering, encode_messages
from app.serving.logprobs import token_text
from app.serving.params import OFFLOADED_CHARACTERS, check_ids, tokenize_text
from app.text.detokenize import IncrementalDetokenizer


async def tokenize(context: ServingContext, request: TokenizeRequest) -> JsonObject:
    context.check_model(request.model)
    if (request.prompt is None) == (not request.messages):
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
    if request.prompt is None:
        rendering = Rendering(
            add_generation_prompt=request.add_generation_prompt is not False,
            parse_special=bool(request.parse_special),
        )
        token_ids = await encode_messages(context, request.messages, rendering)
    else:
        token_ids = await tokenize_text(
            context,
            request.prompt,
            param="prompt",
            add_special_tokens=request.add_special_tokens is not False,
            parse_special=request.parse_special is not False,
        )
    answer: JsonObject = {
        "count": len(token_ids),
        "max_model_len": context.max_model_len,
        "tokens": token_ids,
    }
    if request.return_token_strs:
        answer["token_strs"] = [token_text(context.tokenizer, token_id) for token_id in token_ids]
    return answer


async def detokenize(context: ServingContext, request: DetokenizeRequest) -> JsonObject:
    context.check_model(request.model)
    check_ids(context, request.tokens, "tokens")

    def decode() -> str:
        detokenizer = IncrementalDetokenizer(context.tokenizer, skip_special_tokens=False)
        return detokenizer.push(request.tokens) + detokenizer.flush()

    is_long = len(request.tokens) > OFFLOADED_CHARACTERS
    return {"prompt": await asyncio.to_thread(decode) if is_long else decode()}
