"""`arriero chat`: what each line does to the conversation, and what is sent."""

import json

import pytest

from app.cli.chat import Chat, load_messages
from app.cli.generate import choices_of
from model.errors import ConfigError
from tests.cli.talk import Typist, connected
from tests.fake_engine import EOS, FakeEngine, says


def asked(engine: FakeEngine) -> str:
    """The last prompt as the model got it."""
    marks = {258: "<", 259: ">"}
    ids = engine.requests[-1].prompt_token_ids
    return "".join(marks.get(i) or chr(i) for i in ids if i < 256 or i in marks)


def talk(lines: list[str], engine: FakeEngine | None = None, **fields) -> tuple[Chat, FakeEngine]:
    """Run a whole conversation."""
    engine = engine or FakeEngine(says("yes"))
    with connected(engine) as connection:
        chat = Chat(connection, fields, Typist(lines))
        chat.run()
    return chat, engine


def test_conversation_grows_and_is_sent_whole(capsys):
    chat, engine = talk(["hi", "and?"])
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert asked(engine) == "<user\nhi><assistant\nyes><user\nand?><assistant\n"
    assert capsys.readouterr().out == "yes\nyes\n"


def test_system_stays_in_front_and_goes_when_empty():
    chat, engine = talk(["/system be brief", "hi", "/system be long", "so?"])
    assert asked(engine).startswith("<system\nbe long><user\nhi>")
    chat, _ = talk(["/system be brief", "hi", "/system"])
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_clear_keeps_system_alone():
    chat, _ = talk(["/system be brief", "hi", "/clear"])
    assert chat.messages == [{"role": "system", "content": "be brief"}]


def test_retry_asks_the_same_with_another_seed():
    answers = iter(["first", "second"])
    engine = FakeEngine(lambda request, sampling: [*next(answers).encode(), EOS])
    chat, _ = talk(["hi", "/retry"], engine, seed=5)
    assert chat.messages[-1] == {"role": "assistant", "content": "second"}
    assert len(chat.messages) == 2
    first, second = [request.sampling[0].seed for request in engine.requests]
    assert first != second


def test_failed_retry_keeps_the_answer_there_was():
    engine = FakeEngine(says("yes"))
    with connected(engine) as connection:
        chat = Chat(connection, {}, Typist())
        chat.turn("hi")
        engine.error = "the step failed"
        chat.command("/retry")
    assert chat.messages[-1] == {"role": "assistant", "content": "yes"}


def test_question_that_failed_is_forgotten_with_a_next_step(capsys):
    chat, _ = talk(["x" * 300, "hi"])
    assert [message["content"] for message in chat.messages] == ["hi", "yes"]
    assert "/clear starts anew" in capsys.readouterr().err


def test_model_without_a_template_is_told_of_generate(capsys):
    engine = FakeEngine(says("yes"))
    with connected(engine, has_template=False) as connection:
        assert not Chat(connection, {}, Typist()).turn("hi")
    assert "arriero generate" in capsys.readouterr().err


def test_stopped_before_a_word_leaves_no_trace(capsys):
    engine = FakeEngine(says("yes"))
    engine.gate.clear()
    typist = Typist()
    typist.stops_answers = True
    with connected(engine) as connection:
        chat = Chat(connection, {}, typist)
        assert not chat.turn("hi")
    assert chat.messages == []
    assert "[stopped]" in capsys.readouterr().err


def test_answer_that_was_cut_says_so(capsys):
    talk(["hi"], max_tokens=2)
    assert "[cut" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_does_not_leave():
    chat, _ = talk([Typist.CTRL_C, "hi"])
    assert len(chat.messages) == 2


def test_exit_leaves():
    chat, _ = talk(["/exit", "hi"])
    assert chat.messages == []


@pytest.mark.parametrize("line", ["/nothing", "/stop", "/retry", "/save", "/help", "/load"])
def test_command_that_can_do_nothing_says_so(line, capsys):
    chat, _ = talk([line])
    assert capsys.readouterr().err
    assert chat.messages == []


def test_saved_conversation_is_loaded_again(tmp_path):
    path = tmp_path / "talk.json"
    chat, _ = talk(["/system é", "hi", f"/save {path}"])
    again, engine = talk([f"/load {path}", "and?"])
    assert again.messages[:3] == chat.messages
    assert asked(engine).endswith("<user\nand?><assistant\n")


def test_save_overwrites_no_file_but_a_conversation(tmp_path, capsys):
    path = tmp_path / "precious"
    path.write_text("precious")
    talk(["hi", f"/save {path}"])
    assert path.read_text() == "precious"
    assert "no conversation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", [[], {"messages": 3}, {"messages": [{"role": "tool", "content": "x"}]},
              {"messages": [{"role": "user", "content": None}]}]
)  # fmt: skip
def test_file_that_is_no_conversation_is_refused(tmp_path, value):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError):
        load_messages(path)


def test_choices_that_are_none_are_left_out():
    assert choices_of({"choices": [1, {"a": 2}]}) == [{"a": 2}]
    assert choices_of({}) == []
