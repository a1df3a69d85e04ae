"""`onecard chat`: what is written, what is remembered and forgotten, and what an interrupt does."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest

from onecard.commands import chat as module
from onecard.commands.chat import REPLACEMENT, AnswerStream, Chat, Conversation, Turn
from onecard.config import ChatConfig
from onecard.models.build import load_frozen_role
from onecard.models.load import load_tokenizer
from tests.e2e.ppo_material import error_line

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def says(monkeypatch, onecard):
    """`says(model, "a line", "/quit", flag=value)`: the command, with these lines on standard input."""

    def run(model: Path, *lines: str, **flags: object):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        return onecard("chat", "--model", model, *words)

    return run


@pytest.fixture
def speaking(tmp_path, tiny_model) -> Path:
    """The tiny model with a chat template."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "speaking"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def make(model: Path, max_prompt_tokens: int | None = None, **settings) -> Chat:
    config = ChatConfig(model=str(model), **settings)
    return Chat(config, load_frozen_role(config, role="policy"), load_tokenizer(config), max_prompt_tokens)


# --- what is written


def test_the_first_answer_is_what_generate_says(says, onecard, tinystories):
    words = {"max_new_tokens": 24, "temperature": 0}
    result = says(tinystories, "Once upon a time, there was a", **words)
    assert result.code == 0, result.err
    expected = onecard(
        "generate", "--model", tinystories, "--prompt", "Once upon a time, there was a",
        "--max_new_tokens", 24, "--temperature", 0,
    ).out  # fmt: skip
    assert result.out.strip() == expected.strip()
    assert result.err.count("no chat template") == 1


def test_the_seed_decides_and_blank_lines_are_no_turns(says, tinystories):
    lines = ["Lily", "", "   ", "Tom"]
    first = says(tinystories, *lines, max_new_tokens=8)
    assert len(first.out.splitlines()) >= 2
    assert says(tinystories, "Lily", "Tom", max_new_tokens=8).out == first.out
    assert says(tinystories, *lines, max_new_tokens=8, seed=1).out != first.out


@pytest.mark.parametrize("model", ["tiny_model", "stories260k", "tinystories"])
def test_characters_of_several_tokens_are_written_whole(request, model):
    """Byte by byte, with a prompt before it: no half of a character is written, and nothing twice or never."""
    tokenizer = load_tokenizer(ChatConfig(model=str(request.getfixturevalue(model))))
    text = " caf\u00e9 \u6f22\u5b57 \U0001f642 end"
    prompt, tokens = tokenizer.encode("Once"), tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    expected = expected[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]
    pieces: list[str] = []
    voice = AnswerStream(tokenizer, prompt, pieces.append)
    for token in tokens:
        voice.on_token(token)
        assert REPLACEMENT not in "".join(pieces)
    assert voice.end() == "".join(pieces) == expected
    assert len(pieces) > 5


def test_an_unfinished_character_is_written_at_the_end(tiny_model):
    tokenizer = load_tokenizer(ChatConfig(model=str(tiny_model)))
    tokens = tokenizer.encode("a\u6f22", add_special_tokens=False)
    pieces: list[str] = []
    voice = AnswerStream(tokenizer, tokenizer.encode("b"), pieces.append)
    for token in tokens[:-1]:
        voice.on_token(token)
    assert "".join(pieces) == "a"
    assert voice.end() == "".join(pieces) == f"a{REPLACEMENT}"


def test_tokens_are_written_one_by_one_as_they_are_drawn(tinystories, monkeypatch):
    talker = make(tinystories, max_new_tokens=12, temperature=0.0)
    passes, written = [], []
    handle = talker.roles.causal_model().register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(module, "write", lambda text: written.append((len(passes), text)))
    talker.answer("Once upon a time")
    handle.remove()
    assert [count for count, _ in written[:-1]] == sorted({count for count, _ in written[:-1]})  # one for each pass
    assert len(written) > 8


# --- what is remembered


def test_plain_text_goes_on_from_all_lines_and_answers():
    known = Conversation("", (Turn("Once", " upon a time."), Turn("Tom")), template=False)
    assert known.prompt() == "Once upon a time.\nTom"


