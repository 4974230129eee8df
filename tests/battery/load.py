"""A mixed load whose every answer is known before: what D22 and scripts/soak put on a server."""

import json
import random
import socket
import struct
import threading
from collections import Counter

import jsonschema

from tests.battery.client import CHAT, COMPLETIONS, OTHER_KEY, Server, post_bytes, streamed_ids

LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}
NUM_PROMPTS = 8
FORM = {
    "type": "object",
    "properties": {"kind": {"enum": ["llama", "mule"]}, "old": {"type": "boolean"}},
    "required": ["kind", "old"],
    "additionalProperties": False,
}


def leave(server: Server, request: bytes, num_bytes: int) -> None:
    """Send a request, take so much of its answer, and reset the connection."""
    with server.connect() as client:
        client.sendall(request)
        answer = b""
        while num_bytes > 0 and (part := client.recv(min(num_bytes, 4096))):
            num_bytes -= len(part)
            answer += part
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.exchanges.append(answer)


class MixedLoad:
    """Requests by number: what each asks, and what it must be told. Used by many threads."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._seed = seed
        self._lock = threading.Lock()
        self.num_of: Counter[str] = Counter()
        self.greedy = {self._prompt(number): self._alone(number) for number in range(NUM_PROMPTS)}
        self.drawn = {
            self._prompt(number): self._alone(number, temperature=1.5, seed=number)
            for number in range(NUM_PROMPTS)
        }

    def _prompt(self, number: int) -> str:
        return f"soak {number % NUM_PROMPTS}"

    def _alone(self, number: int, **fields: object) -> list[int]:
        return self._server.complete(self._prompt(number), **fields).token_ids

    def one(self, number: int) -> None:
        """Send a request and check its answer. Raises AssertionError."""
        randomness = random.Random(f"{self._seed}/{number}")
        kinds = [self._leaves, self._leaves_whole, self._fails, self._recovers, self._schema]
        kinds += [self._refused, self._streamed, self._whole, self._drawn, self._numbered]
        kind = randomness.choice(kinds)
        kind(number, randomness)
        with self._lock:
            self.num_of[kind.__name__.strip("_")] += 1

    def _leaves(self, number: int, randomness: random.Random) -> None:
        body = {"prompt": self._prompt(number), "stream": True, "n": randomness.choice([1, 3])}
        leave(self._server, post_bytes({**body, **LONG}, COMPLETIONS), randomness.randrange(2000))

    def _leaves_whole(self, number: int, randomness: random.Random) -> None:
        leave(self._server, post_bytes({"prompt": self._prompt(number), **LONG}, COMPLETIONS), 0)

    def _fails(self, number: int, randomness: random.Random) -> None:
        fault = randomness.choice(["raise", "nan"])
        answer = self._server.complete(f"soak {number} fault:{fault} x")
        assert answer.status == 500, answer.body
        answer.check_refusal(500)

    def _recovers(self, number: int, randomness: random.Random) -> None:
        """One step of it breaks: it is served all the same, and says what it says alone."""
        fault = randomness.choice(["once", "prefill", "decode"])
        prompt = f"{self._seed} {number} fault:{fault} x"
        broken, again = (self._server.complete(prompt).token_ids for _ in range(2))
        assert broken == again

    def _schema(self, number: int, randomness: random.Random) -> None:
        response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": FORM}}
        body = {"temperature": 1, "seed": number, "max_tokens": 200}
        answer = self._server.chat(self._prompt(number), response_format=response_format, **body)
        assert answer.status == 200, answer.body
        (choice,) = answer.json["choices"]
        assert choice["finish_reason"] == "stop", choice
        jsonschema.validate(json.loads(choice["message"]["content"]), FORM)

    def _refused(self, number: int, randomness: random.Random) -> None:
        self._server.complete(self._prompt(number), temperature=9).check_refusal(
            param="temperature"
        )

    def _streamed(self, number: int, randomness: random.Random) -> None:
        prompt = self._prompt(number)
        assert streamed_ids(self._server.stream(prompt)) == self.greedy[prompt]

    def _whole(self, number: int, randomness: random.Random) -> None:
        prompt = self._prompt(number)
        answer = self._server.complete(prompt, key=OTHER_KEY)
        assert answer.token_ids == self.greedy[prompt]

    def _drawn(self, number: int, randomness: random.Random) -> None:
        prompt, place = self._prompt(number), number % NUM_PROMPTS
        answer = self._server.complete(prompt, temperature=1.5, seed=place)
        assert answer.token_ids == self.drawn[prompt]

    def _numbered(self, number: int, randomness: random.Random) -> None:
        """A request that is repeated with its idempotency key gets the answer that it had."""
        body = {"messages": [{"role": "user", "content": self._prompt(number)}], "max_tokens": 8}
        headers = {"idempotency-key": f"{self._seed}-{number}"}
        first, again = (self._server.post(CHAT, body, headers=headers) for _ in range(2))
        assert first.status == 200, first.body
        assert again.json == first.json
        assert again.headers["idempotent-replayed"] == "true"
