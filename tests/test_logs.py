"""The log as JSON: an object a line, whatever is logged and whoever logs it."""

import json
import logging
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from app.logs import JsonFormatter
from tests.api.test_process import KEY, running
from tests.api.wire import PATIENCE_S, post

ROOT = Path(__file__).resolve().parents[1]


def record_of(message: str, *args: object, **extra: object) -> dict[str, object]:
    """What the formatter makes of one record, which must be one printable line."""
    record = logging.LogRecord("some.logger", logging.ERROR, "file", 1, message, args, None)
    record.__dict__.update(extra)
    line = JsonFormatter().format(record)
    assert line.isprintable()
    assert line.isascii()
    return json.loads(line)


def test_record_has_time_level_logger_and_message():
    found = record_of("%d of %s", 3, "x")
    time = datetime.fromisoformat(str(found.pop("time")))
    assert time.utcoffset() == timedelta(0)
    assert found == {"level": "ERROR", "logger": "some.logger", "message": "3 of x"}


def test_request_id_is_a_field_where_it_is_known():
    assert record_of("x", request_id="a-1")["request_id"] == "a-1"


def test_exception_is_one_field():
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        found = record_of("x", exc_info=sys.exc_info())
    assert str(found["exception"]).startswith("Traceback")
    assert str(found["exception"]).endswith("ValueError: first\nsecond")


@pytest.mark.parametrize(
    "text", ['"}\n{"level": "ERROR"}', "\x1b[2J", "\x7f", "\u2028\x85", "\ud800"]
)
def test_text_of_a_client_stays_inside_its_field(text):
    assert record_of("model %s", text)["message"] == f"model {text}"


def test_every_line_of_a_server_process_is_an_object():
    forged = b'%0d%0a{"level": "ERROR", "message": "forged"}'
    with running("debug", 0.5, "json") as (process, wire):
        wire.exchange(b"GET /" + forged.replace(b" ", b"%20") + b" HTTP/1.1\r\nhost: a\r\n"
                      b"connection: close\r\n\r\n")  # fmt: skip
        with wire.connect() as client:
            client.sendall(post(b'{"prompt": "a", "stream": true}', KEY, b"x-request-id: mine"))
            assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_S)
    records = [json.loads(line) for line in log.splitlines()]
    assert {"uvicorn.access", "uvicorn.error"} <= {record["logger"] for record in records}
    assert not [record for record in records if record["level"] == "ERROR"]
    assert [record["message"] for record in records if record.get("request_id") == "mine"]


def test_error_at_the_start_is_a_record_too(tmp_path):
    code = "from app.cli import main; main()"
    arguments = ["serve", str(tmp_path / "nothing"), "--port", "0", "--log-format", "json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False
    )
    (line,) = done.stderr.splitlines()
    assert "no such file or folder" in json.loads(line)["message"]
    assert done.returncode == 1


def test_warnings_and_what_ends_the_process_are_records():
    code = (
        "import warnings; from app.logs import set_up_logging; set_up_logging('info', 'json'); "
        "warnings.warn('beware'); raise ValueError('two\\nlines')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    warning, end = [json.loads(line) for line in done.stderr.splitlines()]
    assert "beware" in warning["message"]
    assert end["exception"].endswith("ValueError: two\nlines")
