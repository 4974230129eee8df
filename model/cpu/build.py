"""Finds or compiles the native library for the instructions that this machine has.

An image brings one library a level in `lib/`; elsewhere the system's C compiler makes it once, in
the user's cache folder, under a name that changes with source, flags and compiler. What lies
there is loaded into the server's process, so that it must be ours and nobody else's to write.

    python -m model.cpu.build        compiles all levels into `lib/`
"""

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.errors import ModelError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
PREBUILT = Path(__file__).parent / "lib"
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 120

# -ffp-contract=off: the compiler may not decide where a product is fused with a sum, as a row's
# bits would then depend on the loop that it was computed in. -O2 with unrolling keeps more of the
# inner loops in registers than -O3 does (GCC 12).
FLAGS = (
    *("-O2", "-ftree-vectorize", "-funroll-loops", "-ffp-contract=off", "-fno-math-errno"),
    *("-std=gnu11", "-fPIC", "-Wall", "-Wextra"),
)
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
LEVELS = {"avx512vnni": _AVX512, "avx2": _AVX2, "portable": ()}
"""Instruction sets by level, the best first; the compiler's flags for them have the same names."""


class NativeUnavailable(ModelError):
    """There is no native library here; the message says why."""


def machine_level() -> str:
    """Return the best level that this machine's processor can run."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "portable"
    flags = set()
    for line in Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines():
        if line.startswith("flags"):
            flags = set(line.replace("avx512_vnni", "avx512vnni").split())
            break
    return next(level for level, needed in LEVELS.items() if flags.issuperset(needed))


def find_library(cache_dir: Path, level: str | None = None) -> Path:
    """Return a compiled library for a level, compiling it if need be. Raises NativeUnavailable."""
    level = level or machine_level()
    prebuilt = PREBUILT / f"arriero-{level}-{source_hash(level)}.so"
    if prebuilt.is_file():
        return prebuilt
    compiler = _find_compiler()
    folder = cache_dir / "native"
    library = folder / f"arriero-{level}-{source_hash(level, _version(compiler))}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(folder)
        if library.is_file():
            _check_owner(library)
            return library
        compile_library(compiler, level, library)
    except OSError as error:
        raise NativeUnavailable(f"cannot write {folder}: {error}") from error
    return library


def source_hash(level: str, compiler_version: str = "") -> str:
    """Return 16 hex digits over all that decides what is compiled."""
    digest = hashlib.sha256(repr((LEVELS[level], FLAGS, compiler_version)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".c", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(
    compiler: str, level: str, library: Path, extra_flags: tuple[str, ...] = ()
) -> None:
    """Compile all sources into a shared library, renamed into place when it is whole."""
    logger.info("compiling the native step for %s, once", level)
    flags = [*FLAGS, *extra_flags, *(f"-m{name}" for name in LEVELS[level])]
    with tempfile.TemporaryDirectory(dir=library.parent) as work:

        def compile_source(source: Path) -> str:
            target = str(Path(work) / f"{source.stem}.o")
            _run([compiler, *flags, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            # The largest first, so that no core waits for it at the end.
            sources = sorted(SOURCES.glob("*.c"), key=lambda path: -path.stat().st_size)
            objects = list(threads.map(compile_source, sources))
        linked = Path(work) / library.name
        _run([compiler, *flags, "-shared", *objects, "-o", str(linked), "-lpthread", "-lm"])
        linked.chmod(0o700)
        linked.replace(library)


def _find_compiler() -> str:
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailable(f"no C compiler found ({', '.join(COMPILERS)})")
    return compiler


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise NativeUnavailable(f"{command[0]} failed: {first}")


def _version(compiler: str) -> str:
    done = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.partition("\n")[0]


def compile_all(folder: Path) -> None:
    """Compile every level that this kind of machine may have; for images."""
    folder.mkdir(parents=True, exist_ok=True)
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    for level in LEVELS if is_x86 else ("portable",):
        library = folder / f"arriero-{level}-{source_hash(level)}.so"
        compile_library(_find_compiler(), level, library)
        library.chmod(0o755)


def _check_owner(path: Path) -> None:
    """Refuse what somebody else could have written."""
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeUnavailable(f"{path} can be written by others; it is not trusted")


if __name__ == "__main__":
    compile_all(PREBUILT)
