"""The network against transformers' LlamaForCausalLM: every kind of config, the real toy model.

Greedy continuations must be equal token by token. A prompt whose reference comes nearer than
`MIN_GAP` to a tie is not used: there the order of two nearly equal logits is anybody's. Such
prompts are counted, and may not be many.
"""

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from app.settings import read_environment
from model.config import LoadOptions
from model.weights.checkpoint import open_checkpoint
from model.weights.demo import FILE_NAME
from tests.model.drive import Schedule, load_network, logits_alone
from tests.toy import (
    META_VOCAB_SIZE,
    VARIANTS,
    write_toy_checkpoint,
    write_toy_gguf,
    write_toy_meta,
)

MIN_GAP = 1e-4


def reference_continuation(
    model: LlamaForCausalLM, prompt: list[int], num_tokens: int
) -> tuple[list[int], torch.Tensor] | None:
    """Generate greedily; return the new ids and the log-probabilities [new, V], None at a tie."""
    out = model.generate(
        torch.tensor([prompt]),
        # Without it, generate() takes ids of the prompt that equal pad_token_id for padding.
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits)
    top = logits.topk(2).values
    if (top[:, 0] - top[:, 1]).min() < MIN_GAP:
        return None
    return out.sequences[0, len(prompt) :].tolist(), logits.log_softmax(-1)


def greedy(config, network, prompts: list[list[int]], num_tokens: int):
    """Continue all prompts together; return ids and log-probabilities of each."""
    schedule = Schedule(config, network)
    walks = [schedule.add(list(prompt)) for prompt in prompts]
    schedule.step([(walk, len(walk.token_ids)) for walk in walks])
    for _ in range(num_tokens - 1):
        for walk in walks:
            token_id = int(walk.logits[-1].argmax())
            schedule._rows.token_log[walk.row, len(walk.token_ids)] = token_id
            walk.token_ids.append(token_id)
        schedule.step([(walk, 1) for walk in walks])
    results = []
    for walk, prompt in zip(walks, prompts, strict=True):
        logits = torch.stack(walk.logits[len(prompt) - 1 :])
        results.append((logits.argmax(-1).tolist(), logits.log_softmax(-1)))
    return results


def compare_with_reference(
    folder: Path,
    num_prompts: int,
    num_tokens: int,
    reference: LlamaForCausalLM | None = None,
) -> None:
    config, network = load_network(folder)
    if reference is None:
        reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(7)
    prompts, expected = [], []
    num_ties = 0
    while len(prompts) < num_prompts:
        prompt = [rng.randrange(config.vocab_size) for _ in range(rng.randint(1, 40))]
        continuation = reference_continuation(reference, prompt, num_tokens)
        if continuation is None:
            num_ties += 1
            assert num_ties <= num_prompts, "the reference is full of ties"
            continue
        prompts.append(prompt)
        expected.append(continuation)
    for first in range(0, num_prompts, 10):
        part = slice(first, first + 10)
        got = greedy(config, network, prompts[part], num_tokens)
        for (ids, logprobs), (expected_ids, expected_logprobs) in zip(
            got, expected[part], strict=True
        ):
            assert ids == expected_ids
            assert (logprobs - expected_logprobs).abs().max() < MIN_GAP


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_greedy_tokens_equal_the_reference(variant, tmp_path, full):
    folder = write_toy_checkpoint(tmp_path, **VARIANTS[variant])
    compare_with_reference(folder, *((50, 64) if full else (3, 16)))


def test_greedy_tokens_of_a_real_model_equal_the_reference(stories260k, full):
    compare_with_reference(stories260k, *((50, 64) if full else (5, 32)))


def test_logits_of_a_long_prompt_equal_the_reference(tmp_path):
    folder = write_toy_checkpoint(tmp_path, max_position_embeddings=512)
    config, network = load_network(folder)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(3)
    prompt = [rng.randrange(config.vocab_size) for _ in range(300)]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert (logits_alone(config, network, prompt) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("form", ["three shards", "gguf", "meta", "meta in two shards"])
def test_greedy_tokens_of_every_loader_equal_the_reference(form, tmp_path, full):
    overrides: dict[str, int] = {}
    if form == "gguf":
        folder = write_toy_gguf(tmp_path / "own")
    elif form == "three shards":
        folder = write_toy_checkpoint(tmp_path / "own", shards=3)
    else:
        folder = write_toy_meta(tmp_path / "own", shards=2 if "two" in form else 1)
        overrides = {"vocab_size": META_VOCAB_SIZE, "intermediate_size": 192}
    twin = write_toy_checkpoint(tmp_path / "twin", **overrides)
    reference = LlamaForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    compare_with_reference(folder, *((50, 64) if full else (3, 16)), reference)


@pytest.mark.demo
def test_greedy_tokens_of_the_demo_model_equal_the_reference(full):
    path = read_environment().cache_dir / FILE_NAME
    if not path.exists():
        pytest.skip("the demo model has not been fetched")
    checkpoint = open_checkpoint(LoadOptions(model=str(path)))
    config = checkpoint.config
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tie_word_embeddings,
    )
    reference = LlamaForCausalLM(shape).eval()
    tensors = {name: checkpoint.read(name).float() for name in checkpoint.tensor_names()}
    missing = reference.load_state_dict(tensors, strict=False).missing_keys
    assert missing == ["lm_head.weight"], "the head is tied"
    compare_with_reference(path, *((8, 64) if full else (1, 8)), reference)
