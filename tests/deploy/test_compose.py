"""What the compose file says, as far as it can be tried without an engine."""

import os
import subprocess

import pytest

from tests.deploy.compose import load_services


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"ARRIERO_API_KEY": "a", "ARRIERO_METRICS_KEY": "m"}, "m"),
        ({"ARRIERO_API_KEY": "a", "ARRIERO_METRICS_KEY": ""}, "a"),
        ({"ARRIERO_API_KEY": "a"}, "a"),
        ({}, ""),
    ],
)
def test_prometheus_is_given_one_key_and_keeps_none_in_its_environment(tmp_path, given, key):
    service = load_services()["prometheus"]
    shell, flag, line, *rest = service["entrypoint"]
    line = line.replace("$$", "$").replace("/tmp/key", str(tmp_path / "key"))
    fake = tmp_path / "prometheus"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nenv > {tmp_path}/environment\n')
    fake.chmod(0o755)
    # What compose itself would fill in differs from version to version: only names pass here.
    environment = {name: given[name] for name in service["environment"] if name in given}
    subprocess.run(
        [shell, flag, line, *rest, *service["command"]],
        env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    assert (tmp_path / "key").read_text() == key
    assert (tmp_path / "arguments").read_text().split() == service["command"]
    assert "ARRIERO" not in (tmp_path / "environment").read_text()
