"""The cost of protection: two sides that serve, and a table that compares them pair by pair."""

import argparse

from app.bench.safety import SIDES, headers_of, table


def test_table_compares_each_side_with_the_one_before_pair_by_pair():
    args = argparse.Namespace(streams=16, tokens=10, step_ms=1.0, rounds=3)
    found = dict(
        zip(SIDES, ([10.0, 20.0, 40.0], [11.0, 20.0, 36.0], [22.0, 20.0, 18.0]), strict=True)
    )
    *_, off, on, repeated = table(args, found).splitlines()
    assert off == "| off | 20.0 | 10.0 to 40.0 |  |  |"
    assert on == "| on | 20.0 | 11.0 to 36.0 | +0.0 % | -10.0 % to +10.0 % |"
    assert repeated.endswith("| +0.0 % | -50.0 % to +100.0 % |")


def test_streams_take_turns_among_keys_and_each_has_its_own_to_repeat():
    assert headers_of("off", 0)(3) == ""
    assert headers_of("on", 0)(0) != headers_of("on", 0)(1)
    assert headers_of("on", 0)(0) == headers_of("on", 0)(2)
    repeated = {headers_of(SIDES[2], turn)(number) for turn in range(3) for number in range(16)}
    assert len(repeated) == 48
