"""Ids into text: the same text for every split into pushes, cut at the first stop string."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.text.detokenize import IncrementalDetokenizer
from app.text.output import OutputText
from app.text.stop import StopMatch, StopMatcher
from model.tokenizer import Tokenizer
from tests.text.builders import CHATML, CHATML_TOKENS, byte_level_folder, decoded, load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("output")
    return load(byte_level_folder(folder, CHATML_TOKENS, CHATML, eos="<|im_end|>"))


def first_cut(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """The rule, told by brute force: first complete, then first begun."""
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return min(ends, default=None)


def run_matcher(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher, text = StopMatcher(stops), ""
    for piece in pieces:
        found = matcher.push(piece)
        if isinstance(found, StopMatch):
            return text + found.text, found.stop
        text += found
    return text + matcher.flush(), None


SMALL = st.text(alphabet="ab<é", max_size=30)
STOPS = st.lists(st.text(alphabet="ab<é", min_size=1, max_size=4), min_size=1, max_size=5)


@given(text=SMALL, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=6))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_split_of_a_text_is_cut_at_the_same_place(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    at = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(at)]
    expected = first_cut(text, stops)
    wanted = (text, None) if expected is None else (text[: expected[1]], expected[2])
    assert run_matcher(stops, pieces) == wanted


def test_of_stops_that_begin_alike_the_shorter_wins() -> None:
    assert run_matcher(["abc", "ab"], ["xabc"]) == ("x", "ab")


def test_of_stops_complete_at_one_character_the_longer_wins() -> None:
    assert run_matcher(["b", "aab"], ["xaab"]) == ("x", "aab")


def test_no_more_is_held_back_than_could_become_a_stop() -> None:
    matcher = StopMatcher(["###"])
    assert [matcher.push("a##"), matcher.push("#b"[1:]), matcher.push("##")] == ["a", "##b", ""]


def test_a_repetitive_text_against_repetitive_stops_takes_linear_time() -> None:
    matcher = StopMatcher(["a" * 2000 + "b"])
    steps = 0

    class Counted(dict[str, int]):
        def get(self, key: str, default: int = 0) -> int:  # type: ignore[override]
            nonlocal steps
            steps += 1
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            nonlocal steps
            steps += 1
            return super().__contains__(key)

    matcher._next = [Counted(edges) for edges in matcher._next]
    for _ in range(2000):
        matcher.push("aaaaa")
    assert steps < 5 * 10_000


IDS = st.lists(st.integers(0, 402), max_size=40)


@given(ids=IDS, cuts=st.lists(st.integers(0, 40), max_size=6), data=st.data())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_split_into_pushes_gives_the_decoded_text_cut_at_the_first_stop(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], data: st.DataObject
) -> None:
    kept = [token_id for token_id in ids if not tokenizer.is_special(token_id)]
    text = decoded(tokenizer, kept)
    stops = data.draw(st.lists(st.text(min_size=1, max_size=3), max_size=3))
    if text:
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + data.draw(st.integers(1, 5))])
    expected = first_cut(text, stops)
    at = sorted({0, len(ids), *(min(cut, len(ids)) for cut in cuts)})
    output, got, num_tokens, found = OutputText(tokenizer, stop=stops), "", 0, None
    for start, end in itertools.pairwise(at):
        delta = output.push(ids[start:end])
        got, num_tokens, found = (
            got + delta.text,
            num_tokens + delta.num_tokens,
            found or delta.stop,
        )
    last = output.finish()
    got, found = got + last.text, found or last.stop
    assert got == (text if expected is None else text[: expected[1]])
    assert found == (expected[2] if expected else None)
    if found is None:
        assert num_tokens == len(ids)
    else:
        # The ids that count decode to the stop string; one fewer does not.
        counted = [i for i in ids[:num_tokens] if not tokenizer.is_special(i)]
        assert found in decoded(tokenizer, counted)


@given(ids=IDS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_piece_of_a_stream_is_whole_characters(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.flush()]
    assert "".join(pieces) == decoded(tokenizer, ids)


def test_a_character_of_four_tokens_comes_at_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    output = OutputText(tokenizer)
    assert [output.push([i]).text for i in ids] == ["", "", "", "🙂"]


def test_only_ids_up_to_the_stop_count(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("xyzxyz", add_special_tokens=False)
    delta = OutputText(tokenizer, stop=["z"]).push(ids)
    assert (delta.text, delta.num_tokens, delta.stop) == ("xy", 3, "z")


def test_after_a_stop_nothing_counts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("xyz", add_special_tokens=False)
    output = OutputText(tokenizer, stop=["x"])
    output.push(ids)
    assert [output.push(ids), output.finish()] == [output.push(()), output.push(())]
    assert output.push(ids).num_tokens == 0


def test_the_stop_string_is_given_out_on_demand(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcQQdef", add_special_tokens=False)
    assert OutputText(tokenizer, stop=["QQ"], include_stop=True).push(ids).text == "abcQQ"


def test_held_back_text_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcQ", add_special_tokens=False)
    output = OutputText(tokenizer, stop=["QQ"])
    assert (output.push(ids).text, output.finish().text) == ("abc", "Q")


def test_special_tokens_are_left_out_or_kept(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hi", add_special_tokens=False), tokenizer.added_tokens["<|im_end|>"]]
    assert OutputText(tokenizer).push(ids).text == "hi"
    assert OutputText(tokenizer, skip_special_tokens=False).push(ids).text == "hi<|im_end|>"
