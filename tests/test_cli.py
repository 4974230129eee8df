"""Flags whose values have a form of their own."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from app.cli import parse, parse_speculation
from app.engine.drafts import NgramSpeculation
from app.settings import ApiKey, Environment, read_api_keys, read_environment
from model.errors import ConfigError

ENVIRONMENT = Environment(
    cache_dir=Path("nowhere"), api_keys=("e",), hf_token=None, is_offline=True
)


def test_speculative_config_is_read_with_the_defaults_of_vllm():
    found = parse_speculation('{"method": "ngram", "num_speculative_tokens": 3}')
    assert found == NgramSpeculation(
        num_speculative_tokens=3, prompt_lookup_max=5, prompt_lookup_min=5
    )
    found = parse_speculation(
        '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, '
        '"prompt_lookup_min": 2}'
    )
    assert (found.prompt_lookup_max, found.prompt_lookup_min) == (4, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ngram", "is not JSON"),
        ("[]", 'needs "method": "ngram"'),
        ('{"method": "eagle"}', 'needs "method": "ngram"'),
        ('{"method": "ngram"}', "needs num_speculative_tokens"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "from 1 to 64"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "from 1 to 64"),
        ('{"method": "ngram", "num_speculative_tokens": 1, "model": "m"}', "unknown fields: model"),
        (
            '{"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 2, '
            '"prompt_lookup_min": 3}',
            "more than prompt_lookup_max",
        ),
    ],
)
def test_speculative_config_that_cannot_be_meant_is_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse_speculation(text)


def test_keys_come_from_flags_environment_and_file(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text('# two teams\n[alice]\nkey = "clé-1"\n[bob]\nkey = "b"\n', "utf-8")
    line = ["serve", "m", "--api-key", "a", "b", "--api-key", "c", "--api-key-file", str(path)]
    settings = parse(line, ENVIRONMENT).server
    assert settings.api_keys == ("a", "b", "c", "e")
    assert settings.named_keys == (
        ApiKey(name="alice", key="clé-1"),
        ApiKey(name="bob", key="b"),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key"),
        (b"# nothing yet", "holds no key"),
        (b"alice: hidden", "is not TOML"),
        (b"[alice]\nkey = 'hidden\xff'", "is not TOML in UTF-8"),
        (b"alice = 'hidden'", "needs a field key"),
        (b"[alice]", "needs a field key"),
        (b"[alice]\nkey = 'hidden'\nwieght = 1", "needs a field key"),
        (b"[alice]\nkey = 'hidden'\nweight = 0", "a weight is"),
        (b"[alice]\nkey = 'hidden'\nweight = nan", "a weight is"),
        (b"[alice]\nkey = 'hidden'\nweight = true", "a weight is"),
        (b"[alice]\nkey = ''", "without spaces"),
        (b"[alice]\nkey = 'hidden '", "without spaces"),
        (b"[alice]\nkey = 5", "without spaces"),
        (b"[alice]\nkey = 'hidden'\n[bob]\nkey = 'hidden'", "has the key of"),
        (b"['al\\nice']\nkey = 'hidden'", "a name is"),
    ],
    ids=range(15),
)
def test_key_file_that_cannot_be_meant_is_refused_and_no_key_shown(tmp_path, content, message):
    path = tmp_path / "keys.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_api_keys(path)
    assert "hidden" not in str(refused.value)


def test_key_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_api_keys(tmp_path / "keys.toml")


def test_limits_of_connections_reach_the_settings():
    line = ["--header-timeout", "1.5", "--body-timeout", "0", "--max-connections", "7"]
    line += ["--max-connections-per-client", "0", "--allowed-origins", "https://a.example:8443"]
    settings = parse(["serve", "m", *line], ENVIRONMENT).server
    assert (settings.header_timeout_s, settings.body_timeout_s) == (1.5, 0)
    assert (settings.max_connections, settings.max_connections_per_client) == (7, 0)
    assert settings.allowed_origins == ("https://a.example:8443",)


@pytest.mark.parametrize(
    "flag",
    [
        "--header-timeout=-1",
        "--body-timeout=nan",
        "--shutdown-timeout=inf",
        "--max-connections=-1",
        "--max-connections-per-client=x",
        '--allowed-origins=["*"]',
        "--allowed-origins=https://a.example/",
        "--allowed-origins=a.example",
        "--api-key=",
    ],
)
def test_flag_of_the_server_that_cannot_be_meant_is_a_usage_error(flag, capsys):
    with pytest.raises(SystemExit) as left:
        parse(["serve", "m", flag], ENVIRONMENT)
    assert left.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


def test_quotas_and_salt_of_a_key_are_read(tmp_path):
    path = tmp_path / "keys.toml"
    lines = "requests_per_minute = 60\ntokens_per_minute = 6000\nmax_concurrent = 2"
    path.write_text(f"[alice]\nkey = 'a'\n{lines}\ncache_salt = 's'\n")
    assert read_api_keys(path) == (
        ApiKey(
            name="alice",
            key="a",
            requests_per_minute=60,
            tokens_per_minute=6000,
            max_concurrent=2,
            cache_salt="s",
        ),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("requests_per_minute = 0", "requests_per_minute is"),
        ("tokens_per_minute = 1.5", "tokens_per_minute is"),
        ("tokens_per_minute = 10000000000", "tokens_per_minute is"),
        ("max_concurrent = true", "max_concurrent is"),
        ("cache_salt = ''", "a cache_salt is"),
        ("cache_salt = 5", "a cache_salt is"),
        ("requests_per_hour = 5", "may have weight, requests_per_minute"),
        ("scope = 'metric'", 'a scope is "all" or "metrics"'),
        ("scope = ['metrics']", 'a scope is "all" or "metrics"'),
        ("scope = 'metrics'\nmax_concurrent = 1", "has no use for max_concurrent"),
    ],
)
def test_quota_that_cannot_be_meant_is_refused(tmp_path, line, message):
    path = tmp_path / "keys.toml"
    path.write_text(f"[alice]\nkey = 'hidden'\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        read_api_keys(path)


def metrics_key(key: str) -> ApiKey:
    return ApiKey(name="ARRIERO_METRICS_KEY", key=key, scope="metrics")


def test_key_for_metrics_comes_from_the_file_or_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys.toml"
    path.write_text("[alice]\nkey = 'a'\n[prometheus]\nkey = 'p'\nscope = 'metrics'\n")
    monkeypatch.setenv("ARRIERO_METRICS_KEY", "m")
    keys = parse(["serve", "x", "--api-key-file", str(path)], read_environment()).server.keys()
    assert keys == (
        ApiKey(name="alice", key="a"),
        ApiKey(name="prometheus", key="p", scope="metrics"),
        metrics_key("m"),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "nobody could ask for anything"), (["--api-key", "m"], "opens all")],
)
def test_key_for_metrics_that_cannot_be_meant_is_refused(flags, message):
    environment = dataclasses.replace(ENVIRONMENT, api_keys=(), metrics_keys=(metrics_key("m"),))
    with pytest.raises(ConfigError, match=message):
        parse(["serve", "x", *flags], environment)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        (["serv"], "did you mean serve?"),
        (["bench", "engin"], "did you mean engine?"),
        (["serve", "--quantization", "in8"], "did you mean int8?"),
        (["serve", "--max-model-length", "5"], "did you mean --max-model-len?"),
    ],
)
def test_word_that_is_nearly_one_is_asked_after(line, meant, capsys):
    with pytest.raises(SystemExit) as left:
        parse(line, ENVIRONMENT)
    assert left.value.code == 2
    assert meant in capsys.readouterr().err
