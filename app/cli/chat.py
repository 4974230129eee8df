"""`arriero chat`: a conversation at the terminal, kept here and sent whole with every turn."""

import argparse
import json
import sys
from pathlib import Path

from app.cli.command import say
from app.cli.connection import Connection, Json, connect
from app.cli.errors import RequestFailed
from app.cli.generate import choices_of, sampling_fields
from app.cli.terminal import Keyboard, shown
from app.settings import Environment
from model.errors import ConfigError

PATH = "/v1/chat/completions"
ROLES = ("system", "user", "assistant")
HELP = """\
/system TEXT  what the model is told to be; without a text: nothing
/retry        have the last answer written anew
/clear        forget the conversation, but not /system
/save FILE    write the conversation as JSON
/load FILE    go on with a conversation that was saved
/stop, Ctrl-C stop an answer; what there is of it stays
/exit, Ctrl-D leave"""

Message = dict[str, str]


def run(args: argparse.Namespace, environment: Environment) -> int:
    """Talk until the user leaves; with --prompt, answer that alone."""
    with connect(args, environment) as connection:
        chat = Chat(connection, sampling_fields(args), Keyboard())
        if args.system:
            chat.command(f"/system {args.system}")
        if args.prompt is not None:
            return 0 if chat.turn(args.prompt) else 1
        if sys.stdin.isatty():
            say("/help lists commands; /exit leaves")
        chat.run()
    return 0


class Chat:
    """The conversation so far, and what a line does to it."""

    def __init__(self, connection: Connection, fields: Json, keyboard: Keyboard) -> None:
        self._connection = connection
        self._fields = fields
        self._keyboard = keyboard
        self._num_retries = 0
        self.messages: list[Message] = []

    def run(self) -> None:
        """Take lines until there are no more, or one says to leave."""
        while True:
            try:
                line = self._keyboard.line().strip()
            except KeyboardInterrupt:
                say("")
                continue
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.turn(line)

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says; what cannot be done is told."""
        name, _, text = line.partition(" ")
        text = text.strip()
        if name == "/help":
            say(HELP)
        elif name == "/system":
            self._set_system(text)
        elif name == "/clear":
            self.messages = self._system()
        elif name == "/retry":
            self._retry()
        elif name in ("/save", "/load"):
            self._with_file(name, text)
        elif name == "/stop":
            say("no answer is being written")
        else:
            say(f"{name} is no command; /help lists them")

    def turn(self, text: str) -> bool:
        """Ask, write the answer as it comes; return whether there was one.

        A question that failed leaves the conversation as it was.
        """
        self.messages.append({"role": "user", "content": text})
        if self._answer():
            return True
        self.messages.pop()
        return False

    def _answer(self) -> bool:
        parts: list[str] = []
        reasons: list[object] = []

        def take(event: Json) -> None:
            for choice in choices_of(event):
                delta = choice.get("delta")
                content = delta.get("content") if isinstance(delta, dict) else None
                if isinstance(content, str):
                    parts.append(content)
                    sys.stdout.write(shown(content))
                    sys.stdout.flush()
                reasons.append(choice.get("finish_reason"))

        body: Json = {"messages": self.messages, **self._fields}
        seed = self._fields.get("seed")
        if isinstance(seed, int):
            body["seed"] = seed + self._num_retries
        failure = ""
        try:
            is_whole = self._connection.stream(PATH, body, take, self._keyboard.watch)
        except RequestFailed as error:
            is_whole, failure = True, str(error)
        if parts:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if failure:
            say(f"arriero: {shown(failure)}{_next_step(failure)}")
            return False
        if not is_whole:
            say("[stopped]")
            if not parts:
                return False
        elif "length" in reasons:
            say("[cut: --max-tokens or the context is used up]")
        self.messages.append({"role": "assistant", "content": "".join(parts)})
        return True

    def _system(self) -> list[Message]:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def _set_system(self, text: str) -> None:
        rest = self.messages[len(self._system()) :]
        self.messages = [{"role": "system", "content": text}] if text else []
        self.messages += rest

    def _retry(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            say("there is no answer yet")
            return
        last = self.messages.pop()
        self._num_retries += 1
        if not self._answer():
            self.messages.append(last)

    def _with_file(self, name: str, text: str) -> None:
        if not text:
            say(f"{name} needs a file's name")
            return
        path = Path(text).expanduser()
        try:
            if name == "/save":
                save_messages(path, self.messages)
            else:
                self.messages = load_messages(path)
        except (ConfigError, OSError) as error:
            say(f"arriero: {error}")
            return
        say(f"{len(self.messages)} messages {'saved to' if name == '/save' else 'from'} {path}")


def save_messages(path: Path, messages: list[Message]) -> None:
    """Write a conversation over nothing but a conversation. Raises ConfigError and OSError."""
    if path.exists():
        load_messages(path)
    path.write_text(
        json.dumps({"messages": messages}, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )


def load_messages(path: Path) -> list[Message]:
    """Read a conversation. Raises ConfigError and OSError."""
    try:
        value = json.loads(path.read_text("utf-8"))
        messages = value["messages"]
        found = [{"role": str(each["role"]), "content": each["content"]} for each in messages]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: is no conversation that /save wrote") from None
    if not all(each["role"] in ROLES and isinstance(each["content"], str) for each in found):
        raise ConfigError(f"{path}: has messages other than texts of system, user and assistant")
    return found


def _next_step(failure: str) -> str:
    if "context" in failure:
        return "\n/clear starts anew"
    if "chat template" in failure:
        return "\n`arriero generate` continues texts without one"
    return ""
