"""What a command line asks to load and serve, as one frozen message."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.engine.drafts import NgramSpeculation
from app.settings import ApiKey, Environment, ServerSettings, read_api_keys
from app.text.tools.parser import ToolFormat
from model.config import LoadOptions
from model.errors import ConfigError

logger = logging.getLogger("arriero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A parsed command line of a command that loads a model."""

    load: LoadOptions
    server: ServerSettings
    served_model_names: tuple[str, ...]
    chat_template: Path | None
    tool_call_parser: ToolFormat | None
    enable_prefix_caching: bool
    speculation: NgramSpeculation | None


def command_of(args: argparse.Namespace, environment: Environment) -> Command:
    """Make a command of parsed arguments; the demo model is fetched if no other is named.

    Leaves the process with a usage line if they do not go together.
    """
    fail: Callable[[str], None] = args.fail
    if args.model and args.model_path:
        fail("name the model once: as MODEL or with --model")
    server = server_settings(args, environment) if args.command == "serve" else ServerSettings()
    named = args.model or args.model_path
    served = tuple(args.served_model_name)
    model = named
    if named is None:
        # Imported here: nothing of this is needed when a model is named.
        from model.weights.demo import DEMO_MODEL_NAME, fetch_demo_model

        model = str(fetch_demo_model(environment.cache_dir, log=voice_of(args)))
        served = served or (DEMO_MODEL_NAME,)
    return Command(
        load=load_options(args, model, environment),
        server=server,
        served_model_names=served or (str(named),),
        chat_template=args.chat_template,
        tool_call_parser=args.tool_call_parser,
        enable_prefix_caching=args.enable_prefix_caching,
        speculation=args.speculative_config,
    )


def server_settings(args: argparse.Namespace, environment: Environment) -> ServerSettings:
    """Return the settings of `arriero serve`. Raises ConfigError for a bad file of keys."""
    if not all(key.strip() for key in args.api_key):
        args.fail("--api-key is empty")
    settings = ServerSettings(
        host=args.host,
        port=args.port,
        api_keys=(*args.api_key, *environment.api_keys),
        named_keys=(
            *(read_api_keys(args.api_key_file) if args.api_key_file else ()),
            *environment.metrics_keys,
        ),
        allowed_origins=tuple(args.allowed_origins),
        header_timeout_s=args.header_timeout,
        body_timeout_s=args.body_timeout,
        max_connections=args.max_connections,
        max_connections_per_client=args.max_connections_per_client,
        root_path=args.root_path,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        shutdown_timeout_s=args.shutdown_timeout,
        resume_window_s=args.resume_window,
        log_level=args.log_level,
        otlp_traces_endpoint=args.otlp_traces_endpoint,
    )
    _check_keys(settings.keys())
    return settings


def _check_keys(keys: Sequence[ApiKey]) -> None:
    """Refuse keys that shut everybody out, or that let in more than they say."""
    full = {key.key for key in keys if key.scope == "all"}
    for key in keys:
        if key.scope == "metrics" and not full:
            raise ConfigError(
                f"the key {key.name} opens /metrics alone, and there is no other: nobody could "
                "ask for anything; name one with --api-key, ARRIERO_API_KEY or --api-key-file"
            )
        if key.scope == "metrics" and key.key in full:
            raise ConfigError(f"the key {key.name} is to open /metrics alone, but opens all")


def load_options(args: argparse.Namespace, model: str, environment: Environment) -> LoadOptions:
    """Return what the loader needs to know."""
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
        enforce_eager=args.enforce_eager,
        batch_invariant=args.batch_invariant,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        generation_config=args.generation_config,
        seed=args.seed or 0,
        cache_dir=str(environment.cache_dir),
    )


def voice_of(args: argparse.Namespace) -> Callable[[str], None]:
    """Return what tells the user: standard error, or the log where programs read that."""
    return logger.warning if getattr(args, "log_format", "text") == "json" else say


def say(line: str) -> None:
    """Tell the user something that is no part of the output."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
