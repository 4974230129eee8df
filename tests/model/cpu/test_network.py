"""The native network against the torch one, and its bits in any company."""

import random

import pytest
import torch

from model.config import LoadOptions
from model.cpu.library import Library
from model.cpu.network import NativeNetwork, Sizes
from model.cpu.threads import available_threads
from model.weights.checkpoint import open_checkpoint
from tests.model.cpu.drive import load_native
from tests.model.drive import BLOCK_SIZE, Schedule, load_network, logits_alone
from tests.model.test_invariance import SHAPES, check_shared_prefix, random_ids, walk_through
from tests.toy import VARIANTS, write_toy_checkpoint, write_toy_gguf

WIDTHS = {
    "stories": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "head of 20": {
        "hidden_size": 60,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 20,
    },
    "head of 256": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 256},
    "40 to a group": {"num_attention_heads": 40, "num_key_value_heads": 1, "head_dim": 8},
}


def prompt_of(config, length: int, seed: int = 0) -> list[int]:
    return random_ids(random.Random(seed), config, length)


@pytest.mark.parametrize("name", [*VARIANTS, *WIDTHS])
def test_float32_gives_the_logits_of_the_torch_network(name, library, tmp_path):
    overrides = VARIANTS.get(name) or WIDTHS.get(name) or {}
    folder = write_toy_checkpoint(tmp_path, **overrides)
    config, reference = load_network(folder)
    _, network = load_native(folder, library, "none")
    prompt = prompt_of(config, 150)
    expected = logits_alone(config, reference, prompt)
    found = logits_alone(config, network, prompt)
    assert torch.allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["gqa", "tied", "all-biases-tied", "llama3"])
def test_int8_stays_near_the_torch_network(name, kv_dtype, library, tmp_path):
    folder = write_toy_checkpoint(tmp_path, **VARIANTS[name])
    config, reference = load_network(folder)
    _, network = load_native(folder, library, "int8", kv_dtype)
    prompt = prompt_of(config, 60)
    expected = logits_alone(config, reference, prompt)
    found = logits_alone(config, network, prompt)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_int4_made_at_load_stays_recognisable(library, tmp_path):
    folder = write_toy_checkpoint(tmp_path)
    config, reference = load_network(folder)
    _, network = load_native(folder, library, "int4")
    prompt = prompt_of(config, 60)
    expected = logits_alone(config, reference, prompt)
    found = logits_alone(config, network, prompt)
    assert (found - expected).norm() < 0.6 * expected.norm()


class PartlyInBlocks:
    """A file of 4-bit blocks whose first layer, and a matrix of its second, come as numbers."""

    def __init__(self, checkpoint) -> None:
        self.has_blocks = checkpoint.has_blocks
        self.read = checkpoint.read
        self._packed = checkpoint.packed

    def packed(self, name: str):
        is_number = name.startswith(("model.layers.0.", "model.layers.1.self_attn.q_proj"))
        return None if is_number else self._packed(name)


def test_file_that_is_partly_in_blocks_keeps_its_matrices_together(library, tmp_path):
    folder = write_toy_gguf(tmp_path, quant="Q4_0")
    config, reference = load_network(folder)
    checkpoint = open_checkpoint(LoadOptions(model=str(folder)))
    sizes = Sizes(num_blocks=400, block_size=BLOCK_SIZE, max_model_len=256, max_tokens=256)
    network = NativeNetwork(
        config, PartlyInBlocks(checkpoint), library, scheme="int4", kv_dtype=torch.float32,
        sizes=sizes,
    )  # fmt: skip
    prompt = prompt_of(config, 60)
    expected = logits_alone(config, reference, prompt)
    found = logits_alone(config, network, prompt)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_hidden_states_leave_the_network_unrotated(library, tmp_path):
    folder = write_toy_checkpoint(tmp_path)
    config, reference = load_network(folder)
    _, network = load_native(folder, library, "int8")

    class Hidden:
        """Shows hidden states where logits are collected."""

        def __init__(self, network) -> None:
            self.row_tile = network.row_tile
            self.forward = network.forward

        def compute_logits(self, hidden):
            return hidden

    prompt = prompt_of(config, 20)
    expected = logits_alone(config, Hidden(reference), prompt)
    found = logits_alone(config, Hidden(network), prompt)
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["stories", "head of 20", "head of 256"])
def test_keys_and_values_in_8_bits_stay_near_exact_ones(name, library, tmp_path):
    folder = write_toy_checkpoint(tmp_path, **WIDTHS[name])
    config, exact = load_native(folder, library, "none")
    _, network = load_native(folder, library, "none", torch.int8)
    prompt = prompt_of(config, 150)
    expected = logits_alone(config, exact, prompt)
    found = logits_alone(config, network, prompt)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.05


