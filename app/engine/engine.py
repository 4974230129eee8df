"""The in-process engine: the event loop on one side, one worker thread on the other."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Policy knobs of the engine."""

    enable_prefix_caching: bool = True
    max_num_queued_seqs: int = 1024  # waiting sequences beyond which Overloaded is raised
