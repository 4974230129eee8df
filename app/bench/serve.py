"""`arriero bench serve`: load on any server of OpenAI's API, ours or another's.

The names of flags and figures are those of `vllm bench serve`, for whoever compares.
"""

import argparse
import asyncio
import json
import math
import sys

import httpx
from tqdm import tqdm

from app.bench.figures import Load, summarise, text_of
from app.bench.load import Drafts, Pace, Sent, Shape, put_load
from app.bench.plot import picture
from app.bench.wire import Address
from app.cli.errors import RequestFailed
from app.settings import Environment


def run(args: argparse.Namespace, environment: Environment) -> int:
    """Measure, print, write what was asked for; 1 if any request failed. Raises RequestFailed."""
    key = args.api_key or next(iter(environment.api_keys), None)
    headers = [("Authorization", f"Bearer {key}")] if key else []
    try:
        address = Address.parse(args.base_url, headers)
    except ValueError as error:
        raise RequestFailed(f"--base-url: {error}") from error
    shape = Shape(
        model=args.model or _first_model(address),
        endpoint=args.endpoint,
        input_len=args.random_input_len,
        output_len=args.random_output_len,
        range_ratio=args.random_range_ratio,
        prefix_len=args.random_prefix_len,
        vocab_size=args.vocab_size,
        ignore_eos=args.ignore_eos,
        temperature=0.0 if args.temperature is None else args.temperature,
        extra_body=args.extra_body,
    )
    pace = Pace(
        num_prompts=args.num_prompts,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
    )
    load = Load(
        request_rate=args.request_rate,
        max_concurrency=args.max_concurrency,
        percentiles=tuple(args.metric_percentiles),
        goodput_ms=dict(args.goodput),
    )
    sent, cpu_s = asyncio.run(_measure(address, shape, pace, args.num_warmups, args.seed))
    record = {
        **summarise(sent, load, cpu_s),
        "model": shape.model,
        "base_url": address.url,
        "endpoint": shape.endpoint,
        "num_prompts": pace.num_prompts,
        "random_input_len": shape.input_len,
        "random_output_len": shape.output_len,
        "random_prefix_len": shape.prefix_len,
    }
    text = json.dumps(record, indent=1) + "\n"
    sys.stdout.write(text if args.json else text_of(record, load.percentiles))
    if args.output_json is not None:
        args.output_json.write_text(text, "utf-8")
    answers = [each.completion for each in sent if each.completion is not None]
    if args.plot is not None and answers:
        args.plot.write_text(picture(answers, _title(shape, pace)), "utf-8")
    return 0 if len(answers) == len(sent) else 1


async def _measure(
    address: Address, shape: Shape, pace: Pace, num_warmups: int, seed: int
) -> tuple[list[Sent], float]:
    """Warm up, put the load on; return what came of it, and the client's own CPU time."""
    drafts = Drafts(shape, seed)
    if num_warmups:
        warm = Pace(num_prompts=num_warmups, max_concurrency=pace.max_concurrency)
        warmed, _ = await put_load(address, drafts, warm, seed, lambda: None)
        if all(each.completion is None for each in warmed):
            raise RequestFailed(f"no request of the warm-up succeeded: {warmed[0].fault}")
    with tqdm(total=pace.num_prompts, unit="request", disable=not sys.stderr.isatty()) as bar:
        return await put_load(address, drafts, pace, seed, bar.update)


def _first_model(address: Address) -> str:
    """Return the name of the first model that is served. Raises RequestFailed."""
    url = address.url + "/v1/models"
    try:
        answer = httpx.get(url, headers=dict(address.headers), timeout=10.0, trust_env=False)
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except httpx.ConnectError as error:
        raise RequestFailed(
            f"no server answers at {address.url}; start one with `arriero serve`, or name another "
            "with --base-url"
        ) from error
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise RequestFailed(f"{url} names no model ({error}); give --model") from error


def _title(shape: Shape, pace: Pace) -> str:
    words = [f"{shape.model}: {pace.num_prompts} requests, {shape.input_len + shape.prefix_len} in"]
    words.append(f"{shape.output_len} out")
    if math.isfinite(pace.request_rate):
        words.append(f"{pace.request_rate:g} a second")
    if pace.max_concurrency:
        words.append(f"{pace.max_concurrency} at once")
    return ", ".join(words)
