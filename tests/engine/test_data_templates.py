"""Chat templates as models have them: where an answer ends, thoughts, tools, and today's date."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers.utils import chat_template_utils

from onecard.commands.evaluate import given_answers
from onecard.data import (
    labelled_examples,
    load_rows,
    preference_examples,
    prompt_examples,
    prompt_tokens,
    ranking_examples,
    scored_examples,
)
from onecard.data.templates import answer_end_tokens, closing_token, rendered, template_date, today
from onecard.models.classifier import Classifier
from onecard.rewards.classifier import ClassifierReward
from onecard.rollout import find_stop_tokens
from onecard.utils.errors import OnecardError
from tests.engine.data_material import BOT, CHATML, USER, rows, say, sft, spelled, split
from tests.engine.template_material import FAMILIES, IM, byte_tokenizer, marked, of_family, real_template

# --- where an answer ends


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_ends_with_the_template_s_token(name: str) -> None:
    family, tokenizer = FAMILIES[name], of_family(name)
    [sequence] = sft([{"messages": [USER, BOT, USER, BOT]}], tokenizer, max_length=900).examples
    learned = marked(sequence, tokenizer).split("[[")[1:]
    first, last = (part.split("]]")[0] for part in learned)
    assert last == f"{family.lead}fine{family.trail}{family.end}"
    assert first == (f"{family.lead}fine{family.trail}" if name == "nothing" else last)
    assert sequence.tokens[-1] == tokenizer.convert_tokens_to_ids(family.end)
    assert sequence.response_mask[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_rows_has_the_same_answer(name: str) -> None:
    tokenizer = of_family(name)
    [whole] = sft([{"messages": [USER, BOT]}], tokenizer, max_length=900).examples
    prompt, answers = [USER], [[BOT], [say("assistant", "how")]]
    limit = {"max_length": 900, "skip_bad_rows": False}
    [pair] = preference_examples(rows({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}), tokenizer,
                                 **limit).examples  # fmt: skip
    [ranking] = ranking_examples(rows({"prompt": prompt, "completions": answers}), tokenizer, **limit).examples
    [scored] = scored_examples(rows({"prompt": prompt, "completion": [BOT], "score": 1}), tokenizer, **limit).examples
    labelled = labelled_examples(
        rows(*({"prompt": prompt, "completion": answer, "label": 1} for answer in answers)), tokenizer, **limit
    ).examples
    [learned] = sft([{"prompt": prompt, "completion": [BOT]}], tokenizer, max_length=900).examples
    assert whole == learned == pair.chosen == ranking.sequences[0] == scored.sequence == labelled[0].sequence
    assert pair.rejected == ranking.sequences[1] == labelled[0].mismatched
    assert split(whole)[0] == prompt_tokens((USER,), tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_conversation_ends_at_the_same_token(name: str) -> None:
    tokenizer = of_family(name)
    for messages in ([USER, BOT], [USER, BOT, USER, BOT]):
        [learned] = sft([{"messages": messages}], tokenizer, max_length=900).examples
        [everything] = sft([{"messages": messages}], tokenizer, max_length=900, assistant_only_loss=False).examples
        assert everything.tokens == learned.tokens
        assert all(everything.response_mask)


def test_a_user_s_last_turn_is_learned_to_its_end() -> None:
    tokenizer = of_family("Gemma")
    [sequence] = sft([{"messages": [USER]}], tokenizer, assistant_only_loss=False).examples
    assert spelled(sequence.tokens, tokenizer) == "<s><start_of_turn>user\nHello<end_of_turn>"


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_where_answers_end(name: str) -> None:
    family, tokenizer = FAMILIES[name], of_family(name)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=sorted(tokenizer.generation_eos) or None))
    roles: Any = SimpleNamespace(causal_model=lambda: model)
    expected = {tokenizer.convert_tokens_to_ids(token) for token in (family.eos, *family.listed, family.end)}
    assert find_stop_tokens(roles, tokenizer) == expected == set(answer_end_tokens(tokenizer).ids)
    assert closing_token(tokenizer, chat=True) == tokenizer.convert_tokens_to_ids(family.end)
    assert closing_token(tokenizer, chat=False) == tokenizer.eos_token_id


def test_text_beside_a_template_ends_with_eos() -> None:
    tokenizer = of_family("Gemma")
    [sequence] = sft([{"prompt": "Hello", "completion": " you"}], tokenizer).examples
    assert spelled(split(sequence)[1], tokenizer) == " you</s>"


def test_a_content_that_ends_with_the_end_token_has_it_once() -> None:
    tokenizer = of_family("ChatML beside another EOS")
    for content in ("fine", "fine<|im_end|>", "fine<|im_end|>\n"):
        [sequence] = sft([{"messages": [USER, say("assistant", content)]}], tokenizer).examples
        assert spelled(split(sequence)[1], tokenizer) == "fine<|im_end|>"


def test_a_template_that_wants_a_system_message_shows_its_end() -> None:
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    assert (
        answer_end_tokens(byte_tokenizer(strict, special=IM)).closing
        == answer_end_tokens(byte_tokenizer(CHATML, special=IM)).closing
    )


REAL = {  # of TRL's templates: special tokens, EOS, the learned parts of [Hi, Hello., Bye, See you.]
    "gemma3": (("<start_of_turn>", "<end_of_turn>"), ["Hello.<end_of_turn>", "See you.<end_of_turn>"]),
    "phi3": (("<|user|>", "<|assistant|>", "<|end|>"), ["Hello.<|end|>", "See you.<|end|>"]),
    "llama3_2": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ["Hello.<|eot_id|>", "See you.<|eot_id|>"],
    ),
    "qwen2_5": (IM, ["Hello.<|im_end|>", "See you.<|im_end|>"]),
    "qwen3": (IM, ["<think>\n\n</think>\n\nSee you.<|im_end|>"]),
    "qwen3_5_think": (IM, ["\n</think>\n\nSee you.<|im_end|>"]),
    "deepseek_r1_distill": (
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        ["\n</think>\n\nSee you.<｜end▁of▁sentence｜>"],
    ),
    "nemotron_3_nano": (IM, ["\n</think>\n\nSee you.<|im_end|>"]),
    "gptoss": (
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        ["<|channel|>final<|message|>See you.<|return|>"],
    ),
    "glm4moe": (("<|user|>", "<|assistant|>"), ["\n<think></think>\nHello.", "\n<think></think>\nSee you.</s>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_templates(name: str) -> None:
    """Two answers; those that a template writes without their thought later on are left out, and counted."""
    special, expected = REAL[name]
    tokenizer = byte_tokenizer(real_template(name), special=special)
    messages = [say("user", "Hi"), say("assistant", "Hello."), say("user", "Bye"), say("assistant", "See you.")]
    made = sft([{"messages": messages}], tokenizer, max_length=3000)
    parts = marked(made.examples[0], tokenizer).split("[[")
    assert [part.split("]]")[0] for part in parts[1:]] == expected
    note = "1 of 2 answers are left out: the chat template writes them differently when more messages follow"
    assert made.notes == (() if len(expected) == 2 else (note,))
    if len(expected) == 1:  # behind the prompt that generation is given
        assert split(made.examples[0])[0] == prompt_tokens(tuple(messages[:3]), tokenizer)


# --- thoughts

R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CUTS = R1.replace("assistant\n<think>\n{% endif %}", "assistant\n{% endif %}")  # and its prompt opens no thought
DOUBLES = R1.replace("c.split('</think>')[-1]", "'<think>\n\n</think>\n\n' + c")  # keeps a second thought
EMPTY = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
HEADED = R1.replace("<|im_start|>{{ m.role }}\n", "<{{ m.role }}>").replace("<|im_start|>assistant\n<think>\n",
                                                                           "<assistant>")  # fmt: skip
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."
THOUGHTS = {
    "behind an opened thought": (R1, say("assistant", THOUGHT), "Two and two.\n</think>\n\nFour."),
    "no line break behind the tag": (R1, say("assistant", "<think>Two.</think>Four."), "Two.</think>Four."),
    "no opening tag": (R1, say("assistant", "Two.\n</think>\n\nFour."), "Two.\n</think>\n\nFour."),
    "space before the tag": (R1, say("assistant", f"\n{THOUGHT}"), "Two and two.\n</think>\n\nFour."),
    "a field of its own": (
        R1, say("assistant", "Four.", reasoning_content="Two and two."), "Two and two.\n</think>\n\nFour.",
    ),
    "no thought": (R1, say("assistant", "Four."), "\n</think>\n\nFour."),
    "cut off where none is opened": (CUTS, say("assistant", THOUGHT), THOUGHT),
    "no thought where none is opened": (CUTS, say("assistant", "Four."), "Four."),
    "kept beside an empty one": (DOUBLES, say("assistant", THOUGHT), "Two and two.\n</think>\n\nFour."),
    "behind an empty thought": (EMPTY, say("assistant", "Four."), "Four."),
    "behind a header like a tag": (HEADED, say("assistant", THOUGHT), THOUGHT),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message", "answer"), THOUGHTS.values(), ids=THOUGHTS)
def test_what_is_learned_is_what_is_sampled_behind_the_prompt(template: str, message: Any, answer: str) -> None:
    tokenizer = byte_tokenizer(template, special=IM)
    [sequence] = sft([{"messages": [USER, message]}], tokenizer, max_length=900).examples
    before, after = split(sequence)
    assert before == prompt_tokens((USER,), tokenizer)
    assert spelled(after, tokenizer) == f"{answer}<|im_end|>"


def test_a_thought_behind_an_empty_one_is_a_bad_row() -> None:
    for message in (say("assistant", THOUGHT), say("assistant", "Four.", reasoning_content="Two and two.")):
        with pytest.raises(OnecardError, match=r"messages\[1\] (has its own|does not follow)|ends in closed reason"):
            sft([{"messages": [USER, message]}], byte_tokenizer(EMPTY, special=IM), max_length=900)


def test_answers_written_otherwise_in_a_completion_are_left_out() -> None:
    """With tools in between, a completion has several answers; both sides of the pair keep the same prompt."""
    tokenizer = byte_tokenizer(R1, special=IM)
    chosen = [say("assistant", THOUGHT), say("tool", "4"), say("assistant", THOUGHT)]
    rejected = [say("assistant", "<think>\nNo.\n</think>\n\nFive.")]
    made = preference_examples(rows({"prompt": [USER], "chosen": chosen, "rejected": rejected}), tokenizer,
                               max_length=900, skip_bad_rows=False)  # fmt: skip
    assert made.notes[0].startswith("1 of 3 answers are left out")
    first, second = (marked(each, tokenizer) for each in (made.examples[0].chosen, made.examples[0].rejected))
    assert first.count("[[") == second.count("[[") == 1
    assert first.endswith("<think>\n[[Two and two.\n</think>\n\nFour.<|im_end|>]]")
    assert "assistant\n\n\nFour.<|im_end|>\n" in first  # the first answer, as the template writes it later on
    assert second.endswith("<think>\n[[No.\n</think>\n\nFive.<|im_end|>]]")


def test_keep_end_cuts_no_answer_of_sides_that_begin_apart() -> None:
    tokenizer = byte_tokenizer(CHATML, special=IM)
    forgetful = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '.' }}")
    tokenizer.chat_template = forgetful
    chosen = [say("assistant", "a"), say("user", "b" * 40), say("assistant", "last")]
    made = preference_examples(
        rows({"prompt": [USER], "chosen": chosen, "rejected": [say("assistant", "only")]}), tokenizer,
        max_length=65, truncation_mode="keep_end", skip_bad_rows=False,
    )  # fmt: skip
    assert made.notes[0] == "1 of 1 prompts were cut at their beginning"
    assert marked(made.examples[0].rejected, tokenizer).endswith("[[only<|im_end|>]]")


# --- tools

TOOL = {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "A"}}}
CALLS = say("assistant", "", tool_calls=[CALL])
TOOLS = (
    "{% if tools is not none %}<|im_start|>system\n"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in (m.tool_calls or []) %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFINED = f"<|im_start|>system\n{json.dumps(TOOL)}<|im_end|>\n"
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (lambda *args: sft([row.values for row in args[0]], args[1], max_length=900).examples[0],
            {"messages": [USER, BOT]}),
    "pairs": (lambda *args: preference_examples(*args, max_length=900, skip_bad_rows=False).examples[0].rejected,
              {"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}),
    "scores": (lambda *args: scored_examples(*args, max_length=900, skip_bad_rows=False).examples[0].sequence,
               {"prompt": [USER], "completion": [BOT], "score": 1}),
    "rankings": (lambda *args: ranking_examples(*args, max_length=900, skip_bad_rows=False).examples[0].sequences[1],
                 {"prompt": [USER], "completions": [[BOT], [BOT]]}),
    "labels": (lambda *args: labelled_examples(*args, max_length=900, skip_bad_rows=False).examples[0].mismatched,
               {"prompt": [USER], "completion": [BOT], "label": True}),
    "prompts": (lambda *args: prompt_examples(*args).examples[0], {"prompt": [USER]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON"])
def test_tools_reach_the_template_of_every_kind_of_rows(kind: str, tools: Any) -> None:
    make, record = ROWS[kind]
    tokenizer = byte_tokenizer(TOOLS, special=IM)
    text = spelled(make(rows(*[record | {"tools": tools}] * 2), tokenizer).tokens, tokenizer)
    assert text.startswith(DEFINED)
    for none in (None, [], "[]"):
        text = spelled(make(rows(*[record | {"tools": none}] * 2), tokenizer).tokens, tokenizer)
        assert text.startswith("<|im_start|>user\n")


def test_tools_reach_rewards_and_a_classifier_s_template() -> None:
    tokenizer = byte_tokenizer(TOOLS, special=IM)
    [prompt] = prompt_examples(rows({"prompt": [USER], "tools": [TOOL]}), tokenizer).examples
    assert prompt.columns["tools"] == [TOOL]
    reward = ClassifierReward(Classifier(None, tokenizer, 0, None, None), "reward_model_path")
    assert reward.rendered_chat(prompt, "fine").startswith(DEFINED)


def test_tools_reach_the_template_of_a_perplexity_s_answers() -> None:
    record = {"prompt": [USER], "completion": [BOT], "tools": [TOOL], "score": 1}
    [sequence], _ = given_answers(rows(record), byte_tokenizer(TOOLS, special=IM), 900)
    assert spelled(sequence.tokens, byte_tokenizer(TOOLS, special=IM)).startswith(DEFINED)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", "[{", r"tools: not JSON: Expecting property name"),
        ("tools", {"a": 1}, "tools: expected a list of tools, or its JSON as text, got an object"),
        ("tools", '{"a": 1}', "tools: expected a list of tools, or its JSON as text, got an object"),
        ("tools", ["weather"], r"tools\[0\]: expected an object \(a JSON schema\), got text"),
        ("tools", 3, "tools: expected a list of tools, or its JSON as text, got a number"),
        ("chat_template_kwargs", [1], "chat_template_kwargs: expected an object, or its JSON as text, got a list"),
        ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs: 'tokenize' is reserved; expected names"),
    ],
)
def test_bad_tools_make_a_bad_row(column: str, value: Any, message: str) -> None:
    for make, record in ROWS.values():
        with pytest.raises(OnecardError, match=f"x.jsonl:1: {message}"):
            make(rows(*[record | {column: value}] * 2), byte_tokenizer(TOOLS, special=IM))


def test_beside_plain_text_such_columns_mean_nothing() -> None:
    tokenizer = byte_tokenizer(TOOLS, special=IM)
    [prompt] = prompt_examples(rows({"prompt": "Hello", "tools": 3}), tokenizer).examples
    assert prompt.text == "Hello"
    assert prompt.columns == {"tools": 3}


def test_a_message_with_calls_needs_no_content() -> None:
    tokenizer = byte_tokenizer(TOOLS, special=IM)
    told = [USER, CALLS, say("tool", "sunny"), BOT]
    expected = sft([{"messages": told}], tokenizer, max_length=900).examples
    assert marked(expected[0], tokenizer).count("[[") == 2
    for calls in ({**CALLS, "content": None}, {key: CALLS[key] for key in ("role", "tool_calls")}):
        assert sft([{"messages": [USER, calls, *told[2:]]}], tokenizer, max_length=900).examples == expected


def test_a_template_that_needs_a_content_is_given_an_empty_one() -> None:
    tokenizer = byte_tokenizer(TOOLS.replace("{{ m.content or '' }}", "{{ '' + m.content }}"), special=IM)
    [given] = sft([{"messages": [USER, CALLS]}], tokenizer, max_length=900).examples
    [null] = sft([{"messages": [USER, {**CALLS, "content": None}]}], tokenizer, max_length=900).examples
    assert null == given


@pytest.mark.parametrize("calls", [None, []])
def test_no_content_and_no_calls_is_a_bad_row(calls: Any) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    with pytest.raises(OnecardError, match=r"messages\[1\]: content is null"):
        sft([{"messages": [USER, message]}], byte_tokenizer(TOOLS, special=IM))


def test_what_a_template_does_not_write_of_tools_is_said() -> None:
    """Tools: a note. Calls: a bad row, since nothing would be learned, also where tools name the function."""
    tokenizer = byte_tokenizer(CHATML, special=IM)
    made = sft([{"messages": [USER, BOT], "tools": [TOOL]}, {"messages": [USER, BOT]}], tokenizer, max_length=900)
    assert made.notes == ("1 of 2 rows have tools, which the chat template does not write",)
    for template in (CHATML, TOOLS.replace("m.tool_calls or []", "[]")):
        with pytest.raises(OnecardError, match="chat template: it does not write the tool calls of the messages"):
            sft([{"messages": [USER, CALLS], "tools": [TOOL]}], byte_tokenizer(template, special=IM), max_length=900)


def test_parquet_s_nulls_in_tools_do_not_reach_the_template(tmp_path: Any) -> None:
    """Of two tools, or calls, with other keys each; a null that JSON spells out stays."""
    other = {"type": "function", "function": {"name": "time", "parameters": {"zone": "A"}}}
    call = {"type": "function", "function": {"name": "time", "arguments": {"zone": "A"}}}
    table = [{"messages": [USER, say("assistant", "", tool_calls=[one])], "tools": [tool]}
             for tool, one in ((TOOL, CALL), (other, call))]  # fmt: skip
    table = copy.deepcopy(table)  # the tools and calls are the module's
    table[0]["tools"][0]["function"]["parameters"] = {"city": "A"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    tokenizer = byte_tokenizer(TOOLS, special=IM)
    made = [sft([row.values for row in load_rows(str(tmp_path / f"rows.{ending}"), split="train")], tokenizer,
                max_length=900).examples for ending in ("parquet", "jsonl")]  # fmt: skip
    assert made[0] == made[1]
    table[0]["tools"][0]["function"]["parameters"] = {"city": None}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    [first, _] = load_rows(str(tmp_path / "rows.jsonl"), split="train")
    assert first.values["tools"][0]["function"]["parameters"] == {"city": None}


@pytest.mark.parametrize("given", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_a_row_s_variables_reach_the_template(given: Any) -> None:
    tokenizer = byte_tokenizer(real_template("qwen3"), special=IM)
    record = {"messages": [USER, BOT], "chat_template_kwargs": given}
    [sequence] = sft([record], tokenizer, max_length=900).examples
    assert marked(sequence, tokenizer).endswith("assistant\n<think>\n\n</think>\n\n[[fine<|im_end|>]]")


# --- today's date

DATED = "{{ strftime_now('%d %b %Y, %H:%M') }}\n" + CHATML


class Clock:
    """A fixed day for the clock that transformers gives to templates."""

    def __init__(self, *day: int) -> None:
        self.day = datetime(*day, 15, 30)

    def now(self) -> datetime:
        return self.day


def test_a_date_that_is_set_is_every_template_s_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Clock(2026, 11, 30))
    tokenizer = byte_tokenizer(DATED, special=IM)
    assert today() == "2026-11-30"
    assert rendered((USER,), tokenizer).startswith("30 Nov 2026, 15:30\n")
    with template_date("2024-07-26"):
        assert rendered((USER,), tokenizer).startswith("26 Jul 2024, 00:00\n")
        assert today() == "2026-11-30"
        with pytest.raises(OnecardError, match="chat template: no"):
            sft([{"messages": [USER, BOT]}], byte_tokenizer(DATED + "{{ raise_exception('no') }}", special=IM))
    assert rendered((USER,), tokenizer).startswith("30 Nov 2026, 15:30\n")
