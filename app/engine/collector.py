"""What the garbage collector may do in a process that serves."""

import gc

GC_THRESHOLD = 100_000  # objects made and not yet freed before the collector looks at the young


def settle_collector() -> None:
    """Keep the garbage collector off what is there for good, and from looking often.

    A step makes thousands of small objects that die with it; a full collection among a loaded
    tokenizer's and library's objects stops all streams for as long as a step.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 50, 100)
