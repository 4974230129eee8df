"""Group D, load: clients that leave, stall and flood; a pool and a cache that are fought over."""

import asyncio
import contextlib
import itertools
import random
import re
import select
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from app.engine.blocks import BlockHasher
from tests.battery.client import (
    COMPLETIONS,
    HEALTH_BYTES,
    OTHER_KEY,
    PATIENCE_S,
    Server,
    Vitals,
    answer_of,
    post_bytes,
    streamed_ids,
)
from tests.battery.load import LONG, MixedLoad, leave
from tests.engine.drive import Driver, make_limits

STORY = "the muleteer drives a train of pack llamas over the mountain and sings to them. " * 3


def test_d01_clients_that_leave_streams_at_any_moment_leave_nothing_behind(live, full):
    """Before the headers, after them, at the first token, in mid stream, near and at the end."""
    stream = {"prompt": STORY, "stream": True, **LONG}
    short = {"prompt": "a", "stream": True, "max_tokens": 3}
    moments = [
        (stream, 0),
        (stream, 1),
        (stream, 400),
        (stream, 5000),
        (short, 900),
        (short, 10**6),
    ]
    moments += [({**stream, "prompt": [5] * 100, "n": 8}, size) for size in (0, 300, 9000)]
    requests = [(post_bytes(body, COMPLETIONS), size) for body, size in moments]
    with ThreadPoolExecutor(16) as pool:
        leaving = [
            pool.submit(leave, live, *requests[number % len(requests)])
            for number in range(1000 if full else 90)
        ]
        witness = pool.submit(live.stream, "witness", max_tokens=100, ignore_eos=True)
        assert len(streamed_ids(witness.result())) == 100
        for each in leaving:
            each.result()
    live.wait(live.is_idle)


def num_ended(server: Server) -> Counter[str]:
    """How many choices have ended, by reason."""
    page = server.get("/metrics").body.decode()
    pattern = r'^vllm:request_success_total\{.*finished_reason="(\w+)".*\} (.*)$'
    return Counter({name: int(float(n)) for name, n in re.findall(pattern, page, re.MULTILINE)})


def test_d02_clients_that_leave_before_a_whole_answer_are_aborted_too(live, full):
    """Every choice of them, before its end; in how few steps: test_d_leaving.py.

    On a busy machine a client may see too late that its request runs: then it has been answered.
    """
    request = post_bytes({"prompt": "a", "n": 16, **LONG}, COMPLETIONS)
    before = num_ended(live)
    count = 200 if full else 15
    num_left = num_answered = 0
    while num_left < count:
        with live.connect() as client:
            client.sendall(request)
            live.wait(lambda: live.engine()["num_requests_running"] > 0)
            if select.select([client], [], [], 0)[0]:
                num_answered += 1
            else:
                num_left += 1
            client.shutdown(socket.SHUT_WR)
        live.wait(live.is_idle)
        assert num_answered <= count
    assert num_ended(live) - before == Counter(abort=16 * num_left, length=16 * num_answered)


def test_d03_readers_that_stall_are_ended_by_limit_and_hold_up_nobody(live, full):
    """A few ask for more than all buffers on the way hold, the others for less."""
    body = {"prompt": "a", "stream": True, "logprobs": 20, **LONG}
    wide, narrow = (post_bytes({**body, "n": n}, COMPLETIONS) for n in (16, 1))
    with contextlib.ExitStack() as stack:
        stalled = []
        for number in range(50 if full else 8):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(PATIENCE_S)
            client.connect(live.address)
            client.sendall(wide if number < 2 else narrow)
            stalled.append(client)
        ports = {client.getsockname()[1] for client in stalled}
        alone = live.complete("witness", key=OTHER_KEY, **LONG).token_ids
        assert len(alone) == 400
        assert live.complete("witness", key=OTHER_KEY, **LONG).token_ids == alone
        live.wait(live.is_idle, 120)  # the engine has not waited for them
        live.wait(lambda: not ports & live.peers())  # the limit: --body-timeout
        for client in stalled[:2]:
            assert b"[DONE]" not in live.read_all(client)


def test_d04_flood_is_bounded_and_every_request_is_answered(live, full):
    count = 2000 if full else 300
    body = {"prompt": "a", "max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
    request = post_bytes({**body, "temperature": 0}, COMPLETIONS)

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(*live.address)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    async def probe() -> bytes:
        reader, writer = await asyncio.open_connection(*live.address)
        writer.write(HEALTH_BYTES.replace(b"/health", b"/health/live"))
        answer = await reader.read()
        writer.close()
        return answer

    async def flood() -> tuple[list[bytes], list[bytes]]:
        asked = [asyncio.ensure_future(ask()) for _ in range(count)]
        probes = []
        while not all(each.done() for each in asked):
            probes.append(await probe())
            await asyncio.sleep(0)
        return [await each for each in asked], probes

    before = live.engine()
    answers, probes = asyncio.run(flood())
    live.exchanges += answers
    assert len(answers) == count
    refused = [answer for answer in map(answer_of, answers) if answer.status != 200]
    assert refused  # more than may wait
    for answer in refused:
        assert answer.check_refusal((429, 503))["code"] == "overloaded"
        milliseconds = int(answer.headers["retry-after-ms"])
        assert 1000 <= milliseconds <= 60_000
        assert int(answer.headers["retry-after"]) == -(-milliseconds // 1000)
        assert answer.headers["x-should-retry"] == "true"
    served = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200 ")]
    assert len(served) + len(refused) == count
    assert len(served) >= 128
    assert (
        len({answer.partition(b'"choices"')[2].partition(b'"usage"')[0] for answer in served}) == 1
    )
    after = live.engine()  # those that were refused were counted, and cost no token
    assert after["num_refused_seqs"] - before["num_refused_seqs"] == len(refused)
    assert after["generation_tokens"] - before["generation_tokens"] == 16 * len(served)
    assert len(probes) > 1
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in probes)


def test_d05_same_request_id_at_once_is_no_cross_talk(live):
    prompts = [f"request {number}" for number in range(16)]
    alone = [live.complete(prompt).token_ids for prompt in prompts]
    headers = {"x-request-id": "the-same"}

    def ask(prompt: str):
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        return live.post(COMPLETIONS, body, headers=headers)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, prompts))
    assert [answer.token_ids for answer in answers] == alone
    assert {answer.headers["x-request-id"] for answer in answers} == {"the-same"}
    assert len({answer.json["id"] for answer in answers}) == 16


