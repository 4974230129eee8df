"""GET /v1/requests/{id}: what became of the last requests, event by event.

Holds no text. Bounded: the oldest are forgotten. Only the key that made a request is told of it.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from app.engine.timeline import Timeline, TimelineEvent
from app.errors import NotFound
from app.serving.answer import JsonObject

MAX_RECORDS = 1024


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request of a user: a timeline a prompt. `arrival_s` is on the monotonic clock."""

    request_id: str  # x-request-id
    answer_id: str  # what the answer's own id ends with; no two are alike
    tenant: str
    arrival_s: float
    created_s: float = field(default_factory=time.time)
    num_choices: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    timelines: list[Timeline] = field(default_factory=list)
    is_over: bool = False  # answered, in one way or another

    def events(self) -> list[tuple[int, TimelineEvent]]:
        """Return all events, each behind its prompt's number, in the order of time."""
        events = [
            (prompt, event)
            for prompt, timeline in enumerate(self.timelines)
            for event in timeline.events
        ]
        return sorted(events, key=lambda each: each[1].at_s)  # those of one moment stay in order

    @property
    def status(self) -> str:
        """Return how far it has come: queued, running, parked (its client may return) or done."""
        last = {(prompt, event.choice): event for prompt, event in self.events()}
        names = {event.name for event in last.values()}
        if self.is_over:
            return "done"
        if len(last) == self.num_choices and names == {"done"}:
            return "parked" if any(event.reason == "abort" for event in last.values()) else "done"
        return "running" if names - {"queued"} else "queued"


class RequestLog:
    """The last requests, found by x-request-id or by the answer's id. Event loop only."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self._max_records = max_records
        self._of_answer: OrderedDict[str, RequestRecord] = OrderedDict()
        self._of_name: dict[tuple[str, str], RequestRecord] = {}  # the last of it

    def add(self, record: RequestRecord) -> None:
        """Remember a request, and forget the oldest if there are too many."""
        self._of_answer[record.answer_id] = record
        self._of_name[record.tenant, record.request_id] = record
        if len(self._of_answer) <= self._max_records:
            return
        _, oldest = self._of_answer.popitem(last=False)
        name = (oldest.tenant, oldest.request_id)
        if self._of_name.get(name) is oldest:
            del self._of_name[name]

    def find(self, tenant: str, request_id: str) -> RequestRecord:
        """Return a tenant's request. Raises NotFound, whether it is another's or nobody's."""
        record = self._of_name.get((tenant, request_id))
        if record is None:
            prefix, _, rest = request_id.partition("-")
            known = self._of_answer.get(rest if prefix in ("cmpl", "chatcmpl") else request_id)
            record = known if known is not None and known.tenant == tenant else None
        if record is None:
            raise NotFound("No such request, or it was too long ago.", param="id")
        return record


def request_view(record: RequestRecord) -> JsonObject:
    """Return a request's events in order, in seconds from its arrival."""
    return {
        "object": "request",
        "id": record.request_id,
        "created": record.created_s,
        "status": record.status,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "completion_tokens": record.num_completion_tokens,
        "events": [
            {
                "event": event.name,
                "seconds": round(event.at_s - record.arrival_s, 6),
                "prompt": prompt,
                "choice": event.choice,
                "tokens": event.num_tokens if event.name in ("admitted", "prefill") else None,
                "reason": event.reason,
            }
            for prompt, event in record.events()
        ],
        "dropped_events": sum(timeline.num_dropped for timeline in record.timelines),
    }
