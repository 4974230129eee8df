"""The demo model end to end: the real file, if it is in the cache or can be fetched."""

import pytest
import torch

from app.cli import parse
from app.settings import read_environment
from model.errors import WeightsError
from model.loader import load_model
from model.step import NewRow, PlanRow, SamplingParams, StepPlan
from model.weights.demo import fetch_demo_model

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def loaded():
    try:
        path = fetch_demo_model(read_environment().cache_dir, lambda _: None)
    except WeightsError as error:
        pytest.skip(str(error))
    command = parse(
        ["serve", str(path), "--device", "cpu", "--max-model-len", "512", "--max-num-seqs", "2"],
        read_environment(),
    )
    return load_model(command.load)


def test_demo_model_knows_the_capital_of_france(loaded):
    tokenizer = loaded.tokenizer
    prompt = tokenizer.encode(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        add_special_tokens=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=7)
    new = NewRow(row=0, token_ids=tuple(prompt), num_prompt_tokens=len(prompt), sampling=sampling)
    ids: list[int] = []
    start, count = 0, len(prompt)
    for step_id in range(7):
        row = PlanRow(
            row=0,
            start=start,
            num_tokens=count,
            new_block_ids=(0, 1, 2) if step_id == 0 else (),
            logits_from=start + count - 1,
            sample=True,
        )
        plan = StepPlan(step_id=step_id, added=(new,) if step_id == 0 else (), rows=(row,))
        with torch.inference_mode():
            result = loaded.runner.collect(loaded.runner.launch(plan, lambda buffers: None))
        ids += result.rows[0].token_ids
        start, count = start + count, 1
    text = b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode()
    assert text == "The capital of France is Paris."
