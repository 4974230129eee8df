"""A Jinja sandbox in which a template can neither take long nor make much of little.

Loops and calls look at the clock; operators and filters that multiply are bounded before they do.
The sandbox of Jinja itself keeps templates from code. Knows nothing of chats.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

MAX_SECONDS = 2.0
MAX_CHARS = 16 * 2**20  # of any text in a template, and of any list
MAX_WIDTH = 1000  # that something is padded to
MAX_DIGITS = 1000  # of a power

# Pad or repeat by a number that a template names; no chat template needs them.
_METHODS = frozenset({"center", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"})
_FILTERS = ("center", "urlize", "wordwrap")
_NESTED = re.compile(r"\{[^{}]+\{")  # a width that is an argument itself


class TemplateLimit(jinja2.TemplateError):
    """Raised for a template that takes too long or makes too much."""


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox with limits. Rendering begins with `start`, on the same thread."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._of_thread = threading.local()
        for name in _FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["in_time"] = self._in_time
        self.filters["bounded"] = _bounded
        self.filters["joined"] = _joined
        for name, size_of in _SIZES.items():
            self.filters[name] = _limited(self.filters[name], size_of)

    def start(self) -> None:
        """Give what this thread renders next its time."""
        self._of_thread.deadline_s = time.monotonic() + MAX_SECONDS

    def check_time(self) -> None:
        if time.monotonic() > getattr(self._of_thread, "deadline_s", float("inf")):
            raise TemplateLimit("it takes too long")

    def call(
        self, context: jinja2.runtime.Context, obj: object, /, *args: object, **kwargs: object
    ) -> object:
        """Call what a template calls, if there is time left and it makes no flood of text."""
        self.check_time()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _check_method(text, getattr(method, "__name__", ""), args)
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        is_padding = isinstance(obj, str) and attr in _METHODS
        return not is_padding and super().is_safe_attribute(obj, attr, value)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: object, right: object
    ) -> object:
        """Compute what operators give that can multiply. Raises TemplateLimit."""
        match operator, left, right:
            case "*", (str() | list() | tuple()), int():
                _check(len(left) * right)
            case "*", int(), (str() | list() | tuple()):
                _check(left * len(right))
            case "**", int(), int() if (
                abs(left) > 1 and right * abs(left).bit_length() > MAX_DIGITS
            ):
                raise TemplateLimit("it makes too much of little")
            case "+", (str() | list() | tuple()), (str() | list() | tuple()):
                _check(len(left) + len(right))
            case "%", str(), _:
                _check_format(left)
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Parse a template; put the clock into its loops and bounds around what it joins."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, "in_time")
        for block in tree.find_all(jinja2.nodes.AssignBlock):
            block.filter = _filtered(block.filter, "bounded")
        _bound_joins(tree)
        return tree

    def _in_time(self, items: Iterable[object]) -> "_InTime":
        return _InTime(items, self.check_time)


class _InTime:
    """Items that are given out while there is time."""

    def __init__(self, items: Iterable[object], check_time: Callable[[], None]) -> None:
        self._items = items
        self._check_time = check_time

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[object]:
        return self._checked(iter(self._items))

    def _checked(self, items: Iterator[object]) -> Iterator[object]:
        for item in items:
            self._check_time()
            yield item


def _filtered(node: jinja2.nodes.Node | None, name: str) -> jinja2.nodes.Filter:
    lineno = None if node is None else node.lineno
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=lineno)


def _bound_joins(node: jinja2.nodes.Node) -> None:
    """Have every `~` counted before it is joined."""
    for child in node.iter_child_nodes():
        _bound_joins(child)
    for name, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Concat):
            setattr(node, name, _counted(value))
        elif isinstance(value, list):
            value[:] = [_counted(v) if isinstance(v, jinja2.nodes.Concat) else v for v in value]


def _counted(node: jinja2.nodes.Concat) -> jinja2.nodes.Filter:
    return _filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), "joined")


def _joined(parts: list[object]) -> str:
    texts = [str(part) for part in parts]
    _check(sum(len(text) for text in texts))
    return "".join(texts)


def _bounded(text: str) -> str:
    _check(len(text))
    return text


def _check(size: int) -> None:
    if size > MAX_CHARS:
        raise TemplateLimit("it makes too much of little")


def _check_method(text: str, name: str, args: tuple[object, ...]) -> None:
    if name == "replace" and len(args) > 1:
        _check(_size_of_replace(text, args[0], args[1]))
    elif name == "join" and args:
        _check(_size_of_join(args[0], text))
    elif name == "format":
        _check_format(text)
        if _NESTED.search(text):
            raise TemplateLimit("it pads by too much")


def _check_format(form: str) -> None:
    """Refuse a `%` form that pads by more than a little, or by a number of its arguments'."""
    digits = "".join(char if char.isdigit() else " " for char in form).split()
    if any(len(run) > 3 for run in digits) or re.search(r"%[^a-zA-Z%]*\*", form):
        raise TemplateLimit("it pads by too much")


def _size_of_join(items: object, separator: object = "", *_: object) -> int:
    if not isinstance(items, (str, list, tuple, dict)):
        return len(str(separator))
    return len(items) * len(str(separator)) + sum(len(i) for i in items if isinstance(i, str))


def _size_of_replace(text: object, old: object, new: object, *_: object) -> int:
    return len(str(text)) + (str(text).count(str(old)) * len(str(new)))


def _size_of_indent(text: object, width: object = 4, *_: object) -> int:
    step = len(width) if isinstance(width, str) else width
    if not isinstance(step, int) or step > MAX_WIDTH:
        raise TemplateLimit("it pads by too much")
    return len(str(text)) + (str(text).count("\n") + 1) * step


def _size_of_format(form: object, *_: object) -> int:
    _check_format(str(form))
    return 0


def _size_of_fill(_items: object, count: object, *_: object) -> int:
    return count if isinstance(count, int) else 0


_SIZES: dict[str, Callable[..., int]] = {
    "join": _size_of_join,
    "replace": _size_of_replace,
    "indent": _size_of_indent,
    "format": _size_of_format,
    "batch": _size_of_fill,
    "slice": _size_of_fill,
}


def _limited(function: Callable[..., object], size_of: Callable[..., int]) -> Callable[..., object]:
    """Return a filter that is not begun when what it makes would be too large."""
    passes = getattr(function, "jinja_pass_arg", None)

    def limited(*args: object, **kwargs: object) -> object:
        own = args[1:] if passes else args
        _check(size_of(*own, *kwargs.values()))
        return function(*args, **kwargs)

    if passes:
        limited.jinja_pass_arg = passes  # type: ignore[attr-defined]
    return limited
