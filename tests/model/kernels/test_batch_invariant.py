"""What --batch-invariant promises: a sequence's logits have the same bits in any company.

Compared with torch.equal. A card's product takes the rows of a tile alike; the interpreter's is
numpy's, whose BLAS does not, so here it is replaced by one that does.
"""

import random

import numpy as np
import pytest
import torch

from model.fp8 import FP8
from model.kernels.launch import is_interpreted
from model.operations import invariant_operations
from tests.model.drive import Schedule, load_network, logits_alone
from tests.toy import write_toy_checkpoint


@pytest.fixture(autouse=True)
def _rows_alike(monkeypatch):
    if not is_interpreted():
        return
    from triton.runtime import interpreter

    def create_dot(_self, a, b, d, *_):
        total = np.zeros_like(d.data)
        for k in range(a.data.shape[-1]):
            total += a.data[..., k, None] * b.data[..., k, None, :]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(scope="module", params=["float32", "fp8"])
def model(request, tmp_path_factory, device):
    folder = write_toy_checkpoint(tmp_path_factory.mktemp("toy"), num_hidden_layers=2)
    options = {"is_fp8": True, "kv_dtype": FP8} if request.param == "fp8" else {}
    # Weights are quantised while numpy may warn of floats that a card takes for granted.
    with np.errstate(all="ignore"):
        return load_network(folder, operations=invariant_operations(), device=device, **options)


def test_logits_are_the_same_alone_in_a_batch_and_in_other_chunks(model, device, full):
    config, network = model
    rng = random.Random(0)
    for _ in range(10 if full else 1):
        prompts = [
            [rng.randrange(config.vocab_size) for _ in range(length)] for length in (37, 5, 18, 1)
        ]
        alone = [logits_alone(config, network, prompt, device) for prompt in prompts]
        schedule = Schedule(config, network, seed=rng.randrange(100), device=device)
        left = [schedule.add(prompt) for prompt in prompts]
        walks = list(left)
        while left:
            work = []
            for walk in rng.sample(left, rng.randint(1, len(left))):
                missing = len(walk.token_ids) - walk.num_computed
                work.append((walk, min(missing, rng.choice([1, 1, 3, 16, 17]))))
            schedule.step(work)
            left = [walk for walk in left if walk.num_computed < len(walk.token_ids)]
        for walk, expected in zip(walks, alone, strict=True):
            assert torch.equal(torch.stack(walk.logits), expected)
