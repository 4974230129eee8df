"""Flags whose values have a form of their own."""

import argparse

import pytest

from app.cli import parse_speculation
from app.engine.drafts import NgramSpeculation


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
