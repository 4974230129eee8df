"""Where a model's files are: a local path as given, or a snapshot of a Hub repository.

Owns names and downloads, and turns what can go wrong with them into one line. Only files that can
hold data are ever asked for: no pickles (but Meta's own), no Python.
"""

import re
import sys
from pathlib import Path

from model.config import LoadFormat, LoadOptions, shown
from model.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_GGUF = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")

_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "*.jinja"]
_CONFIG_FILES = ["config.json", "generation_config.json", "special_tokens_map.json"]
_META_FILES = ["params.json", "consolidated.*.pth", "tokenizer.model"]
_PATTERNS: dict[LoadFormat, list[str]] = {
    "auto": [*_CONFIG_FILES, *_TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json"],
    "safetensors": [*_CONFIG_FILES, *_TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json"],
    "gguf": ["*.gguf"],
    "meta": [*_META_FILES, *(f"original/{name}" for name in _META_FILES)],
    "dummy": [*_CONFIG_FILES, *_TOKENIZER_FILES],
}


def resolve_model(options: LoadOptions) -> Path:
    """Return the folder or .gguf file that holds the model, downloaded if need be.

    Raises ConfigError when there is none, or it may not be had.
    """
    return _resolve(options.model, options, _PATTERNS[options.load_format])


def resolve_tokenizer(options: LoadOptions, source: Path) -> Path:
    """Return the folder or .gguf file that holds the tokenizer: the model's own, unless named."""
    if options.tokenizer is None:
        return source
    return _resolve(options.tokenizer, options, [*_CONFIG_FILES, *_TOKENIZER_FILES])


def _resolve(name: str, options: LoadOptions, patterns: list[str]) -> Path:
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if _HUB_ID.fullmatch(name) and not name.startswith(".") and not name.endswith(".gguf"):
        return _snapshot(name, options, patterns)
    if (match := _HUB_GGUF.fullmatch(name)) and not name.startswith("."):
        path = _snapshot(match[1], options, [match[2]]) / match[2]
        if path.exists():
            return path
        raise ConfigError(f"{name}: the repository {match[1]} has no such file")
    raise ConfigError(f"{name or repr(name)}: no such file or folder, and no id of a repository")


def _snapshot(repo_id: str, options: LoadOptions, patterns: list[str]) -> Path:
    # Costs a third of a second to import, and most models are local.
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot_download(
            repo_id,
            revision=options.revision,
            cache_dir=options.download_dir,
            token=options.hf_token,
            local_files_only=options.offline,
            allow_patterns=patterns,
            # "*" also matches "/": copies in other precisions lie in folders, Mistral's beside.
            ignore_patterns=["consolidated*.safetensors", "*.bin", "*.py"]
            + (["*/*"] if not any("/" in pattern for pattern in patterns) else []),
        )
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{repo_id}: is gated; accept its licence at https://huggingface.co/{repo_id} and set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repo_id}: no such folder here, and no such repository on the Hub for this token; "
            "a private one needs HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{repo_id}: has no revision {shown(options.revision)}") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo_id}: no such folder, and not the id of a repository") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if options.offline else "the Hub cannot be reached"
        raise ConfigError(
            f"{repo_id}: no such folder, not in the cache, and {reason}; name a folder or a file"
        ) from error
    # The root of the errors of whichever HTTP library the client is built on, not declared by it.
    except (errors.HTTPError, errors.XetDownloadError, OSError) as error:  # type: ignore[attr-defined]
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{repo_id}: cannot be downloaded: {first_line}") from error
    return Path(folder)
