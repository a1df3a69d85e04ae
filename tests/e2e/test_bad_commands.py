"""Bad input to every command: one line that names what is wrong, exit code 2, no traceback, and nothing changed.

What is wrong with `onecard ppo`'s own input is in `test_ppo_bad_input.py`; a full disk in `test_trainer.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.bad_input_material import write_bad_material
from tests.e2e.ppo_material import error_line, tree

SFT = "sft --model {model} --output_dir {tmp}/out --dataset {tmp}/"
DPO = "dpo --model {model} --output_dir {tmp}/out --dataset {tmp}/"
REWARD = "reward --model {model} --output_dir {tmp}/out --dataset {tmp}/"
EVALUATE = "evaluate --model {model} --dataset {tmp}/prompts.jsonl --max_prompts 2 --response_length 4 "
GENERATE = "generate --max_new_tokens 4 --model "
AGAIN = "sft --model {model} --dataset {tmp}/texts.jsonl --output_dir {tmp}/"

# the command's words, and what the line has to say
BAD: dict[str, tuple[str, list[str]]] = {
    # data
    "empty file": (SFT + "empty.jsonl", ["empty.jsonl: the file is empty"]),
    "torn line": (SFT + "torn.jsonl", ["torn.jsonl:2:"]),
    "no object": (SFT + "list.jsonl", ["list.jsonl:1: expected an object, got a list"]),
    "no such file": (SFT + "nowhere.jsonl", ["nowhere.jsonl: no such file"]),
    "unknown kind of file": (SFT + "rows.docx", ["rows.docx: unknown file type '.docx'", ".jsonl"]),
    "folder without a dataset": (SFT + "no-model", ["no-model"]),
    "no rows": (DPO + "header.csv", ["header.csv: no rows"]),
    "no Parquet": (SFT + "garbage.parquet", ["garbage.parquet"]),
    "no text": (SFT + "bytes.jsonl", ["bytes.jsonl"]),
    "half a surrogate": (SFT + "surrogate.jsonl", ["surrogate.jsonl:1: text: not valid Unicode"]),
    "other columns": (SFT + "other-columns.jsonl", ["other-columns.jsonl:1: no column", "question, answer"]),
    "column misspelt": (DPO + "no-rejected.jsonl", ["no-rejected.jsonl:2: no column 'rejected'", "'rejectd'?"]),
    "null": (DPO + "null-chosen.jsonl", ["null-chosen.jsonl:2: chosen is null"]),
    "prompt that is a number": (DPO + "number-prompt.jsonl", ["number-prompt.jsonl:1: prompt", "a number"]),
    "margin that is text": (REWARD + "text-margin.jsonl", ["text-margin.jsonl:1: margin", "a number"]),
    "chat without a template": (SFT + "chats.jsonl", ["has no chat template"]),
    "unknown role": (SFT + "unknown-role.jsonl", ["unknown-role.jsonl:1: messages[0]: unknown role 'robot'"]),
    "nothing is asked": (SFT + "assistant-first.jsonl", ["assistant-first.jsonl:1: messages", "is the assistant's"]),
    "prompt too long": (DPO + "long-prompt.jsonl", ["long-prompt.jsonl:2: prompt longer than max_length"]),
    "a row would be cut": (
        DPO + "pairs.jsonl --max_length 5 --truncation_mode error", ["pairs.jsonl:1:", "max_length"],
    ),
    "score that is text": (REWARD + "text-score.jsonl", ["text-score.jsonl:1: score", "a number"]),
    "score past a sigmoid": (REWARD + "score-of-7.jsonl --score_activation sigmoid", ["score-of-7.jsonl:1: score"]),
    "ranking of one": (REWARD + "lone-ranking.jsonl", ["lone-ranking.jsonl:1: completions"]),
    "two kinds of rows": (REWARD + "mixed-kinds.jsonl", ["mixed-kinds.jsonl:2"]),
    "odd label": (DPO + "odd-label.jsonl --loss_type kto", ["odd-label.jsonl:1: label"]),
    "a lone label": (DPO + "lone-label.jsonl --loss_type kto", ["lone-label.jsonl", "row"]),
    "pairs for kto": (DPO + "pairs.jsonl --loss_type kto", ["pairs.jsonl:1: no column 'completion'"]),
    "labels for dpo": (DPO + "labels.jsonl", ["labels.jsonl:1: no column 'chosen'"]),
    "nothing left to train on": (DPO + "pairs.jsonl --test_size 6", ["test_size: 6 of 6 examples"]),
    "no prompts to answer": (GENERATE + "{model} --dataset {tmp}/texts.jsonl", ["no column 'prompt'"]),
    # settings
    "no dataset": ("sft --model {model} --output_dir {tmp}/out", ["--dataset is missing"]),
    "unknown flag": (SFT + "texts.jsonl --learnig_rate 1", ["--learnig_rate", "--learning_rate"]),
    "no integer": (SFT + "texts.jsonl --max_steps many", ["--max_steps", "'many'"]),
    "nan": (SFT + "texts.jsonl --learning_rate nan", ["--learning_rate", "finite"]),
    "below the least": (SFT + "texts.jsonl --lora_r 0", ["--lora_r", "0"]),
    "no such choice": (SFT + "texts.jsonl --optim sgd", ["--optim", "'sgd'", "adamw_8bit"]),
    "unknown key": (SFT + "texts.jsonl --config {tmp}/unknown-key.yaml", ["'learnig_rate'", "'learning_rate'?"]),
    "YAML list": (SFT + "texts.jsonl --config {tmp}/list.yaml", ["list.yaml holds a list"]),
    "torn YAML": (SFT + "texts.jsonl --config {tmp}/torn.yaml", ["torn.yaml is not YAML"]),
    "wrong value in YAML": (SFT + "texts.jsonl --config {tmp}/bad-value.yaml", ["bad-value.yaml: max_steps", "many"]),
    "no such YAML": (SFT + "texts.jsonl --config {tmp}/nowhere.yaml", ["cannot read", "nowhere.yaml"]),
    "unknown loss": (DPO + "pairs.jsonl --loss_type sigmoyd", ["loss_type", "'sigmoyd'"]),
    "weights of another count": (
        DPO + "pairs.jsonl --loss_type ipo --loss_weights 1 --loss_weights 2", ["loss_weights"],
    ),
    "beta 0": (DPO + "pairs.jsonl --beta 0", ["beta is 0"]),
    "label_smoothing": (DPO + "pairs.jsonl --label_smoothing 0.7", ["label_smoothing", "0.7"]),
    "kto and another": (DPO + "labels.jsonl --loss_type kto --loss_type ipo", ["loss_type", "kto"]),
    "simpo and another": (DPO + "pairs.jsonl --loss_type simpo --loss_type ipo", ["loss_type", "simpo"]),
    "aot in pieces": (
        DPO + "pairs.jsonl --loss_type aot --gradient_accumulation_steps 2", ["gradient_accumulation_steps is 2"],
    ),
    "no epochs": (SFT + "texts.jsonl --num_train_epochs 0", ["num_train_epochs: 0"]),
    "no such layer": (SFT + "texts.jsonl --lora_target_modules flux", ["lora_target_modules", "flux"]),
    "all weights of a 4-bit base": (SFT + "texts.jsonl --no_use_peft --load_in_4bit", ["use_peft", "4-bit"]),
    "all weights in float16": (SFT + "texts.jsonl --no_use_peft --dtype float16", ["dtype", "float16"]),
    "two sources of prompts": (
        GENERATE + "{model} --prompt a --dataset {tmp}/prompts.jsonl", ["--prompt or --dataset"],
    ),
    # models
    "no model": ("sft --dataset {tmp}/texts.jsonl", ["--model is missing"]),
    "no such folder": (GENERATE + "{tmp}/nowhere --prompt a", ["model: no folder", "nowhere"]),
    "folder without a model": (GENERATE + "{tmp}/no-model --prompt a", ["no-model", "config.json"]),
    "torn weights": (GENERATE + "{tmp}/torn-model --prompt a", ["model: cannot load", "torn-model"]),
    "no EOS": (GENERATE + "{tmp}/endless-model --prompt a", ["endless-model", "no EOS"]),
    "adapter without weights": (
        GENERATE + "{tmp}/hollow-adapter --prompt a", ["hollow-adapter has no adapter_model.safetensors"],
    ),
    "adapter whose base is gone": (GENERATE + "{tmp}/orphan --prompt a", ["no folder {tmp}/gone"]),
    "reference that is no adapter": (DPO + "pairs.jsonl --ref_adapter {model}", ["ref_adapter"]),
    "reference of another base": (DPO + "pairs.jsonl --ref_adapter {tmp}/stranger", ["ref_adapter", "other-base"]),
    "policy that is a reward model": (
        "dpo --model {m}/rm/reward --output_dir {tmp}/out --dataset {tmp}/pairs.jsonl", ["model:", "is a reward model"],
    ),
    "reference that is a reward model": (
        DPO + "pairs.jsonl --ref_adapter {m}/rm/reward", ["ref_adapter:", "is a reward model"],
    ),
    "nothing to merge": ("merge --model {model} --output_dir {tmp}/merged", ["merge"]),
    # rewards
    "no such reward": (EVALUATE + "--reward_funcs fluencee", ["reward_funcs", "fluencee", "fluency"]),
    "reward of too few": (EVALUATE + "--reward_funcs {tmp}/few.py:few", ["few.py:few returned a list of 1"]),
    "pattern that is none": (EVALUATE + "--reward_funcs regex:[", ["reward_funcs", "regex"]),
    "reward that is a policy": (EVALUATE + "--reward_model_path {m}/sft/policy", ["reward_model_path", "sft/policy"]),
    "baseline of another base": (EVALUATE + "--baseline {tmp}/nowhere", ["baseline", "nowhere"]),
    # checkpoints and folders
    "a run is there": (AGAIN + "run", ["holds a run already"]),
    "other settings": (
        AGAIN + "run --resume", ["--resume:", "is", "here and"],
    ),
    "a run without settings": (
        AGAIN + "bare-run --resume", ["bare-run", "config.yaml"],
    ),
    "its own data would go": (
        "sft --model {tmp}/run/policy --dataset {tmp}/texts.jsonl --output_dir {tmp}/run --overwrite",
        ["model: {tmp}/run/policy is part of the run"],
    ),
    "a file is there": (AGAIN + "a-file", ["a-file is a file"]),
    "no folder for the answers": (
        GENERATE + "{model} --prompt a --output {tmp}/nowhere/out.jsonl", ["output: {tmp}/nowhere/out.jsonl"],
    ),
    "merged over something": ("merge --model {m}/sft/policy --output_dir {tmp}/run", ["output_dir", "run"]),
    "evaluation over a run": (EVALUATE + "--output_dir {tmp}/run", ["output_dir", "run"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, material: Path) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_bad_material(folder, tiny_model, material)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(onecard, bad, tiny_model, material, monkeypatch, case):
    def filled(text: str) -> str:
        return text.format(tmp=bad, m=material, model=tiny_model)

    monkeypatch.chdir(bad)  # a default such as runs/sft would be seen too
    words, expected = BAD[case]
    before = tree(bad)
    result = onecard(*map(filled, words.split(" ")))
    after = tree(bad)
    shutil.rmtree(bad / "out", ignore_errors=True)  # or a case that fails would make the next ones fail
    line = error_line(result)
    for part in expected:
        assert filled(part) in line, line
    assert after == before
