"""Group A, bodies: what is not the JSON, the length or the text that it says it is."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.serving import conversation
from tests.api.serve import client_of, run
from tests.battery.client import CHAT, COMPLETIONS, get_bytes, post_bytes
from tests.fake_engine import FakeEngine, says

URLS = (COMPLETIONS, CHAT, "/tokenize", "/detokenize")
EVERY_URL = pytest.mark.parametrize("url", URLS)
MIB = 1 << 20


@EVERY_URL
def test_a01_what_is_no_json_object_is_refused(live, url):
    bodies = [b"", b" ", b"{", b"}", b"[]", b"null", b"3", b'"x"', b"{'prompt': 1}", b'{"a": 1}}']
    bodies += [b'{"prompt": "a",}', b"\x00", b'{"prompt": "a"} {"prompt": "b"}', b"// x\n{}"]
    for body in bodies:
        error = live.post(url, body).check_refusal()
        assert error["type"] == "invalid_request_error"


@EVERY_URL
def test_a02_other_content_types_are_refused(live, url):
    kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
    for kind in [*kinds, "application/xml", "application/jsonp", "x" * 1000, "", ";"]:
        live.post(url, b'{"prompt": "a"}', headers={"content-type": kind}).check_refusal((400, 415))


def test_a02_json_with_a_charset_is_taken(live):
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"):
        body = b'{"prompt": "a", "max_tokens": 1}'
        assert live.post(COMPLETIONS, body, headers={"content-type": kind}).status == 200


BOMBS = {
    "prompt 250 KB": {"prompt": [[1]] * 40_000 + ["x"]},
    "prompt 1 MB": {"prompt": [[1]] * 200_000 + ["x"]},
    "ids": {"prompt": [1] * 300_000 + ["x"]},
    "messages": {"messages": [5] * 400_000},
    "messages of nothing": {"messages": [{"role": "user"}] * 50_000},
    "parts": {"messages": [{"role": "user", "content": [{"type": "x"}] * 60_000}]},
    "bias": {"prompt": "a", "logit_bias": {str(number): "x" for number in range(80_000)}},
    "tools": {"messages": [{"role": "user", "content": "a"}], "tools": [{}] * 300_000},
    "stop": {"prompt": "a", "stop": [1] * 400_000},
    "bad words": {"prompt": "a", "bad_words": [1] * 400_000},
    "schema": {"prompt": "a", "guided_json": {"enum": [{}] * 300_000}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a14_validation_bomb_is_one_short_error_and_probes_are_answered_meanwhile(live, name):
    bomb = json.dumps(BOMBS[name]).encode()
    url = COMPLETIONS if "prompt" in BOMBS[name] else CHAT
    with ThreadPoolExecutor(4) as pool:
        refusals = [pool.submit(live.post, url, bomb) for _ in range(4)]
        num_probes = 0
        while not all(refusal.done() for refusal in refusals):
            assert live.get("/health", key=None).status == 200
            num_probes += not all(refusal.done() for refusal in refusals)
    assert num_probes > 0  # came and went while the bombs were in work
    for refusal in refusals:
        refusal.result().check_refusal()


def test_a15_body_under_the_cap_is_read_and_refused_by_its_length(live):
    error = live.complete("a" * (2 * MIB - 1000)).check_refusal(param="prompt")
    assert error["code"] == "context_length_exceeded"


def head_of(*headers: str) -> bytes:
    """The head of a POST without the length that its body has."""
    return post_bytes(b"", COMPLETIONS, *headers).replace(b"content-length: 0\r\n", b"")


def test_a15_body_over_the_cap_is_refused_by_its_length_before_it_comes(live):
    for length in (100 * MIB, 2**63, 10**19):
        with live.connect() as client:
            client.sendall(head_of(f"content-length: {length}"))
            answer = live.read_all(client)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"code":"payload_too_large"' in answer


def test_a15_endless_body_is_cut_at_the_cap(live):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    before = live.vitals().resident
    answer = live.exchange(head_of("transfer-encoding: chunked"), *[chunk] * 1600)  # 100 MB
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert live.vitals().resident < before + 16 * MIB


def test_a15_length_that_lies_ends_the_connection(live):
    body = b'{"prompt": "a", "max_tokens": 1}'
    short = live.exchange(head_of(f"content-length: {len(body) + 9}") + body)
    assert short.startswith(b"HTTP/1.1 408 ")
    long = live.exchange(head_of(f"content-length: {len(body) - 9}") + body)
    assert long.startswith(b"HTTP/1.1 400 ")
    assert long.count(b"HTTP/1.1 ") == 1


@EVERY_URL
def test_a17_deep_and_wide_bodies_are_refused(live, url):
    for body in (
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": ' + b"[" * 50_000,
    ):
        live.post(url, body).check_refusal()


def test_a17_ten_thousand_keys_and_duplicates_are_harmless(live):
    wide = {f"key{number}": number for number in range(10_000)}
    assert live.complete("a", **wide).status == 200
    body = b'{"prompt": "a", "max_tokens": 1, "n": 1, "n": 500}'
    live.post(COMPLETIONS, body).check_refusal(param="n")  # the last one counts
    body = b'{"prompt": "a", "max_tokens": 1, "n": 500, "n": 1}'
    assert live.post(COMPLETIONS, body).status == 200


STRINGS = {
    COMPLETIONS: [
        '{"prompt": %s}',
        '{"prompt": ["a", %s]}',
        '{"prompt": "a", "model": %s}',
        '{"prompt": "a", "stop": %s}',
        '{"prompt": "a", "stop": ["a", %s]}',
        '{"prompt": "a", "bad_words": [%s]}',
        '{"prompt": "a", "cache_salt": %s}',
        '{"prompt": "a", "user": %s}',
        '{"prompt": "a", "logit_bias": {%s: 1}}',
        '{"prompt": "a", "guided_regex": %s}',
        '{"prompt": "a", "guided_choice": [%s]}',
        '{"prompt": "a", "guided_grammar": %s}',
        '{"prompt": "a", "structured_outputs": {"json": {"const": %s}}}',
        '{"prompt": "a", "structured_outputs": {"json": {"properties": {%s: {}}}}}',
        '{"prompt": "a", "structured_outputs": {"regex": "a", "whitespace_pattern": %s}}',
        '{"prompt": "a", %s: 1}',
    ],
    CHAT: [
        '{"messages": [{"role": "user", "content": %s}]}',
        '{"messages": [{"role": %s, "content": "a"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": %s}]}]}',
        '{"messages": [{"role": "user", "content": "a", "name": %s}]}',
        '{"messages": [{"role": "user", "content": "a", %s: 1}]}',
        '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": %s}}',
        '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {%s: 1}}',
        '{"messages": [{"role": "user", "content": "a"}], "tool_choice": %s}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function",'
        ' "function": {"name": %s}}]}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function",'
        ' "function": {"name": "f", "description": %s}}]}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function",'
        ' "function": {"name": "f", "parameters": {"properties": {%s: {}}}}}]}',
        '{"messages": [{"role": "assistant", "tool_calls": [{"type": "function",'
        ' "function": {"name": "f", "arguments": %s}}]}]}',
        '{"messages": [{"role": "user", "content": "a"}], "response_format": {"type":'
        ' "json_schema", "json_schema": {"name": %s, "schema": {}}}}',
    ],
    "/tokenize": ['{"prompt": %s}', '{"messages": [{"role": "user", "content": %s}]}'],
    "/detokenize": ['{"tokens": [1], "model": %s}'],
}
BAD_STRINGS = {
    "high surrogate": b'"a\\ud800"',
    "low surrogate": b'"\\udfffa"',
    "surrogates in the wrong order": b'"\\udc00\\ud800"',
    "surrogate in utf-8": b'"\xed\xa0\x80"',
    "latin-1": b'"\xff"',
    "half a character": b'"\xe2\x82"',
    "overlong": b'"\xc0\xaf"',
    "beyond unicode": b'"\xf4\x90\x80\x80"',
    "raw line break": b'"a\nb"',
}


@EVERY_URL
@pytest.mark.parametrize("name", BAD_STRINGS)
def test_a18_text_that_is_not_unicode_is_refused_in_every_field(live, url, name):
    for form in STRINGS[url]:
        live.post(url, form.encode().replace(b"%s", BAD_STRINGS[name])).check_refusal()


@EVERY_URL
def test_a18_other_encodings_are_refused(live, url):
    text = '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}'
    if url != CHAT:
        text = '{"prompt": "a", "tokens": [1], "max_tokens": 1}'
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-7", "utf-8-sig"):
        body = text.encode(encoding) if encoding != "utf-7" else b"+AHs-"
        live.post(url, body).check_refusal()
    assert live.post(url, text.encode()).status == 200


ODD_TEXTS = {
    "null bytes": "a\x00b\x00",
    "controls": "\x01\x1b[2J\x7f\x85",
    "right to left": "\u202eabc\u2066x",
    "joiners": "a\u200d\u200cb\ufeff",
    "combining": "e" + "\u0301" * 200,
    "astral": "\U0010ffff\U000e0001\ue000\uf8ff",
    "line breaks": "a\u2028b\u2029c\r\n",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_a19_odd_text_is_served_and_comes_back_as_it_was(live, name):
    text = ODD_TEXTS[name]
    tokens = live.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]
    assert live.post("/detokenize", {"tokens": tokens}).json["prompt"] == text
    assert live.complete(text, user=text, max_tokens=2).status == 200
    assert live.chat(text).status == 200
    live.complete("a", model=text[:100]).check_refusal(404)


def test_a19_combining_marks_by_the_hundred_thousand_are_refused(live):
    live.complete("e" + "\u0301" * 300_000).check_refusal(param="prompt")
    live.chat("e" + "\u0301" * 300_000).check_refusal(param="messages")


def test_a19_no_character_of_a_request_moves_the_cursor_of_who_reads_the_log(live):
    for text in ODD_TEXTS.values():
        live.complete(text, user=text, seed=None, temperature=1)
    live.exchange(get_bytes("/v1/models", "user-agent: \x1b[2J"))
    lines = live.log_text().split("\n")
    assert len(lines) > len(ODD_TEXTS)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("text", "max_model_len", "is_taken"),
    [
        ("x" * 500_000, 256, False),
        ("x" * 500_000, 16384, True),
        ("\u5b57" * 10_000, 256, True),  # counted as characters, not as what JSON makes of them
    ],
    ids=["refused", "long", "not ascii"],
)
def test_a14_large_tools_are_put_into_the_prompt_beside_the_event_loop(
    monkeypatch, text, max_model_len, is_taken
):
    threads = []

    def note_thread(*_args, **_options):
        threads.append(threading.current_thread())
        return [1]

    monkeypatch.setattr(conversation, "encode_chat", note_thread)
    function = {"name": "f", "description": text}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": function}],
    }

    async def scenario():
        engine = FakeEngine(says("x"), max_model_len=max_model_len)
        async with client_of(engine) as client:
            answer = await client.post(CHAT, json=body)
        if not is_taken:
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")

    run(scenario())
    assert threading.main_thread() not in threads  # refused, or worked on elsewhere
    assert bool(threads) == is_taken
