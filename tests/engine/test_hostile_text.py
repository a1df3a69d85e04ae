"""Text of data, names and settings that would act on a terminal, a YAML file, a plot or a file's name."""

from __future__ import annotations

import io
import json
import random
import sys
import time
from types import SimpleNamespace

import pytest
import yaml

from onecard.commands import chat
from onecard.reporting import write_run_report
from onecard.reporting.plots import POINTS, label, smooth, thinned
from onecard.utils.errors import OnecardError, visible
from onecard.utils.progress import say

CONTROLS = "\x1b]0;title\x07", "\x1b[2J", "\x9b2J", "a\u202eb", "a\u2028b", "\x85", "\x00", "\ud800"


@pytest.mark.parametrize("text", CONTROLS)
def test_control_characters_are_shown_as_escapes(text, capsys):
    for shown in (visible(text), str(OnecardError(f"dataset: {text} is bad")), visible(text, kept="")):
        assert shown.isprintable()
        shown.encode("utf-8")
    say(text)
    assert visible(capsys.readouterr().err) == capsys.readouterr().err + visible(text) + "\n"


def test_text_of_all_scripts_stays():
    text = "a\tb\n日本語\u3000\u00a0é 👩\u200d🚀"
    assert visible(text) == text


def test_no_text_ends_a_comment_of_a_dry_run(onecard, tmp_path, tiny_model):
    ends = ["\r", "\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]
    words = "".join(f"{end}seed: 7" for end in ends)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": words}) + "\n")
    done = onecard("sft", "--model", tiny_model, "--dataset", tmp_path / "rows.jsonl", "--dry_run", "--test_size", 0)
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["seed"] == 42
    comments = [line for line in done.out.split("\n") if "seed: 7" in line]
    assert len(comments) == 1
    assert comments[0].startswith("# ")
    assert comments[0].isprintable()


def test_a_file_alone_does_not_turn_trust_remote_code_on(onecard, tmp_path, tiny_model):
    (tmp_path / "run.yaml").write_text("trust_remote_code: true\n")
    words = ["generate", "--model", tiny_model, "--prompt", "the cat", "--max_new_tokens", 3,
             "--config", tmp_path / "run.yaml"]  # fmt: skip
    refused = onecard(*words)
    assert refused.code == 2
    assert "--config turns on trust_remote_code" in refused.err
    assert onecard(*words, "--trust_remote_code").code == 0
    assert onecard(*words, "--no_trust_remote_code").code == 0


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"run.yaml has an alias (\*a), expected plain values"),
        ("learning_rate: " + "[" * 100_000, "nested deeper than 8 levels"),
        ("{a: " * 2000, "nested deeper than 8 levels"),
    ],
    ids=["aliases", "lists", "mappings"],
)
def test_yaml_that_grows_is_refused_at_once(onecard, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    began = time.perf_counter()
    done = onecard("sft", "--config", tmp_path / "run.yaml")
    assert done.code == 2
    assert message.replace("\\", "") in done.err
    assert time.perf_counter() - began < 5


def test_standard_output_that_is_no_utf8_loses_nothing(monkeypatch, onecard, tiny_model, tmp_path):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    from onecard.commands import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--model", str(tiny_model), "--prompt", "the cäť", "--max_new_tokens", "3",
                  "--num_generations", "2"])  # fmt: skip
    assert stop.value.code == 0
    sys.stdout.flush()
    assert raw.getvalue().startswith(rb"the c\xe4\u0165 ->")


def test_a_line_of_chat_that_is_no_utf8_is_said_and_skipped(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntw\xff\nthree\n"), encoding="utf-8"))
    heard: list[str] = []
    chat.chat_loop(SimpleNamespace(answer=heard.append))  # type: ignore[arg-type]
    assert heard == ["one", "three"]
    assert "The line is not UTF-8 and was skipped." in capsys.readouterr().err


NAMES = ("rewards/a$b^{$/mean", "x" * 300, r"\frac{", "a\x1b[2Jb", "naïve/日本", "../../up", "a" * 299 + "$")


def test_a_report_is_drawn_for_any_name_of_a_metric(tmp_path):
    rows = [{"step": step, **{name: step * 0.5 for name in NAMES}} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run_report(tmp_path)
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert len(plots) == len(NAMES)
    assert all(name.isascii() and len(name) < 80 for name in plots)
    assert label(r"a$b") == r"a\$b"


def test_curves_of_many_points_keep_their_mean_and_their_spikes():
    draw = random.Random(0)
    values = [draw.random() for _ in range(50_000)]
    values[31_337] = 9.0
    steps = list(map(float, range(len(values))))
    shown = thinned(steps, values)
    assert len(shown[0]) <= POINTS + 2
    assert (31_337.0, 9.0) in zip(*shown, strict=True)
    assert shown[0] == sorted(shown[0])
    reach = 50_000 // 50
    expected = sum(values[20_000 - reach : 20_000 + reach + 1]) / (2 * reach + 1)
    assert smooth(values)[20_000] == pytest.approx(expected, rel=1e-9)
    assert smooth([1.0, 2.0, 6.0]) == pytest.approx([1.5, 3.0, 4.0])
