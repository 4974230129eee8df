"""An engine and a tokenizer without tensors: the HTTP service is tested against their behaviour."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from app.engine.client import EngineRequest, EngineStats, SequenceOutput
from app.engine.measures import EngineMeasures
from app.errors import Draining, Overloaded
from app.serving.context import ServingContext
from app.serving.metrics import RequestMetrics
from app.text.chat_template import ChatTemplate
from app.text.grammar.compiler import GrammarCompiler
from model.config import GenerationDefaults
from model.step import RunnerLimits, SamplingParams, TokenLogprobs

EOS = 257
VOCAB = 260
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
Script = Callable[[EngineRequest, SamplingParams], Sequence[int]]


class ByteTokenizer:
    """Bytes are their own ids; four control tokens follow."""

    vocab_size = VOCAB
    bos_token_id = 256
    eos_token_ids = (EOS,)
    chat_template = TEMPLATE
    special_token_texts = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012
    added_tokens = {"<s>": 256, "</s>": 257, "<|start|>": 258, "<|end|>": 259}  # noqa: RUF012

    def encode(
        self, text: str, *, add_special_tokens: bool, parse_special: bool = True
    ) -> list[int]:
        ids = [256] if add_special_tokens else []
        return ids + self.encode_segments([(text, parse_special)])

    def encode_segments(self, segments: list[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        for text, parse_special in segments:
            while text:
                found = next((t for t in self.added_tokens if text.startswith(t)), None)
                if found and parse_special:
                    ids.append(self.added_tokens[found])
                    text = text[len(found) :]
                else:
                    ids.extend(text[0].encode())
                    text = text[1:]
        return ids

    def whole_text(self, token_id: int) -> str | None:
        try:
            return self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return None

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return next(t for t, i in self.added_tokens.items() if i == token_id).encode()

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256


class FakeStream:
    """Gives out a script token by token, `merged` at a time, waiting for the engine's gate."""

    def __init__(self, engine: "FakeEngine", request: EngineRequest) -> None:
        self._engine = engine
        self._request = request
        self.was_aborted = asyncio.Event()
        self.finished: set[int] = set()
        self._is_over = False
        for index in range(len(request.sampling)):
            request.timeline.note("queued", index)
            request.timeline.note("admitted", index, 4)

    def finish(self, index: int) -> None:
        self.finished.add(index)

    def abort(self) -> None:
        if not self._is_over:
            self.was_aborted.set()

    async def __aiter__(self) -> AsyncIterator[Sequence[SequenceOutput]]:
        for index, sampling in enumerate(self._request.sampling):
            script = list(self._engine.script(self._request, sampling))[: sampling.max_tokens]
            place = 0
            while True:
                await self._wait()
                if self.was_aborted.is_set():
                    yield [SequenceOutput(index=index, finish_reason="abort")]
                    return
                if self._engine.error is not None:
                    self._is_over = True
                    error = self._engine.error
                    yield [SequenceOutput(index=index, finish_reason="error", error=error)]
                    return
                ids = script[place : place + self._engine.merged]
                place += len(ids)
                stop = next((i for i in ids if i in sampling.stop_token_ids), None)
                if stop is not None:
                    ids = ids[: ids.index(stop) + 1]
                reason = "stop" if stop is not None or index in self.finished else None
                if reason is None and place >= len(script):
                    reason = "length"
                if reason and index == len(self._request.sampling) - 1:
                    self._is_over = True
                yield [self._output(index, sampling, ids, reason, stop, place == len(ids))]
                if reason:
                    break

    async def _wait(self) -> None:
        """Wait for the gate, or for the end of it all."""
        waits = [asyncio.ensure_future(e.wait()) for e in (self._engine.gate, self.was_aborted)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()
        await asyncio.sleep(0)

    def _output(self, index, sampling, ids, reason, stop, is_first) -> SequenceOutput:
        prompt = self._request.prompt_token_ids
        if is_first:
            self._request.timeline.note("first_token", index)
        if reason:
            self._request.timeline.note("done", index, reason=reason)
        wants_prompt = is_first and sampling.prompt_logprobs is not None
        return SequenceOutput(
            index=index,
            token_ids=tuple(ids),
            logprobs=tuple(_entry(i) for i in ids) if sampling.logprobs is not None else (),
            prompt_logprobs=tuple(_entry(i) for i in prompt[1:]) if wants_prompt else (),
            num_cached_tokens=4,
            finish_reason=reason,
            stop_token_id=stop,
        )


def _entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=token_id,
        logprob=-0.5,
        rank=1,
        top_ids=(token_id, 65),
        top_logprobs=(-0.5, -1.5),
    )


class FakeEngine:
    """EngineClient that says what its script says; records what it was asked."""

    def __init__(self, script: Script, *, merged: int = 1, max_model_len: int = 256) -> None:
        self.script = script
        self.merged = merged
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: str | None = None
        self.is_full = False
        self.requests: list[EngineRequest] = []
        self.streams: list[FakeStream] = []
        self.is_alive = True
        self.is_draining = False
        self.age_s = 0.0
        self.measures = EngineMeasures()
        self.limits = RunnerLimits(
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=max_model_len,
            block_size=16,
            num_blocks=64,
            vocab_size=VOCAB,
        )

    def start(self) -> None:
        self.is_alive = True

    async def shutdown(self) -> None:
        self.is_alive = False

    def check_room(self) -> None:
        if self.is_draining:
            raise Draining("the server is shutting down")
        if self.is_full:
            raise Overloaded("Too many requests are waiting.")

    def submit(self, request: EngineRequest) -> FakeStream:
        self.check_room()
        self.requests.append(request)
        self.streams.append(FakeStream(self, request))
        return self.streams[-1]

    async def count_cached(self, token_ids: Sequence[int], cache_salt: str) -> int:
        return len(token_ids) // 16 * 16 if not cache_salt else 0

    def stats(self) -> EngineStats:
        return EngineStats(num_blocks=64, num_free_blocks=48, num_requests_running=1)

    @property
    def stuck_for(self) -> float:
        return self.age_s / 30

    def give_up(self, error: str) -> None:
        self.error, self.is_alive = error, False

    def heartbeat_age_s(self) -> float:
        return self.age_s

    async def drain(self, timeout_s: float) -> None:
        self.is_draining = True


def says(text: str) -> Script:
    """Answer every request with a text and the end of text."""
    return lambda request, sampling: [*text.encode(), EOS]


def make_context(
    engine: FakeEngine,
    *,
    has_template: bool = True,
    think_tags: tuple[str, str] | None = None,
) -> ServingContext:
    tokenizer = ByteTokenizer()
    template = ChatTemplate(
        TEMPLATE,
        special_tokens=tokenizer.special_token_texts,
        added_tokens=tokenizer.added_tokens,
    )
    return ServingContext(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=template if has_template else None,
        model_names=("fake", "other-name"),
        max_model_len=engine.limits.max_model_len,
        vocab_size=VOCAB,
        defaults=GenerationDefaults(),
        eos_token_ids=frozenset({EOS}),
        system_fingerprint="fp_fake",
        precision="float32, float32 K/V, torch",
        metrics=RequestMetrics("fake", engine),
        grammars=GrammarCompiler(tokenizer, vocab_size=VOCAB, end_token_ids={EOS}),
        tool_format="hermes",
        think_tags=think_tags,
    )