def test_d06_streams_at_once_say_what_they_say_alone(live):
    prompts = [f"{STORY[:50]} secret {number * 7919}" for number in range(64)]
    alone = [
        live.complete(prompt, max_tokens=16, cache_prompt=False).token_ids for prompt in prompts
    ]
    assert len({tuple(ids) for ids in alone}) > 60  # each has its own to tell
    with ThreadPoolExecutor(64) as pool:
        for _ in range(2):  # the second time out of blocks that others had
            streams = [pool.submit(live.stream, prompt, max_tokens=16) for prompt in prompts]
            assert [streamed_ids(stream.result()) for stream in streams] == alone


def test_d07_demand_of_five_pools_ends_right_by_preemption(live):
    view = live.engine()
    capacity = view["num_blocks"] * view["block_size"]
    prompts = [[10 + number, 20, 30] for number in range(-(-5 * capacity // 400))]
    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = [pool.submit(live.stream, prompt, **LONG) for prompt in prompts]
        events = [stream.result() for stream in streams]
    crowded = [streamed_ids(each) for each in events]
    assert live.engine()["num_preemptions"] > view["num_preemptions"]
    with ThreadPoolExecutor(3) as pool:  # as many as the pool holds
        alone = list(pool.map(lambda prompt: live.complete(prompt, **LONG).token_ids, prompts))
    assert crowded == alone


def test_d08_request_larger_than_the_pool_is_refused_at_once(start):
    with start(is_scripted=True, num_blocks=8) as server:  # 128 tokens of a context of 512
        for prompt, length in ((list(range(10, 110)), 100), ("a", 200), ([5] * 200, 1)):
            error = server.complete(prompt, max_tokens=length).check_refusal()
            assert error["code"] == "context_length_exceeded"
        fitting = server.complete([5] * 100, max_tokens=28, ignore_eos=True)
        assert len(fitting.token_ids) == 28


def test_d09_colliding_hashes_share_no_block(monkeypatch):
    """Every key is the same; the runner notices any block that is read for another's."""
    monkeypatch.setattr(BlockHasher, "key", lambda self, parent, token_ids: b"the same key")
    monkeypatch.setattr(BlockHasher, "root", lambda self, adapter, salt: b"root" + salt.encode())
    driver = Driver(make_limits())
    alone = Driver(make_limits(), enable_prefix_caching=False)
    randomness = random.Random(0)
    for number in range(60):
        prompt = [randomness.randrange(4) for _ in range(randomness.randrange(4, 30))]
        for each in (driver, alone):
            each.submit(f"r{number}", prompt)
        driver.round()
    driver.run()
    alone.run()
    for number in range(60):
        assert driver.tokens(f"r{number}") == alone.tokens(f"r{number}")


def cached(answer) -> int:
    return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_d10_nothing_is_shared_across_salts(live):
    fields = {"max_tokens": 1}
    prompt = f"salted {STORY}"
    assert cached(live.complete(prompt, cache_salt="a", **fields)) == 0
    assert cached(live.complete(prompt, cache_salt="a", **fields)) > 0
    for salt in ("b", "A", "a ", "a\u0000", "aa"):
        assert cached(live.complete(prompt, cache_salt=salt, **fields)) == 0
    assert cached(live.complete(prompt, **fields)) == 0
    assert cached(live.complete(prompt, key=OTHER_KEY, cache_salt="a b", **fields)) == 0
    probe = live.post(f"{COMPLETIONS}?dry_run=1", {"prompt": prompt, "cache_salt": "c"})
    assert probe.status == 200
    assert b'"expected_cached_tokens":0,' in probe.body


def test_d22_mixed_load_with_aborts_and_faults_leaves_memory_flat(live, full):
    """Rounds of all kinds at once; what a round leaves behind must not grow. See scripts/soak."""
    load = MixedLoad(live, seed=22)
    numbers = itertools.count()

    def round_of(count: int) -> Vitals:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(load.one, itertools.islice(numbers, count)))
        live.wait(live.is_idle)  # and all blocks are free
        live.check_nothing_leaked()
        live.exchanges.clear()  # they have been looked at, and are many
        return live.vitals_at_rest()

    count = 5000 if full else 120
    first, second, third = (round_of(count) for _ in range(3))
    assert len(load.num_of) == 10
    assert sum(load.num_of.values()) == 3 * count
    assert third.resident < second.resident + (16 << 20)
    assert third.num_threads <= first.num_threads
    assert third.num_files <= first.num_files
