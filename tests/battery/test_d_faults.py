"""Group D, faults inside: who pays for them, what is said of them, how the process ends."""

import contextlib
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from tests.battery.client import (
    COMPLETIONS,
    Server,
    get_bytes,
    has_hung_up,
    post_bytes,
    running,
    streamed_ids,
)

NEIGHBOURS = [f"neighbour {number} sings to them" for number in range(6)]


def metric(server: Server, name: str) -> float:
    page = server.get("/metrics").body.decode()
    return float(re.search(rf"^\w+:{name}_total\{{.*\}} (.*)$", page, re.MULTILINE)[1])


def run_beside(server: Server, *prompts: str, **fields):
    """Send prompts while neighbours are served, whose tokens must be what they are alone."""
    alone = [server.complete(prompt, max_tokens=60).token_ids for prompt in NEIGHBOURS]
    with ThreadPoolExecutor(16) as pool:
        neighbours = [
            pool.submit(server.stream, prompt, max_tokens=60, cache_prompt=False)
            for prompt in NEIGHBOURS
        ]
        answers = [pool.submit(server.complete, prompt, **fields) for prompt in prompts]
        assert [streamed_ids(neighbour.result()) for neighbour in neighbours] == alone
        return [answer.result() for answer in answers]


def check_engine_error(answer) -> None:
    error = answer.check_refusal(500)
    assert (error["type"], error["code"]) == ("server_error", "engine_error")


def test_d13_request_that_breaks_every_step_ends_alone(live):
    before = metric(live, "isolated_sequences")
    (answer,) = run_beside(live, "x fault:raise x")
    check_engine_error(answer)
    assert metric(live, "isolated_sequences") == before + 1


def test_d13_two_that_break_every_step_end_alone(live):
    for answer in run_beside(live, "x fault:raise x", "y fault:raise y"):
        check_engine_error(answer)


def test_d13_step_that_breaks_once_costs_nobody_anything(live):
    prompt = "x fault:once x"
    before = metric(live, "failed_steps")
    (answer,) = run_beside(live, prompt)
    assert answer.token_ids == live.complete(prompt).token_ids
    assert metric(live, "failed_steps") > before


def test_d13_streamed_request_that_breaks_steps_gets_an_error_event(live):
    events = live.stream("z fault:raise z")
    assert events[-1]["error"]["code"] == "engine_error"
    assert {"done": True} not in events


def test_d13_each_choice_and_prompt_of_a_broken_request_is_told_in_one_error(live):
    check_engine_error(live.complete(["a", "x fault:raise x"], n=3, temperature=1, seed=1))


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_d14_step_out_of_memory_is_tried_again_for_all(live, when):
    prompt = f"x fault:{when} x"
    (answer,) = run_beside(live, prompt)
    assert answer.status == 200, answer.body
    assert answer.token_ids == live.complete(prompt).token_ids


@pytest.mark.parametrize("fields", [{}, {"logprobs": 3}, {"temperature": 1.0, "seed": 1}])
def test_d15_row_whose_logits_are_not_finite_ends_alone(live, fields):
    (answer,) = run_beside(live, "x fault:nan x", **fields)
    check_engine_error(answer)


def test_d15_row_that_ended_for_its_logits_is_counted(live):
    before = metric(live, "isolated_sequences")
    live.complete("w fault:nan w")
    assert metric(live, "isolated_sequences") == before + 1


def exit_code(server: Server) -> int:
    return server.process.wait(30)


def test_d16_step_that_hangs_is_seen_told_and_ends_the_process_with_an_error(start):
    with start(patience_s=0.5) as server, ThreadPoolExecutor(4) as pool:
        reference = server.canary()
        assert reference
        streams = [pool.submit(server.stream, f"s{number}", max_tokens=400) for number in range(2)]
        streams.append(pool.submit(server.stream, "fault:hang"))

        def is_sick() -> bool:
            try:
                return server.get("/health/live", key=None, timeout_s=5).status == 503
            except OSError:
                return True

        server.wait(is_sick)
        assert exit_code(server) == 1
        for stream in streams:
            events = stream.result()
            assert events[-1] == {"done": True} or "error" in events[-1]
        assert "error" in streams[-1].result()[-1]
        log = server.log_text()
    assert "takes far too long" in log
    assert "in _break" in log  # where it hangs, in the stacks
    assert "the step is given up" in log


