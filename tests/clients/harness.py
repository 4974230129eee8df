"""lm-eval's scores through this server beside those of its own `hf` model on the same weights.

One small task of each kind that it asks of a model (choices by log-likelihood, rolling perplexity,
generation), from files written here: nothing is fetched. Windows are short, so that the rolling
task needs several. Fails if a score differs by more than 1e-3, of itself if it is over 1 (a
perplexity may be huge).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.environments import cache_folder, python_of
from tests.clients.servers import KEY, serving
from tests.toy import write_json, write_toy_checkpoint

PACKAGES = ("lm-eval[api,hf]", "torch")  # whatever build pip finds: its `hf` model alone needs it
WINDOW = 96  # tokens of context in the rolling task
TOLERANCE = 1e-3

NAMES = ("Lily", "Tom", "Mia", "Ben")
THINGS = ("ball", "dog", "tree", "cake", "boat")
OPENINGS = (
    "Once upon a time, there was a little {who} named {name}.",
    "One day, {name} went to the park with {name}'s mom and saw a big {thing}.",
    "{name} was very sad, for the {thing} was not there any more.",
)
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{options}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 40, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}, {"metric": "chrf"}],
    },
}


def openings() -> list[str]:
    return [
        opening.format(name=name, thing=thing, who="girl" if name in ("Lily", "Mia") else "boy")
        for opening, name, thing in itertools.product(OPENINGS, NAMES, THINGS)
    ]


def documents() -> dict[str, list[dict[str, object]]]:
    """Return what each task asks."""
    texts = list(dict.fromkeys(openings()))
    endings = [" She was happy", " They played", " It was very big", " The end"]
    return {
        "choices": [
            {"text": text, "options": endings, "answer": i % len(endings)}
            for i, text in enumerate(texts)
        ],
        "rolling": [{"text": " ".join(texts[i : i + 8])} for i in range(0, len(texts), 4)],
        "generation": [{"text": text, "answer": " She was happy"} for text in texts[::2]],
    }


def write_tasks(folder: Path) -> None:
    for name, asked in documents().items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in asked), "utf-8")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **TASKS[name],
        }
        write_json(folder / f"{name}.yaml", task)  # JSON is YAML


def evaluate(python: Path, scratch: Path, model: str, arguments: dict[str, object]) -> Path:
    """Run lm-eval; return the folder that it wrote to."""
    out = scratch / model
    words = ",".join(f"{key}={value}" for key, value in arguments.items())
    command = [python, "-m", "lm_eval", "run", "--model", model, "--model_args", words]
    command += ["--tasks", ",".join(TASKS), "--include_path", scratch, "--device", "cpu"]
    command += ["--batch_size", "4", "--output_path", out, "--log_samples"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "OPENAI_API_KEY": KEY,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "2",
    }
    log = scratch / f"{model}.log"
    with log.open("wb") as told:
        done = subprocess.run(command, stdout=told, stderr=told, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"lm-eval failed:\n{log.read_text('utf-8', 'replace')[-4000:]}")
    return out


def scores_of(out: Path) -> dict[str, float]:
    (path,) = out.rglob("results_*.json")
    results = json.loads(path.read_text("utf-8"))["results"]
    return {
        f"{task} {metric.partition(',')[0]}": value
        for task in TASKS
        for metric, value in results[task].items()
        if isinstance(value, float) and "stderr" not in metric
    }


def responses_of(out: Path, task: str) -> list[list[str]]:
    """Return what the model said of each document, in order."""
    (path,) = out.rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]


def numbers_in(value: object) -> list[float]:
    """Return the log-likelihoods in a response, which lm-eval may have written as text."""
    if isinstance(value, list):
        return [number for inner in value for number in numbers_in(inner)]
    try:
        return [float(str(value))]
    except ValueError:
        return []  # whether it was the greedy choice


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/lm-eval", description=__doc__)
    parser.add_argument(
        "model", nargs="?", type=Path, help="Hugging Face folder; default: random tiny weights"
    )
    given = parser.parse_args().model
    python = python_of("lm-eval", PACKAGES, lambda text: print_line(f"lm-eval: {text}"))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_tasks(scratch)
        folder = given.resolve() if given else write_toy_checkpoint(scratch / "toy")
        both = {"add_bos_token": True}
        theirs = evaluate(
            python,
            scratch,
            "hf",
            {"pretrained": folder, "dtype": "float32", "max_length": WINDOW, **both},
        )
        flags = [str(folder), "--dtype", "float32", "--kv-cache-dtype", "float32"]
        with serving(flags, cache_folder() / "server-lm-eval.log") as url:
            ours = evaluate(
                python,
                scratch,
                "local-completions",
                {
                    "model": "model",
                    "base_url": f"{url}/v1/completions",
                    "tokenizer": folder,
                    "tokenizer_backend": "huggingface",
                    "num_concurrent": 2,
                    "max_length": WINDOW + 2,  # of which the API's class takes 2 off
                    **both,
                },
            )
        sys.exit(0 if compare(ours, theirs) else 1)


def compare(ours: Path, theirs: Path) -> bool:
    """Print both scores of everything, and say whether they agree."""
    mine, reference = scores_of(ours), scores_of(theirs)
    print_line(f"{'score':26}{'server':>14}{'hf':>14}{'difference':>14}")
    worst = 0.0
    for name, value in reference.items():
        difference = abs(mine[name] - value) / max(1.0, abs(value))
        worst = max(worst, difference)
        print_line(f"{name:26}{mine[name]:14.7g}{value:14.7g}{difference:14.2e}")
    for task in ("choices", "rolling"):
        pairs = list(
            zip(
                numbers_in(responses_of(ours, task)),
                numbers_in(responses_of(theirs, task)),
                strict=True,
            )
        )
        gap = max(abs(a - b) for a, b in pairs)
        print_line(f"{task}: {len(pairs)} log-likelihoods, at most {gap:.2e} apart")
    # `hf` decodes what follows the prompt alone, where SentencePiece drops the space in front.
    mine_said, reference_said = (
        ["".join(texts).strip() for texts in responses_of(out, "generation")]
        for out in (ours, theirs)
    )
    same = sum(a == b for a, b in zip(mine_said, reference_said, strict=True))
    print_line(f"generation: {same} of {len(mine_said)} texts are the same")
    print_line(f"largest difference of a score: {worst:.2e} (allowed: {TOLERANCE})")
    return worst <= TOLERANCE


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
