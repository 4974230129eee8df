"""The same bits whatever the company, the chunk borders, the blocks and the number of threads.

Logits are compared with torch.equal: not nearly, exactly. What a row may not depend on is drawn
at random; what it is compared with is the same sequence alone, in one chunk, on two threads.
"""

import random

import pytest
import torch

from model.layers.activation import swiglu
from model.layers.linear import ROW_TILE, Linear, choose_tile_sizes
from tests.model.drive import BLOCK_SIZE, Schedule, load_network, logits_alone
from tests.toy import write_toy_checkpoint

SHAPES = {
    "grouped": {},
    "one head a group": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "odd sizes": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "three to a group": {
        "hidden_size": 96,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 32,
    },
    "one group, wide heads": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "intermediate_size": 173,
    },
}


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    overrides = {"max_position_embeddings": 512, **SHAPES[request.param]}
    return load_network(write_toy_checkpoint(folder, **overrides))


def random_ids(rng: random.Random, config, length: int) -> list[int]:
    return [rng.randrange(config.vocab_size) for _ in range(length)]


def walk_through(schedule: Schedule, walks, rng: random.Random, largest: int) -> None:
    """Advance all walks in random company by random chunks until they are done."""
    left = list(walks)
    while left:
        company = rng.sample(left, rng.randint(1, len(left)))
        work = []
        for walk in company:
            missing = len(walk.token_ids) - walk.num_computed
            work.append((walk, min(missing, rng.choice([1, 1, 2, 3, 7, 16, 17, largest]))))
        schedule.step(work)
        left = [walk for walk in left if walk.num_computed < len(walk.token_ids)]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_logits_are_the_same_in_any_company_and_any_chunks(model, num_threads, full):
    config, network = model
    rng = random.Random(num_threads)
    for _ in range(20 if full else 2):
        prompts = [random_ids(rng, config, rng.choice([1, 5, 40, 300])) for _ in range(5)]
        expected = [logits_alone(config, network, prompt) for prompt in prompts]
        torch.set_num_threads(num_threads)
        schedule = Schedule(config, network, seed=rng.randrange(1000))
        walks = [schedule.add(prompt) for prompt in prompts]
        walk_through(schedule, walks, rng, largest=130)
        torch.set_num_threads(2)
        for walk, alone in zip(walks, expected, strict=True):
            assert torch.equal(torch.stack(walk.logits), alone)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8, 15, 16])
def test_decoding_one_by_one_gives_the_bits_of_the_whole_prompt(model, batch_size):
    config, network = model
    rng = random.Random(batch_size)
    prompts = [random_ids(rng, config, 12) for _ in range(batch_size)]
    schedule = Schedule(config, network)
    walks = [schedule.add(prompt) for prompt in prompts]
    for _ in range(12):
        schedule.step([(walk, 1) for walk in walks])
    for walk in walks:
        assert torch.equal(torch.stack(walk.logits), logits_alone(config, network, walk.token_ids))


def check_shared_prefix(config, network) -> None:
    """A sequence that takes its first 128 tokens from another's blocks gets its own bits."""
    rng = random.Random(0)
    prefix = random_ids(rng, config, 8 * BLOCK_SIZE)
    schedule = Schedule(config, network)
    first = schedule.add(prefix + random_ids(rng, config, 3))
    schedule.step([(first, len(first.token_ids))])
    second = schedule.add(prefix + random_ids(rng, config, 5), first, len(prefix))
    schedule.step([(second, 5)])
    alone = logits_alone(config, network, second.token_ids)
    assert torch.equal(torch.stack(second.logits), alone[len(prefix) :])


def test_shared_prefix_gives_the_bits_of_a_computed_one(model):
    check_shared_prefix(*model)


def test_prefix_can_be_shared_in_the_very_step_that_computes_it(model):
    config, network = model
    rng = random.Random(1)
    prefix = random_ids(rng, config, 4 * BLOCK_SIZE)
    schedule = Schedule(config, network)
    first = schedule.add(prefix + random_ids(rng, config, 3))
    second_ids = prefix + random_ids(rng, config, 2)
    first.blocks = [schedule._free_blocks.pop() for _ in range(5)]
    second = schedule.add(second_ids, first, len(prefix))
    schedule.step([(first, len(first.token_ids)), (second, 2)])
    alone = logits_alone(config, network, second_ids)
    assert torch.equal(torch.stack(second.logits), alone[len(prefix) :])


def test_what_a_freed_block_held_does_not_show(model):
    config, network = model
    rng = random.Random(2)
    prompt = random_ids(rng, config, 21)
    expected = logits_alone(config, network, prompt)
    for pool in (network._attention._pool.keys, network._attention._pool.values):
        for layer in pool:
            layer[:, : network._attention._pool.zero_slot] = torch.nan
    try:
        assert torch.equal(logits_alone(config, network, prompt), expected)
    finally:
        for pool in (network._attention._pool.keys, network._attention._pool.values):
            for layer in pool:
                layer.zero_()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"),
    [(576, 960), (1536, 576), (2048, 5632), (5632, 2048), (64, 172), (172, 64), (100, 37)],
)
def test_rows_of_a_product_do_not_depend_on_their_company(
    num_inputs, num_outputs, num_threads, full
):
    num_rows = 2048 if full or num_inputs * num_outputs < 1e6 else 256
    generator = torch.Generator().manual_seed(num_inputs)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    in_small_tiles = Linear(weight)
    layer = Linear(weight)
    torch.set_num_threads(2)
    choose_tile_sizes([layer])
    expected = in_small_tiles(x)
    torch.set_num_threads(num_threads)
    order = torch.randperm(num_rows, generator=generator)
    for count in (16, 32, 48, 144, num_rows):
        rows = order[:count]
        assert torch.equal(layer(x[rows]), expected[rows])
    alone = torch.zeros(ROW_TILE, num_inputs)
    alone[5] = x[17]
    assert torch.equal(layer(alone)[5], expected[17])


def test_larger_tile_with_other_bits_is_not_used(monkeypatch):
    def product(x, weight):
        return x @ weight.T * (1.0 + 1e-6 * (x.shape[0] == 128))

    monkeypatch.setattr("model.layers.linear._tile_product", product)
    layer = Linear(torch.ones(8, 8))
    choose_tile_sizes([layer])
    assert 128 not in layer.tile_sizes
    assert layer.tile_sizes[-1] == ROW_TILE


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_activation_of_a_number_does_not_depend_on_where_it_stands(num_threads):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2 * 1999, generator=generator) * 4
    torch.set_num_threads(num_threads)
    expected = torch.cat([swiglu(values[:, [i, i + 1999]]) for i in range(1999)], dim=1)
    for num_rows in (1, 3, 16, 48, 112):
        assert torch.equal(swiglu(values.repeat(num_rows, 1)), expected.repeat(num_rows, 1))


def test_bfloat16_logits_are_the_same_in_any_company_and_any_chunks(tmp_path):
    folder = write_toy_checkpoint(tmp_path, max_position_embeddings=512)
    config, network = load_network(folder, torch.bfloat16)
    rng = random.Random(4)
    prompts = [random_ids(rng, config, rng.choice([1, 5, 40, 150])) for _ in range(5)]
    schedule = Schedule(config, network)
    walks = [schedule.add(prompt) for prompt in prompts]
    walk_through(schedule, walks, rng, largest=130)
    for walk in walks:
        alone = logits_alone(config, network, walk.token_ids)
        assert torch.equal(torch.stack(walk.logits), alone)
