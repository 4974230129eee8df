"""The peer of the engine in this process: `transformers`' own continuous batching, same shapes.

    python3 -m model.bench.transformers_batch --config FILE --batch-size 1 32

Random weights of a config.json, prompts of random ids, lengths that are fixed; one JSON object a
line. The manager is kept over two calls, so that what it builds at first is not timed.
"""

import argparse
import inspect
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="transformers_batch", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--config", type=Path, required=True, help="config.json of a Llama")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=int, nargs="+", default=[1, 32])
    add("--input-len", type=int, default=512)
    add("--output-len", type=int, default=512)
    add("--seconds", type=float, default=120.0, help="begin no batch after this time")
    args = parser.parse_args()
    deadline_s = time.monotonic() + args.seconds
    try:
        model = _build(args.config, torch.device(args.device))
    except ImportError as error:
        _print({"kind": "fault", "what": "transformers", "error": str(error)})
        return
    rng = random.Random(0)
    for batch in args.batch_size:
        what = f"batch {batch}"
        if time.monotonic() > deadline_s:
            _print({"kind": "fault", "what": what, "error": "out of time"})
            continue
        try:
            _print(_measure(model, rng, batch, args.input_len, args.output_len))
        except Exception as error:  # whatever a library raises is its row's, not the run's
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _print({"kind": "fault", "what": what, "error": text})


def _build(config_file: Path, device: torch.device) -> Any:
    import transformers

    library: Any = transformers
    config = library.AutoConfig.from_pretrained(config_file.parent)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return library.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _measure(
    model: Any, rng: random.Random, batch: int, num_prompt: int, num_output: int
) -> dict[str, object]:
    vocab_size = model.config.vocab_size
    known = inspect.signature(model.generate_batch).parameters
    options = {"persistent_manager": True, "progress_bar": False}
    options = {name: value for name, value in options.items() if name in known}
    try:
        for _ in range(2):
            prompts = [rng.choices(range(vocab_size), k=num_prompt) for _ in range(batch)]
            started_s = time.monotonic()
            answers = _generate(model, prompts, num_output, options)
            seconds = time.monotonic() - started_s
    finally:
        destroy = getattr(model, "destroy_cached_continuous_batching_manager", None)
        if destroy is not None:
            destroy()
    num_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    if num_tokens != batch * num_output:
        raise RuntimeError(f"{num_tokens} tokens where {batch * num_output} were asked for")
    return {
        "kind": "peer",
        "batch": batch,
        "num_prompt": num_prompt,
        "num_output": num_output,
        "num_tokens": num_tokens,
        "seconds": seconds,
        "output_tokens_per_s": num_tokens / seconds,
    }


def _generate(
    model: Any, prompts: list[list[int]], num_output: int, options: dict[str, bool]
) -> dict[str, Any]:
    import transformers

    library: Any = transformers
    config = library.GenerationConfig(
        max_new_tokens=num_output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    answers: dict[str, Any] = model.generate_batch(
        inputs=prompts, generation_config=config, **options
    )
    return answers


def _print(record: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
