"""Philox against Random123's known answers, and the uniforms made of it."""

import numpy as np
import pytest
import torch

from model.sampling.philox import philox4x32, uniforms

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_random123s_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    words = philox4x32(
        np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None]
    )
    assert tuple(words[:, 0].tolist()) == answer


def test_numbers_of_a_batch_are_those_of_each_token_alone() -> None:
    seeds, choices, positions = [0, 2**64 - 1, -5, 7], [0, 1, 2, 3], [0, 5, 2**33, 131071]
    together = uniforms(seeds, choices, positions)
    alone = [uniforms([s], [c], [p])[0] for s, c, p in zip(seeds, choices, positions, strict=True)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize(
    "other", [(1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1 << 32)]
)
def test_every_part_of_the_key_and_counter_changes_the_number(other: tuple[int, int, int]) -> None:
    seed, choice, position = other
    assert uniforms([0], [0], [0]) != uniforms([seed], [choice], [position])


def test_uniforms_are_even_over_64_bins_and_below_one() -> None:
    numbers = uniforms([1234] * 20000, [0] * 20000, list(range(20000)))
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    counts = torch.histc(numbers.float(), bins=64, min=0.0, max=1.0)
    expected = 20000 / 64
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 63 + 4 * (2 * 63) ** 0.5
