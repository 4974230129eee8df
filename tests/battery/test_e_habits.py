"""Group E, habits: what the process listens on and connects to, what its source may not call."""

import ast

import psutil
import pytest

from tests.house.test_source import ROOT, SOURCES, dangers_of

TERMINAL = ROOT / "app/cli/terminal.py"  # the one that reads a person's lines
LOADERS = {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "joblib.load", "numpy.load"}


def test_e07_one_port_listens_on_the_loopback_and_nothing_is_connected_to(live):
    assert live.chat("a", response_format={"type": "json_object"}).status == 200
    process = psutil.Process(live.process.pid)
    found = [
        connection
        for each in [process, *process.children(recursive=True)]
        for connection in each.net_connections(kind="inet")
    ]
    listening = [each for each in found if each.status == psutil.CONN_LISTEN]
    assert [tuple(each.laddr) for each in listening] == [live.address]
    connected = [each for each in found if each.raddr and each.laddr != listening[0].laddr]
    assert connected == []
    assert not [each for each in found if not each.status or each.status == psutil.CONN_NONE]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_e08_source_makes_no_dangerous_call(path):
    source = path.read_text("utf-8")
    assert dangers_of(source) == []
    tree = ast.parse(source)
    is_app = path.is_relative_to(ROOT / "app")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert not (is_app and name in LOADERS), name
        assert name not in ("ast.literal_eval", "__import__", "globals", "locals"), name
        assert name != "input" or path == TERMINAL, name
        assert name not in ("tempfile.mktemp", "os.popen", "os.execv", "os.fork"), name