def test_d17_worker_that_breaks_is_rebuilt_and_streams_go_on(live):
    before = metric(live, "engine_recoveries")
    prompt = "x fault:bug x"
    (answer,) = run_beside(live, prompt)
    assert answer.token_ids == live.complete(prompt).token_ids
    assert metric(live, "engine_recoveries") == before + 1


def test_d17_worker_that_breaks_for_ever_is_given_up_and_the_process_with_it(start):
    with start() as server, ThreadPoolExecutor(8) as pool:
        assert server.canary()
        streams = [pool.submit(server.stream, f"s{number}", max_tokens=400) for number in range(3)]
        last = pool.submit(server.complete, "x fault:bugs x")
        assert exit_code(server) == 1
        last.result().check_refusal((500, 503))
        for stream in streams:
            events = stream.result()
            assert not events or events[-1] == {"done": True} or "error" in events[-1]
        assert "the engine has died" in server.log_text()


def test_d17_lost_device_ends_every_stream_and_the_process_with_an_error(start):
    with start() as server, ThreadPoolExecutor(8) as pool:
        assert server.canary()
        streams = [pool.submit(server.stream, f"s{number}", max_tokens=400) for number in range(3)]
        last = pool.submit(server.complete, "x fault:lost x")
        assert exit_code(server) == 1
        last.result().check_refusal((500, 503))
        for stream in streams:
            events = stream.result()
            assert not events or events[-1] == {"done": True} or "error" in events[-1]


def test_d17_thread_that_ends_without_a_word_ends_streams_and_process(start):
    flags = ("--shutdown-timeout", "0.2")
    with start(flags=flags) as server, ThreadPoolExecutor(8) as pool:
        assert server.canary()
        stream = pool.submit(server.stream, "x fault:die x")
        assert exit_code(server) == 1
        assert [event for event in stream.result() if "error" in event]


def test_d18_tokenizer_that_breaks_costs_its_request_alone(live):
    (answer,) = run_beside(live, "x fault:encode x")
    assert answer.check_refusal(500)["code"] == "internal_error"


@contextlib.contextmanager
def untold(live, token_id: int):
    """An id that the detokenizer breaks on."""
    assert live.complete(f"fault:id={token_id} x", max_tokens=1).status == 200
    yield {"allowed_token_ids": [token_id], "max_tokens": 3}
    assert live.complete("fault:id=-1 x", max_tokens=1).status == 200


def test_d18_detokenizer_that_breaks_costs_its_request_alone(live):
    with untold(live, 319) as fields:
        (answer,) = run_beside(live, "a", **fields)
        assert answer.check_refusal(500)["code"] == "internal_error"


def test_d18_stream_whose_detokenizer_breaks_gets_an_error_event(live):
    with untold(live, 319) as fields:
        events = live.stream("a", **fields)
    assert events[-1]["error"]["code"] == "internal_error"


@pytest.mark.parametrize("leap", ["day+", "day-"])
def test_d19_wall_clock_that_leaps_ends_nothing_early(live, leap):
    prompts = [f"fault:{leap} x", *(f"long {number}" for number in range(4))]
    headers = {"x-request-timeout": "20"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda prompt: live.post(
                    COMPLETIONS, {"prompt": prompt, "max_tokens": 200}, headers=headers
                ),
                prompts,
            )
        )
    assert [answer.status for answer in answers] == [200] * 5
    assert live.get("/health", key=None).status == 200
    assert live.engine()["num_requests_running"] == 0
    now = datetime.now(UTC).timestamp() + (86_400 if leap == "day+" else -86_400)
    assert abs(live.complete("a").json["created"] - now) < 60  # it says what the clock says
    assert live.complete("fault:day0 x", max_tokens=1).status == 200
    assert abs(live.complete("a").json["created"] - datetime.now(UTC).timestamp()) < 60


