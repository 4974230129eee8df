"""The clients, and an environment for each under the cache folder; none touches the project's."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Client:
    """A library, what to install for it, and the file that checks it."""

    name: str
    packages: tuple[str, ...]
    file: str

    @property
    def is_node(self) -> bool:
        return self.file.endswith(".cjs")


CLIENTS = (
    Client(name="openai-2", packages=("openai>=2,<3",), file="check_openai.py"),
    Client(name="openai-3", packages=("openai>=3,<4",), file="check_openai.py"),
    Client(name="langchain-openai", packages=("langchain-openai",), file="check_langchain.py"),
    Client(name="instructor", packages=("instructor",), file="check_instructor.py"),
    Client(name="litellm", packages=("litellm", "mcp"), file="check_litellm.py"),
    Client(name="pydantic-ai", packages=("pydantic-ai-slim[openai]",), file="check_pydantic_ai.py"),
    Client(name="openai-node", packages=("openai", "zod"), file="check_node.cjs"),
)


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "arriero" / "clients"


def python_of(name: str, packages: tuple[str, ...], tell: Callable[[str], None]) -> Path:
    """Return the interpreter of an environment that holds `packages`; make it if need be."""
    folder = cache_folder() / name
    python, stamp = folder / "bin" / "python", folder / "arriero-stamp"
    wanted = "\n".join(packages)
    if not (stamp.is_file() and stamp.read_text("utf-8") == wanted):
        tell(f"installing {' '.join(packages)} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, "-U", "pip"], check=True)  # the one of venv may resolve for hours
        subprocess.run([*pip, *packages], check=True)
        stamp.write_text(wanted, "utf-8")
    return python


def command_of(
    client: Client, tell: Callable[[str], None]
) -> tuple[list[str | Path], dict[str, str]]:
    """Return the command that runs a client's checks, and what it needs in its environment."""
    if not client.is_node:
        return [python_of(client.name, client.packages, tell), HERE / client.file], {}
    folder = cache_folder() / client.name
    if not all((folder / "node_modules" / package).is_dir() for package in client.packages):
        tell(f"installing {' '.join(client.packages)} into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        npm = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", folder]
        subprocess.run([*npm, *client.packages], check=True)
    return ["node", HERE / client.file], {"NODE_PATH": str(folder / "node_modules")}


def version_of(client: Client) -> str:
    """Return the version installed of a client's first package."""
    package = client.packages[0].partition(">")[0].partition("[")[0]
    folder = cache_folder() / client.name
    if client.is_node:
        code = f"console.log(require('{folder}/node_modules/{package}/package.json').version)"
        command: list[str | Path] = ["node", "-e", code]
    else:
        code = f"from importlib.metadata import version; print(version('{package}'))"
        command = [folder / "bin" / "python", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()