def test_a_template_is_given_the_whole_conversation(speaking, monkeypatch):
    """What is asked of the model, as text, over two turns and a reset."""
    monkeypatch.setattr(module, "write", lambda text: None)
    talker = make(speaking, max_new_tokens=4, system="be good")
    talker.answer("hi")
    answer = talker.conversation.turns[0].answer
    talker.answer("so?")
    asked = talker.conversation
    before = Conversation(asked.system, asked.turns[:1]).with_line("so?")
    text = talker.tokenizer.decode(talker.tokens_of(before))
    assert text == f"<system>be good</s><user>hi</s><assistant>{answer}</s><user>so?</s><assistant>"
    assert len(asked.turns) == 2
    talker.reset()
    assert talker.conversation == Conversation("be good")


def test_a_reset_forgets(says, tinystories):
    words = {"max_new_tokens": 12, "temperature": 0}
    alone = says(tinystories, "Lily", **words).out
    both = says(tinystories, "Tom saw a dog.", "Lily", **words).out
    reset = says(tinystories, "Tom saw a dog.", "/reset", "Lily", "/quit", "never said", **words)
    assert reset.out.endswith(alone)
    assert not both.endswith(alone)
    assert "Started a new conversation." in reset.err.splitlines()[-1]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(says, tiny_model):
    """128 tokens, of which 40 are for the answer: three lines with their answers do not fit."""
    line = "a good answer sat on the mat x y z"
    result = says(tiny_model, line, line, line, max_new_tokens=40)
    assert result.code == 0, result.err
    assert result.err.count("which no longer fit into the model's context") >= 1

    talker = make(tiny_model, max_prompt_tokens=20)
    talker.conversation = Conversation("", (Turn("abcdefgh", "ijkl"), Turn("m", "n")), template=False)
    kept, tokens = talker.drop_oldest_turns(talker.conversation.with_line("opqr"))  # a token for each character
    assert len(tokens) == 20
    assert [turn.line for turn in kept.turns] == ["abcdefgh", "m", "opqr"]
    kept, tokens = talker.drop_oldest_turns(talker.conversation.with_line("opqrs"))
    assert [turn.line for turn in kept.turns] == ["m", "opqrs"]
    assert len(tokens) == 8


def test_a_line_that_never_fits_is_not_taken_and_the_next_one_is(says, tiny_model):
    result = says(tiny_model, "x y z " * 60, "the cat", max_new_tokens=8)
    assert result.code == 0
    assert "the line was skipped: its prompt has" in result.err
    assert result.out.strip()


# --- commands, interrupts, mistakes


def test_an_unknown_command_is_named_and_not_sent_to_the_model(says, tiny_model):
    result = says(tiny_model, "/rest", max_new_tokens=4)
    assert "/rest: unknown command, expected /reset or /quit. Did you mean '/reset'?" in result.err
    assert result.out == ""


def test_ctrl_c_stops_the_answer_and_not_the_program(says, tinystories, monkeypatch):
    """What was written until then is what the answer was."""
    written: list[str] = []

    def interrupted(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt
        print(text, end="")

    monkeypatch.setattr(module, "write", interrupted)
    kept: list[Conversation] = []
    original = Chat.answer
    monkeypatch.setattr(Chat, "answer", lambda self, line: (original(self, line), kept.append(self.conversation)))
    result = says(tinystories, "Once upon a time", "Tom", max_new_tokens=16)
    assert result.code == 0, result.err
    assert len(kept) == 2
    first = kept[0].turns[0].answer
    assert 0 < len(first) < 40
    assert kept[1].turns[0].answer == first
    assert len(kept[1].turns[1].answer) > len(first)


def test_ctrl_c_at_the_prompt_says_how_to_leave(monkeypatch, capsys):
    def raising(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", raising)
    assert module.read_line() == ""
    assert "/quit or Ctrl-D" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"system": "be good"}, "system: the model's tokenizer has no chat template"),
        ({"top_p": 1.5}, "top_p: 1.5, expected 0 to 1"),
    ],
)
def test_what_cannot_be_done_is_one_line(says, tiny_model, flags, message):
    assert message in error_line(says(tiny_model, "a", **flags))


def test_an_answer_takes_half_of_a_small_context_at_most(says, tiny_model):
    """The default is 256 tokens, and this model has 128 positions in all."""
    result = says(tiny_model, "the cat")
    assert "max_new_tokens: 64 instead of 256, half of the model's context of 128." in result.err
    assert result.code == 0
    assert result.out.strip()