def test_d11_signal_lets_work_finish_and_sends_others_away(start):
    with (
        start(is_scripted=True, pace_s=0.01) as server,
        ThreadPoolExecutor(4) as pool,
        server.connect() as idle,
    ):
        stream = pool.submit(server.stream, "a", max_tokens=60, ignore_eos=True)
        server.wait(lambda: server.engine()["num_requests_running"] == 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait(lambda: server.get("/health/ready", key=None).status == 503)
        assert server.get("/health/live", key=None).status == 200
        error = server.complete("b").check_refusal(503)
        assert error["code"] == "shutting_down"
        assert len(streamed_ids(stream.result())) == 60
        assert exit_code(server) == 0
        assert has_hung_up(idle)


def test_d11_what_outlasts_the_drain_gets_an_error_event(start):
    flags = ("--shutdown-timeout", "0.5")
    with start(flags=flags, is_scripted=True, pace_s=0.05) as server, ThreadPoolExecutor(4) as pool:
        stream = pool.submit(server.stream, "a", max_tokens=400, ignore_eos=True)
        whole = pool.submit(server.complete, "b", max_tokens=400, ignore_eos=True)
        server.wait(lambda: server.engine()["num_requests_running"] == 2)
        assert server.end() == 0
        assert stream.result()[-1]["error"]["code"] == "shutting_down"
        assert whole.result().check_refusal(503)["code"] == "shutting_down"


def test_d11_second_signal_leaves_at_once_and_leaves_nobody_behind(start):
    flags = ("--shutdown-timeout", "600")
    with start(flags=flags, is_scripted=True, pace_s=0.05) as server:
        server.chat("a", response_format={"type": "json_object"})
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children  # the process that checks grammars
        with server.connect() as client:
            client.sendall(
                post_bytes({"prompt": "a", "max_tokens": 400, "ignore_eos": True}, COMPLETIONS)
            )
            server.wait(lambda: server.engine()["num_requests_running"] == 1)
            server.process.send_signal(signal.SIGTERM)
            server.wait(lambda: server.get("/health/ready", key=None).status == 503)
            assert server.end() == 0
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        assert "Traceback" not in server.log_text()


def test_d12_killed_server_starts_again_on_its_port_and_no_child_outlives_it(
    starter, arguments, tmp_path, toy
):
    files = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    with running(starter, arguments, tmp_path / "first") as first:
        reference = first.canary()
        assert first.chat("a", response_format={"type": "json_object"}).status == 200
        children = psutil.Process(first.process.pid).children(recursive=True)
        with first.connect() as client:
            client.sendall(post_bytes({"prompt": "a", "stream": True}, COMPLETIONS))
            assert first.end(signal.SIGKILL) == -signal.SIGKILL
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        with running(starter, arguments, tmp_path / "second", port=first.port) as second:
            assert second.port == first.port
            assert second.canary() == reference
    assert {path: path.stat().st_mtime_ns for path in toy.rglob("*")} == files


def log_a_lot(server: Server) -> None:
    """Requests that each leave a line in the log, and one with a traceback."""
    for number in range(20):
        assert server.complete(f"a {number}", temperature=1).status == 200
    assert server.complete("x fault:encode x").status == 500
    assert server.complete("x fault:raise x").status == 500
    server.exchange(b"nonsense\r\n\r\n")


@pytest.mark.parametrize("log", [Path("/dev/full"), ""], ids=["full disk", "closed pipe"])
def test_d20_server_goes_on_when_it_cannot_log(start, log):
    with start(log=log) as server:
        reference = server.canary()
        log_a_lot(server)
        assert server.canary() == reference
        assert server.get("/health", key=None).status == 200
        assert server.end() == 0


def test_d20_server_needs_no_place_to_write_to(live):
    """No file of the server is open for writing but its log."""
    log_a_lot(live)
    for file in psutil.Process(live.process.pid).open_files():
        assert file.path == str(live.log) or file.mode == "r", file


def test_d21_server_without_file_descriptors_recovers(start):
    with start(max_files=64) as server, contextlib.ExitStack() as stack:
        reference = server.canary()
        clients = []
        for _ in range(80):
            clients.append(stack.enter_context(server.connect()))
            clients[-1].sendall(get_bytes("/v1/models")[:-2])
        threading.Event().wait(0.2)  # it has tried to accept them by now
        assert server.process.poll() is None
        for client in clients:
            client.close()
        server.wait(lambda: server.complete("a").status == 200)
        assert server.canary() == reference
        assert server.get("/health", key=None).status == 200
        server.wait(lambda: server.vitals().num_files < 50)
        assert server.end() == 0
