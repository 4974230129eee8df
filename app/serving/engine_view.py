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
        "prompt_tokens": context.metrics.num_prompt_tokens,
        "generation_tokens": context.metrics.num_generation_tokens,
        "block_size": limits.block_size,
        "max_num_seqs": limits.max_num_seqs,
        "is_draining": engine.is_draining,
    }
