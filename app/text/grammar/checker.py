"""Compiles a stranger's grammar in a process of its own before this one does.

A compiler of grammars is recursive native code: what overflows its stack, takes seconds or takes
gigabytes does so there. Blocking; used by one thread.
"""

import json
import select
import subprocess
import sys
from typing import IO

TIME_LIMIT_S = 4.0
MEMORY_LIMIT = 2 << 30
CPU_LIMIT_S = 600  # of one process over all its grammars; then it is replaced
MAX_CHECKS = 1000  # likewise


class GrammarChecker:
    """Owns the process: started when first needed, replaced when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._num_checks = 0

    def check(self, grammar: str) -> str:
        """Return what is wrong with a grammar in llguidance's text form, or nothing."""
        if self._process is None or self._num_checks >= MAX_CHECKS:
            self.close()
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self._num_checks += 1
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return "the compiler could not be started"
        answer = _read_line(process.stdout)
        if answer is None:
            self.close()
            return "it is too complex"
        return str(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self._num_checks = 0
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM, str(MEMORY_LIMIT), str(CPU_LIMIT_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )


def _read_line(pipe: IO[bytes]) -> bytes | None:
    """Return a line; None when none comes in time or the process has died."""
    ready, _, _ = select.select([pipe], [], [], TIME_LIMIT_S)
    return (pipe.readline() or None) if ready else None


# It needs llguidance alone, so it is up in a tenth of a second. Its stack is half of what the
# threads of the server have: what passes here passes there.
_PROGRAM = """
import json, resource, sys, threading
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]),) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([i]) for i in range(256)] + [b"</s>"]
    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())

def serve():
    vocabulary = LLTokenizer(TokenizerWrapper(Bytes()))
    limits = LLParserLimits(
        max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False
    )
    for line in sys.stdin:
        matcher = LLMatcher(vocabulary, json.loads(line), limits=limits, log_level=0)
        error = matcher.get_error()
        if not error:
            matcher.compute_bitmask()
            if matcher.is_stopped() and not matcher.is_accepting():
                error = "it matches nothing"
        print(json.dumps(error), flush=True)

threading.stack_size(4 << 20)
thread = threading.Thread(target=serve)
thread.start()
thread.join()
"""
