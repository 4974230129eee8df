"""Runs the checks of every client on every server, and prints a table of them."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.environments import CLIENTS, Client, cache_folder, command_of, version_of
from tests.clients.servers import FLAVOURS, KEY, flags_of, serving

LIMIT_S = 900  # for all checks of one client on one server
# Nothing calls home, and nothing goes through a proxy.
QUIET = {
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
}
Results = dict[str, str | None]  # by check; None is a pass


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/clients", description=__doc__)
    names = [client.name for client in CLIENTS]
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--server", action="append", choices=[*FLAVOURS], help="one or more; default: all"
    )
    given = parser.parse_args()
    if unknown := set(given.clients) - set(names):
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [client for client in CLIENTS if client.name in (given.clients or names)]
    flavours = given.server or [*FLAVOURS]
    commands = {client.name: command_of(client, _tell) for client in chosen}
    found: dict[str, dict[str, Results]] = {client.name: {} for client in chosen}
    logs = cache_folder() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for flavour in flavours:
            flags = flags_of(flavour, Path(scratch))
            with serving(flags, logs / f"server-{flavour}.log") as url:
                for client in chosen:
                    log = logs / f"{client.name}-{flavour}.log"
                    found[client.name][flavour] = _run(commands[client.name], url, log)
    is_good = _print(chosen, flavours, found)
    _tell(f"logs are in {logs}")
    sys.exit(0 if is_good else 1)


def _tell(text: str) -> None:
    sys.stderr.write(f"clients: {text}\n")


def _run(command: tuple[list[str | Path], dict[str, str]], url: str, log: Path) -> Results:
    """Run a client's checks; a client that does not come to its end has failed."""
    words, more = command
    environment = {**os.environ, **QUIET, **more}
    results: Results = {}
    with log.open("w", encoding="utf-8") as err:
        process = subprocess.Popen(
            [*words, url, "model", KEY],
            stdout=subprocess.PIPE,
            stderr=err,
            env=environment,
            text=True,
        )
        try:
            out, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
    for line in out.splitlines():
        if line.startswith('{"check"'):
            told = json.loads(line)
            results[told["check"]] = told["reason"]
    if process.returncode or not results:
        results["comes to its end"] = f"exit code {process.returncode}; see {log}"
    return results


def _print(chosen: list[Client], flavours: list[str], found: dict[str, dict[str, Results]]) -> bool:
    """Print the table, then the reasons; say whether all passed."""
    width = max(len(c) for of in found.values() for r in of.values() for c in r)
    head = f"{'client':26}{'check':{width + 2}}" + "".join(f"{f:14}" for f in flavours)
    lines, reasons = [head], []
    for client in chosen:
        of = found[client.name]
        title = f"{client.name} {version_of(client)}"
        for check in dict.fromkeys(check for results in of.values() for check in results):
            cells = ""
            for flavour in flavours:
                reason = of[flavour].get(check, "not run")
                cells += f"{'ok' if reason is None else 'FAILED':14}"
                if reason is not None:
                    reasons.append(f"{client.name} on {flavour}: {check}\n    {reason}")
            lines.append(f"{title:26}{check:{width + 2}}{cells}".rstrip())
    sys.stdout.write("\n".join([*lines, "", *reasons, f"{len(reasons)} failed", ""]))
    return not reasons


if __name__ == "__main__":
    main()
