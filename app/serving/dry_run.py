"""What a request would be, without running it: ids, lengths, blocks, hits in the prefix cache."""

from app.serving.answer import JsonObject
from app.serving.context import ServingContext
from app.serving.generation import Prompt


async def describe_prompts(
    context: ServingContext, prompts: list[Prompt], cache_salt: str
) -> JsonObject:
    """Return what would be computed; nothing is queued, and the cache may change any time."""
    block_size = context.engine.limits.block_size
    described = []
    for prompt in prompts:
        num_tokens, sampling = len(prompt.token_ids), prompt.sampling
        num_cached = await context.engine.count_cached(prompt.token_ids, cache_salt)
        per_choice = -(-(num_tokens + sampling[0].max_tokens) // block_size)
        described.append(
            {
                "prompt_token_ids": prompt.token_ids,
                "prompt_tokens": num_tokens,
                "expected_cached_tokens": num_cached,
                "max_tokens": sampling[0].max_tokens,
                "choices": len(sampling),
                "kv_blocks": per_choice * len(sampling),  # at most; shared ones count once less
            }
        )
    return {
        "object": "dry_run",
        "model": context.model_names[0],
        "max_model_len": context.max_model_len,
        "block_size": block_size,
        "prompts": described,
    }
