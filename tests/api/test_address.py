"""The address that the log names can be copied into a shell."""

import socket
import urllib.parse

import pytest

from app.main import bind, local_url
from app.settings import ServerSettings


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_what_listens_anywhere_is_reached_at_the_url_on_this_machine(host):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    settings = ServerSettings(host=host, port=0, root_path="/llm")
    with bind(settings) as listener:
        url = urllib.parse.urlsplit(local_url(listener, settings))
        assert url.path == "/llm"
        with socket.create_connection((url.hostname, url.port)) as client:
            accepted, _ = listener.accept()
            accepted.close()
            assert client.recv(1) == b""


def test_url_is_that_of_a_browser_and_not_of_every_address():
    settings = ServerSettings(host="0.0.0.0", port=0)
    with bind(settings) as listener:
        assert local_url(listener, settings) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    with bind(ServerSettings(host="::1", port=0)) as listener:
        assert local_url(listener, settings) == f"http://[::1]:{listener.getsockname()[1]}"
