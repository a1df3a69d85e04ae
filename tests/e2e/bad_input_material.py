"""Files, models and runs that cannot be used, for the table of bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.e2e.ppo_material import write_rows

PAIR = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]

ROWS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"text": f"the cat sat on {i}"} for i in range(6)],
    "pairs": [{**PAIR, "prompt": f"the cat {i}"} for i in range(6)],
    "no-rejected": [PAIR, {"prompt": "a", "chosen": " b", "rejectd": " c"}],
    "null-chosen": [PAIR, {**PAIR, "chosen": None}],
    "number-prompt": [{**PAIR, "prompt": 7}],
    "text-margin": [{**PAIR, "margin": "much"}],
    "long-prompt": [PAIR, {**PAIR, "prompt": "the cat " * 200}],
    "chats": [{"messages": CHAT}],
    "unknown-role": [{"messages": [{"role": "robot", "content": "a"}, CHAT[1]]}],
    "assistant-first": [{"messages": [CHAT[1]]}],
    "other-columns": [{"question": "a", "answer": "b"}],
    "scores": [{"prompt": f"the {i}", "completion": " cat", "score": i / 6} for i in range(6)],
    "text-score": [{"prompt": "a", "completion": " b", "score": "high"}],
    "score-of-7": [{"prompt": "a", "completion": " b", "score": 7}, {"prompt": "c", "completion": " b", "score": 0}],
    "lone-ranking": [{"prompt": "a", "completions": [" b"]}],
    "mixed-kinds": [PAIR, {"prompt": "a", "completion": " b", "score": 0.5}],
    "labels": [{"prompt": f"the {i}", "completion": " cat", "label": i % 2 == 0} for i in range(6)],
    "odd-label": [
        {"prompt": "a", "completion": " b", "label": "good"},
        {"prompt": "b", "completion": " b", "label": 1},
    ],
    "lone-label": [{"prompt": "a", "completion": " b", "label": True}],
    "prompts": [{"prompt": f"the {i}"} for i in range(6)],
}
FILES = {
    "empty.jsonl": b"",
    "torn.jsonl": b'{"text": "a"}\n{"text": "b',
    "list.jsonl": b"[1, 2]\n",
    "garbage.parquet": b"PAR1 this is not one",
    "header.csv": b"prompt,chosen,rejected\n",
    "surrogate.jsonl": b'{"text": "a \\ud800 b"}\n',
    "bytes.jsonl": b"\xff\xfe\x00\x01\n",
    "rows.docx": b"PK",
    "unknown-key.yaml": b"learnig_rate: 0.1\n",
    "list.yaml": b"- 1\n",
    "torn.yaml": b"a: [1\n",
    "bad-value.yaml": b"max_steps: many\n",
    "few.py": b"def few(completions, **kwargs):\n    return [1.0]\n",
}


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_bad_material(folder: Path, tiny_model: Path, material: Path) -> None:
    """Everything that the table names, under `folder`."""
    for name, rows in ROWS.items():
        write_rows(folder / f"{name}.jsonl", rows)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "no-model").mkdir()
    (folder / "a-file").write_text("mine")
    shutil.copytree(tiny_model, folder / "torn-model")
    weights = folder / "torn-model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(tiny_model, folder / "endless-model")
    for path in (folder / "endless-model").glob("*token*.json"):
        if path.name != "tokenizer.json":
            values = json.loads(path.read_text())
            path.write_text(json.dumps({name: value for name, value in values.items() if "eos" not in name}))
    shutil.copytree(material / "sft" / "policy", folder / "hollow-adapter")
    (folder / "hollow-adapter" / "adapter_model.safetensors").unlink()
    shutil.copytree(material / "sft" / "policy", folder / "orphan")
    change_json(folder / "orphan" / "adapter_config.json", base_model_name_or_path=str(folder / "gone"))
    shutil.copytree(tiny_model, folder / "other-base")
    shutil.copytree(material / "sft" / "policy", folder / "stranger")
    change_json(folder / "stranger" / "adapter_config.json", base_model_name_or_path=str(folder / "other-base"))
    shutil.copytree(material / "sft", folder / "run")
    shutil.copytree(material / "sft", folder / "bare-run")
    (folder / "bare-run" / "config.yaml").unlink()
