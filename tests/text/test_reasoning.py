"""Thought and answer told apart, however the text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.text.reasoning import ReasoningSplitter, detect_think_tags
from app.text.tools.reader import MAX_HELD

TAGS = ("<think>", "</think>")


def part(pieces, *, starts_inside: bool = False) -> tuple[str, str]:
    """Return all reasoning and all content of a text in pieces."""
    splitter = ReasoningSplitter(*TAGS, starts_inside=starts_inside)
    parted = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    return "".join(p.reasoning for p in parted), "".join(p.content for p in parted)


CASES = [
    # text, starts inside, reasoning, content
    ("", False, "", ""),
    ("", True, "", ""),
    ("Hello there", False, "", "Hello there"),
    ("<think>\nLet me see.\n</think>\n\nIt is 4.\n", False, "Let me see.", "It is 4.\n"),
    ("  \n<think>a  b</think>c  d", False, "a  b", "c  d"),
    ("\nLet me see.\n</think>\n\nIt is 4.", True, "Let me see.", "It is 4."),
    ("<think></think>yes", False, "", "yes"),
    ("<think>\n\n</think>\n\nyes", False, "", "yes"),
    ("<think>cut by length", False, "cut by length", ""),
    ("cut by length </thi", True, "cut by length </thi", ""),
    ("<think>a <think> b</think>c", False, "a <think> b", "c"),
    ("<think>if a < b </ c</think>d", False, "if a < b </ c", "d"),
    ("An answer may say <think>x</think>.", False, "", "An answer may say <think>x</think>."),
    ("<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
    ("</think>x", False, "", "</think>x"),
    ("<th", False, "", "<th"),
    ("   ", False, "", "   "),
    ("   ", True, "", ""),
    ("<think>a</think>", False, "a", ""),
    ("<think>a</think>  \n ", False, "a", ""),
    ("<THINK>a</THINK>", False, "", "<THINK>a</THINK>"),
    ("<t hello", False, "", "<t hello"),
    (" </ x  y ", False, "", " </ x  y "),
]


@pytest.mark.parametrize(("text", "starts_inside", "reasoning", "content"), CASES)
def test_reasoning_and_content_are_told_apart_at_any_split(text, starts_inside, reasoning, content):
    assert part([text], starts_inside=starts_inside) == (reasoning, content)
    assert part(text, starts_inside=starts_inside) == (reasoning, content)
    for place in range(len(text)):
        pieces = [text[:place], text[place:]]
        assert part(pieces, starts_inside=starts_inside) == (reasoning, content)


def test_thought_and_answer_are_given_out_while_they_come():
    splitter = ReasoningSplitter(*TAGS, starts_inside=False)
    assert splitter.push("<think>first").reasoning == "first"
    assert splitter.push(" second").reasoning == " second"
    assert splitter.push("</think> one").content == "one"
    assert splitter.push(" two").content == " two"


def test_tags_are_found_in_a_template():
    assert detect_think_tags("{{ '<think>\\n' }}{{ content.split('</think>')[-1] }}") == TAGS
    assert detect_think_tags("{{ '</thinking>' }}") == ("<thinking>", "</thinking>")
    assert detect_think_tags("{{ message.content }}") is None
    assert detect_think_tags(None) is None


PIECES = ("<think>", "</think>", "<", "</", "<t", "think>", " ", "\n", "a", "b c", "é", ">")


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PIECES), max_size=20),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=20),
    starts_inside=st.booleans(),
)
def test_any_text_is_parted_alike_at_any_split_and_loses_no_letter(parts, sizes, starts_inside):
    text = "".join(parts)
    whole = part([text], starts_inside=starts_inside)
    assert part(text, starts_inside=starts_inside) == whole
    pieces, place = [], 0
    while place < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[place : place + size])
        place += size
    assert part(pieces, starts_inside=starts_inside) == whole
    kept, said = ("".join("".join(half).split()) for half in (whole, [text]))
    missing = len(said) - len(kept)
    assert missing in (0, len(TAGS[0]), len(TAGS[1]), len(TAGS[0]) + len(TAGS[1]))


@pytest.mark.parametrize("text", ["", "x", "<think>", "<think>x", "<think>x</think>y"])
def test_white_space_held_back_is_bounded(text):
    splitter = ReasoningSplitter(*TAGS, starts_inside=False)
    splitter.push(text)
    parted = splitter.push("x" + " " * (3 * MAX_HELD))
    assert len(parted.reasoning) + len(parted.content) > 2 * MAX_HELD
