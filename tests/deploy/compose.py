"""docker-compose.yml run by a real engine, as a project of its own on free ports."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.bench.process import free_port

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("replicas", "observability")
DEADLINE_S = 180.0


def load_services() -> dict[str, Any]:
    """Return the services of docker-compose.yml by name."""
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]


def need_images(*services: str) -> None:
    """Skip the test unless there is an engine that has the images of these services."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    for name in services:
        image = load_services()[name]["image"]
        asked = subprocess.run(["docker", "image", "inspect", image], capture_output=True)
        if asked.returncode != 0:
            pytest.skip(f"no engine runs, or it has no image {image}")


def compose_command() -> list[str]:
    """Return how compose is called here: the plugin, or the program that came before it."""
    for command in (["docker", "compose"], ["docker-compose"]):
        with_version = [*command, "version"]
        if (
            shutil.which(command[0])
            and not subprocess.run(with_version, capture_output=True).returncode
        ):
            return command
    pytest.skip("docker compose is not installed")


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Return once something is so; what it is waited for stands in the failure."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.2)


class Project:
    """A compose project; `variables` is what a user's .env would hold."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self._command = compose_command()
        self._name = f"arriero-test-{os.getpid()}-{free_port()}"
        self.ports: dict[str, int] = {}
        given = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
        for name, service in given["services"].items():
            if "ports" in service:
                self.ports[name] = free_port()
                inside = service["ports"][0].rpartition(":")[2]
                service["ports"] = [f"127.0.0.1:{self.ports[name]}:{inside}"]
        self._file = folder / "docker-compose.yml"
        self._file.write_text(yaml.safe_dump(given))
        (folder / "env").write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
        self._environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("ARRIERO_") and key != "HF_TOKEN"
        }

    def run(self, *arguments: str) -> str:
        """Run compose with these arguments; returns its standard output."""
        command = [*self._command, "-p", self._name, "-f", str(self._file)]
        command += ["--project-directory", str(ROOT), "--env-file", str(self._file.parent / "env")]
        for profile in PROFILES:
            command += ["--profile", profile]
        done = subprocess.run(
            [*command, *arguments], env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.ports[service]}"

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's containers, whether they run or not."""
        return self.run("ps", "-a", "-q", service).split()

    def log(self, service: str) -> str:
        return self.run("logs", "--no-color", service)

    def close(self) -> None:
        """End all and take the volumes away."""
        self.run("down", "--volumes", "--timeout", "1")


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(container: str) -> dict[str, Any]:
    """Return what the engine knows of a container's state."""
    return json.loads(docker("inspect", "--format", "{{json .State}}", container))


def wait_until_healthy(*containers: str) -> None:
    for each in containers:
        wait_until(
            lambda each=each: state(each)["Health"]["Status"] == "healthy", f"{each} healthy"
        )
