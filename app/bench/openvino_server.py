"""A thin HTTP server around OpenVINO GenAI's continuous batching, which has none of its own.

Runs in the peer's environment and imports nothing of this project. It answers /health and
/v1/completions with token ids, streamed, with less work a token than a full server has: so it
flatters OpenVINO rather than us. Arguments: model folder, port, capacity of the K/V in tokens.
"""

import asyncio
import itertools
import json
import sys
import threading
from collections.abc import Callable

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Batcher:
    """Owns the pipeline: a thread that steps while anything runs and hands tokens out."""

    def __init__(self, folder: str, capacity_tokens: int, loop: asyncio.AbstractEventLoop) -> None:
        options = genai.SchedulerConfig()
        options.num_kv_blocks = capacity_tokens // 32  # the block of its CPU plugin
        options.max_num_seqs = 32
        options.max_num_batched_tokens = 512
        options.dynamic_split_fuse = True
        options.enable_prefix_caching = False
        self._pipeline = genai.ContinuousBatchingPipeline(folder, options, "CPU")
        self._loop = loop
        self._numbers = itertools.count()
        self._running: dict[int, tuple[object, Callable[[int | None], None]]] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._step_forever, daemon=True).start()

    def submit(self, ids: list[int], num_output: int) -> "asyncio.Queue[int | None]":
        """Start a request; its queue gets a number of new tokens a step, then None."""
        queue: asyncio.Queue[int | None] = asyncio.Queue()
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_output
        config.ignore_eos = True
        config.do_sample = False

        def put(item: int | None) -> None:
            self._loop.call_soon_threadsafe(queue.put_nowait, item)

        tensor = ov.Tensor(np.array([ids], np.int64))
        with self._changed:
            number = next(self._numbers)
            handle = self._pipeline.add_request(number, tensor, config)
            self._running[number] = (handle, put)
            self._changed.notify()
        return queue

    def _step_forever(self) -> None:
        while True:
            with self._changed:
                while not self._running:
                    self._changed.wait()
            # Not under the lock: new requests must be able to join while a step runs.
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            with self._changed:
                for number, (handle, put) in list(self._running.items()):
                    self._hand_out(number, handle, put)

    def _hand_out(self, number: int, handle: object, put: Callable[[int | None], None]) -> None:
        while handle.can_read():  # type: ignore[attr-defined]
            for output in handle.read().values():  # type: ignore[attr-defined]
                put(len(output.generated_ids))
        if handle.get_status() != genai.GenerationStatus.RUNNING:  # type: ignore[attr-defined]
            del self._running[number]
            put(None)


async def _serve(
    batcher: Batcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    method, path, _ = head.split(" ", 2)
    length = 0
    for line in head.lower().split("\r\n"):
        if line.startswith("content-length:"):
            length = int(line.split(":")[1])
    writer.write(_HEAD)
    if method == "POST" and path == "/v1/completions":
        body = json.loads(await reader.readexactly(length))
        queue = batcher.submit(body["prompt"], body["max_tokens"])
        num_done = 0
        while (num_new := await queue.get()) is not None:
            num_done += num_new
            writer.write(b'data: {"choices": [{"text": "token"}]}\n\n')
            await writer.drain()
        writer.write(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % num_done)
        writer.write(b"data: [DONE]\n\n")
    await writer.drain()
    writer.close()


async def _main(folder: str, port: int, capacity_tokens: int) -> None:
    batcher = Batcher(folder, capacity_tokens, asyncio.get_running_loop())

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _serve(batcher, reader, writer)

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
