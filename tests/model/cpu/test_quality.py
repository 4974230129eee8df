"""What quantisation costs on real text: the gate that a scheme must pass to be served.

Perplexity and KL divergence against the same file in float32, on the Python language reference
as the standard library carries it.
"""

import logging
from pydoc_data.topics import topics

import pytest
import torch

from app.settings import read_environment
from model.config import LoadOptions
from model.cpu.network import NativeNetwork, Sizes
from model.network import StepInputs
from model.tokenizers import load_tokenizer
from model.weights.checkpoint import open_checkpoint
from model.weights.demo import FILE_NAME

WINDOW = 1024


@pytest.fixture(scope="module")
def demo():
    path = read_environment().cache_dir / FILE_NAME
    if not path.exists():
        pytest.skip("the demo model has not been fetched")
    return open_checkpoint(LoadOptions(model=str(path)))


def windows(checkpoint, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(
        checkpoint.tokenizer_path, expected_vocab_size=checkpoint.config.vocab_size
    )
    text = "\n".join(topics[name] for name in sorted(topics))[: count * WINDOW * 8]
    token_ids = tokenizer.encode(text, add_special_tokens=True)
    return [token_ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def one_sequence(token_ids: list[int]) -> StepInputs:
    positions = torch.arange(len(token_ids))
    return StepInputs(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        slots=positions,
        block_tables=torch.arange(WINDOW // 16)[None],
        query_starts=[0, len(token_ids)],
        seq_lens=[len(token_ids)],
    )


def logprobs(
    checkpoint, library, quantization: str, kv_dtype: torch.dtype, texts: list[list[int]]
) -> list[torch.Tensor]:
    network = NativeNetwork(
        checkpoint.config,
        checkpoint,
        library,
        scheme=quantization,
        kv_dtype=kv_dtype,
        sizes=Sizes(
            num_blocks=WINDOW // 16, block_size=16, max_model_len=WINDOW, max_tokens=WINDOW
        ),
    )
    found = []
    for token_ids in texts:
        logits = network.compute_logits(network.forward(one_sequence(token_ids)))
        found.append(logits.log_softmax(-1))
    return found


def perplexity(found: list[torch.Tensor], texts: list[list[int]]) -> float:
    losses = [
        -rows[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])
        for rows, token_ids in zip(found, texts, strict=True)
    ]
    return torch.cat(losses).mean().exp().item()


def compare(
    what: str, exact: list[torch.Tensor], found: list[torch.Tensor], texts: list[list[int]]
) -> tuple[float, float, str]:
    """Return the ratio of perplexities, the mean KL divergence, and a line that says it all."""
    ratio = perplexity(found, texts) / perplexity(exact, texts)
    divergences = [(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, found, strict=True)]
    divergence = torch.cat(divergences).mean().item()
    pairs = zip(exact, found, strict=True)
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs]).float().mean().item()
    report = (
        f"{what}: perplexity {perplexity(exact, texts):.3f} -> "
        f"{perplexity(found, texts):.3f} ({100 * (ratio - 1):+.2f} %), KL {divergence:.4f}, "
        f"same top-1 {100 * same:.1f} %"
    )
    logging.getLogger(__name__).info(report)  # pytest --log-cli-level=INFO shows it
    return ratio, divergence, report


@pytest.mark.demo
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.int8], ids=["kv16", "kv8"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_scheme_keeps_perplexity_within_a_percent(demo, library, quantization, kv_dtype, full):
    texts = windows(demo, 6 if full else 1)
    exact = logprobs(demo, library, "none", torch.float32, texts)
    found = logprobs(demo, library, quantization, kv_dtype, texts)
    ratio, divergence, report = compare(f"{quantization}, {kv_dtype} K/V", exact, found, texts)
    assert ratio < 1.01, report
    assert divergence <= 0.01, report


class Numbers:
    """A checkpoint's values, as if no file had them in blocks."""

    has_blocks = False

    def __init__(self, checkpoint) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint

    def read(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name)

    def packed(self, name: str) -> None:
        return None


@pytest.mark.demo
def test_int4_made_at_load_stays_near_the_values_that_it_was_made_of(demo, library, full):
    """No gate: these values were rounded to other steps of 4 bits before."""
    texts = windows(demo, 6 if full else 1)
    exact = logprobs(demo, library, "none", torch.float32, texts)
    found = logprobs(Numbers(demo), library, "int4", torch.int8, texts)
    ratio, divergence, report = compare("int4 at load", exact, found, texts)
    assert ratio < 1.08, report
    assert divergence < 0.05, report
