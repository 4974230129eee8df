"""The whole OpenAPI document against the live server: what schemathesis makes of it, good and bad.

No operation, mode or kind of input is filtered. One of its checks is left out: that all which the
document allows is taken. Whether a prompt fits the context, or whether one of two fields is given,
no schema says; such a request is a 400, which the other checks hold to the document.
"""

import os
import subprocess
import sys

from tests.battery.client import KEY, LEAKS

NUM_OPERATIONS = 13


def test_every_operation_answers_as_documented_to_good_and_bad_input(start, full, tmp_path):
    with start(
        is_scripted=True, flags=("--body-timeout", "60", "--header-timeout", "60")
    ) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run"]
        command += [f"http://127.0.0.1:{server.port}/openapi.json"]
        command += ["--header", f"Authorization: Bearer {KEY}", "--mode", "all", "--no-color"]
        command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
        command += ["--max-examples", "200" if full else "5", "--continue-on-failure"]
        command += ["--generation-deterministic"]
        # A connection that idles is closed after 5 s; who thinks as long finds that out by asking.
        command += ["--request-retries", "3"]
        command += [] if full else ["--phases", "fuzzing"]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
        assert f"Tested: {NUM_OPERATIONS}" in ran.stdout
        assert not LEAKS.search(ran.stdout.replace(KEY, "").encode())
        assert server.get("/health").status == 200
        server.wait(server.is_idle)
        assert " ERROR " not in server.log_text()
