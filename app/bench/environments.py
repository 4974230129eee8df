"""Virtual environments of the peers, made on demand with pip in a cache folder."""

import shutil
import subprocess
import sys
from pathlib import Path

from app.bench.peer import Environment, PeerFault

INSTALL_TIMEOUT_S = 3600


def make_environment(environment: Environment, cache: Path) -> Path:
    """Install unless that is done; returns the environment's python.

    Raises PeerFault with pip's own reason when it cannot be had.
    """
    folder = cache / "env" / environment.name
    stamp = folder / "installed.txt"
    python = folder / "bin" / "python"
    wanted = "\n".join([*environment.requirements, *environment.variables, *environment.without])
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return python
    if not python.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run_logged([sys.executable, "-m", "venv", str(folder)], cache / "logs" / "venv.log")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    run_logged(
        ["env", *environment.variables, *pip, "install", *environment.requirements],
        cache / "logs" / f"install-{environment.name}.log",
        timeout_s=INSTALL_TIMEOUT_S,
    )
    if environment.without:
        log = cache / "logs" / f"uninstall-{environment.name}.log"
        run_logged([*pip, "uninstall", "-y", *environment.without], log)
    stamp.write_text(wanted, "utf-8")
    return python


def run_logged(command: list[str], log: Path, timeout_s: float = INSTALL_TIMEOUT_S) -> None:
    """Run a command to its end, its words into a file. Raises PeerFault with the reason."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        try:
            status = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=timeout_s, check=False
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise PeerFault(f"took more than {timeout_s:.0f} s: see {log}") from error
    if status:
        raise PeerFault(f"{Path(command[0]).name} failed: {_reason(log)} (see {log})")


def _reason(log: Path) -> str:
    """The last line that says error; else the last line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line and "[notice]" not in line] or ["it said nothing"]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-1][:300]
