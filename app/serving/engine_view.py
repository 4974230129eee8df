"""GET /v1/engine: the engine's counters at a moment, for somebody who watches.

Counters only grow and `clock_s` runs evenly, so that two answers give a rate. What a scraper wants
is in /metrics.
"""

import time
from dataclasses import asdict

from app.serving.answer import JsonObject
from app.serving.context import ServingContext


def engine_view(context: ServingContext) -> JsonObject:
    """Return EngineStats, the tokens counted so far and the limits that they fill."""
    engine = context.engine
    limits = engine.limits
    return {
        "object": "engine",
        "clock_s": time.monotonic(),
        **asdict(engine.stats()),
        "prompt_tokens": _total(context, "prompt_tokens"),
        "generation_tokens": _total(context, "generation_tokens"),
        "block_size": limits.block_size,
        "max_num_seqs": limits.max_num_seqs,
        "is_draining": engine.is_draining,
    }


def _total(context: ServingContext, name: str) -> int:
    labels = {"model_name": context.model_names[0]}
    return int(context.metrics.registry.get_sample_value(f"vllm:{name}_total", labels) or 0)
