"""Compiles grammars off the event loop, each once, within limits; hands out constraints.

Owns the vocabulary as llguidance wants it, the thread that compiles and a bounded cache. A bad
grammar costs its own request a 400.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from app.errors import InvalidRequest, Overloaded
from app.text.grammar.build import grammar_of, parser_limits
from app.text.grammar.checker import GrammarChecker
from app.text.grammar.constraint import GrammarConstraint
from app.text.grammar.spec import GrammarSpec
from model.tokenizer import Tokenizer

MAX_CACHED = 128
MAX_WAITING = 64  # compilations under way or queued
MAX_MESSAGE = 300


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """A tokenizer in the form that llguidance reads."""

    tokenizer: Tokenizer
    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: bytes | str) -> list[int]:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return self.tokenizer.encode(decoded, add_special_tokens=False, parse_special=False)


class GrammarCompiler:
    """Turns demands into constraints for one vocabulary. Used on the event loop only."""

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, end_token_ids: Iterable[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = sorted(end_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._checker = GrammarChecker()
        # One thread: compilations never take more than one core from the steps.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._cache: OrderedDict[GrammarSpec, asyncio.Future[LLMatcher | str]] = OrderedDict()
        self._num_waiting = 0

    async def constraints(
        self, spec: GrammarSpec, count: int, *, param: str
    ) -> tuple[GrammarConstraint, ...]:
        """Return constraints for some sequences. Raises InvalidRequest for a bad grammar."""
        if not self._end_token_ids:
            raise InvalidRequest("This model has no end of text to end JSON with.", param=param)
        matcher = await self._matcher(spec)
        if isinstance(matcher, str):
            raise InvalidRequest(f"'{param}' cannot be compiled: {matcher}.", param=param)
        loop = asyncio.get_running_loop()

        def on_failure() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._refuse, spec)

        return tuple(GrammarConstraint(matcher.deep_copy(), on_failure) for _ in range(count))

    def close(self) -> None:
        """End the thread and the process; what is queued is dropped."""
        self._thread.submit(self._checker.close)
        self._thread.shutdown(wait=True)

    async def _matcher(self, spec: GrammarSpec) -> LLMatcher | str:
        """Return the compiled grammar; those who want the same one share one compilation."""
        found = self._cache.get(spec)
        if found is None:
            if self._num_waiting >= MAX_WAITING:
                raise Overloaded("Too many grammars are waiting to be compiled.")
            loop = asyncio.get_running_loop()
            found = loop.run_in_executor(self._thread, self._compile, spec)
            self._num_waiting += 1
            found.add_done_callback(self._count_down)
            self._cache[spec] = found
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(spec)
        return await asyncio.shield(found)

    def _refuse(self, spec: GrammarSpec) -> None:
        """Remember of a grammar that it can't be followed; what it has grown to is let go."""
        refusal: asyncio.Future[LLMatcher | str] = asyncio.get_running_loop().create_future()
        refusal.set_result("it becomes too complex while text is generated")
        if spec in self._cache:
            self._cache[spec] = refusal

    def _count_down(self, _done: "asyncio.Future[LLMatcher | str]") -> None:
        self._num_waiting -= 1

    # In the thread

    def _compile(self, spec: GrammarSpec) -> LLMatcher | str:
        """Return the compiled grammar with its first mask computed, or what is wrong with it."""
        try:
            grammar = grammar_of(spec)
        except (ValueError, RecursionError) as error:
            return _in_short(str(error))
        if fault := self._checker.check(grammar):
            return _in_short(fault)
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        matcher = LLMatcher(self._vocabulary, grammar, limits=parser_limits(), log_level=0)
        trial = matcher.deep_copy()
        trial.compute_bitmask()  # the first is the dearest: not in a step
        return _in_short(trial.get_error()) if trial.is_error() else matcher

    def _make_vocabulary(self) -> LLTokenizer:
        num_known = min(self._vocab_size, self._tokenizer.vocab_size)
        tokens = [self._tokenizer.token_bytes(token_id) for token_id in range(num_known)]
        vocabulary = _Vocabulary(
            tokenizer=self._tokenizer,
            tokens=tokens + [b""] * (self._vocab_size - num_known),
            special_token_ids=[i for i in range(num_known) if self._tokenizer.is_special(i)],
            eos_token_id=self._end_token_ids[0],
        )
        return LLTokenizer(
            TokenizerWrapper(vocabulary), n_vocab=self._vocab_size, eos_token=self._end_token_ids
        )


def _in_short(reason: str) -> str:
    return " ".join(reason.replace("<non-verbose/>", "").split()).rstrip(".")[:MAX_MESSAGE]