IN_COMPANY = [
    ("none", None),
    ("none", torch.int8),
    ("int8", None),
    ("int8", torch.int8),
    ("int4", None),
]


@pytest.fixture(scope="module", params=[(s, q, kv) for s in SHAPES for q, kv in IN_COMPANY])
def networks(request, library_path, tmp_path_factory):
    """One model on one thread and on two."""
    shape, quantization, kv_dtype = request.param
    overrides = {"max_position_embeddings": 512, **SHAPES[shape]}
    folder = write_toy_checkpoint(tmp_path_factory.mktemp("toy"), **overrides)
    libraries = [Library(library_path, count) for count in (1, 2)]
    yield [load_native(folder, library, quantization, kv_dtype) for library in libraries]
    for library in libraries:
        library.close()


def test_logits_are_the_same_in_any_company_chunks_and_threads(networks, full):
    (config, on_one), (_, on_two) = networks
    rng = random.Random(3)
    for _ in range(20 if full else 2):
        prompts = [random_ids(rng, config, rng.choice([1, 5, 40, 150, 300])) for _ in range(6)]
        expected = [logits_alone(config, on_one, prompt) for prompt in prompts]
        for network in (on_one, on_two):
            schedule = Schedule(config, network, seed=rng.randrange(1000))
            walks = [schedule.add(prompt) for prompt in prompts]
            walk_through(schedule, walks, rng, largest=130)
            for walk, alone in zip(walks, expected, strict=True):
                assert torch.equal(torch.stack(walk.logits), alone)


def test_shared_prefix_gives_the_bits_of_a_computed_one(networks):
    check_shared_prefix(*networks[1])


def test_prefix_can_be_shared_in_the_very_step_that_computes_it(networks):
    """Even by a sequence that comes before the one that computes it."""
    for config, network in networks:
        rng = random.Random(1)
        prefix = random_ids(rng, config, 12 * BLOCK_SIZE)
        schedule = Schedule(config, network)
        first = schedule.add(prefix + random_ids(rng, config, 3))
        first.blocks = [schedule._free_blocks.pop() for _ in range(13)]
        second = schedule.add(prefix + random_ids(rng, config, 2), first, len(prefix))
        schedule.step([(second, 2), (first, len(first.token_ids))])
        alone = logits_alone(config, network, second.token_ids)
        assert torch.equal(torch.stack(second.logits), alone[len(prefix) :])


def test_what_a_freed_block_held_does_not_show(networks):
    _, (config, network) = networks
    prompt = prompt_of(config, 21)
    expected = logits_alone(config, network, prompt)
    network._pool.view(torch.uint8).fill_(0xFF)  # NaN, as a float of any size
    assert torch.equal(logits_alone(config, network, prompt), expected)
    network._pool.zero_()


def test_threads_follow_affinity_and_the_cgroup(tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    assert available_threads(quota) == 1
    quota.write_text("max 100000\n")
    assert available_threads(quota) == available_threads(tmp_path / "absent") >= 1
