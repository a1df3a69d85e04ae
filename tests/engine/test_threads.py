"""The tokenizers library uses all cores in a command, and one in what a command forks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from onecard.utils import threads

PROGRAM = """
import os, sys
from onecard.data import tokens
from onecard.utils import threads

class Backend:
    def encode_batch_fast(self, texts, add_special_tokens):
        print(os.environ.get("TOKENIZERS_PARALLELISM"))
        return [type("Encoding", (), {"ids": [1]}) for _ in texts]

class Tokenizer:
    backend_tokenizer = Backend()
    def __call__(self, text, **more):
        return {"input_ids": [1]}

if CONFIGURED:
    threads.configure()
tokens.encode_batch(["a", "b"], Tokenizer())
print(os.environ.get("TOKENIZERS_PARALLELISM"), flush=True)
child = os.fork()
if child == 0:
    threads.configure()
    tokens.encode_batch(["a", "b"], Tokenizer())
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("configured", "users", "expected"),
    [
        (True, None, ["true", "false", "false"]),  # in a batch, after it, in a forked process
        pytest.param(True, "false", ["false", "false", "false"], marks=pytest.mark.grid),
        (True, "true", ["true", "true", "true"]),
        (False, None, ["None", "None", "false"]),  # a library's user decides; a forked command does not
    ],
)
def test_batches_are_tokenized_on_all_cores_in_a_command(configured, users, expected):
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {} if users is None else {"TOKENIZERS_PARALLELISM": users}
    program = PROGRAM.replace("CONFIGURED", str(configured))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


COMMAND = """
import contextlib, os
from onecard.commands import cli
with contextlib.suppress(SystemExit):
    cli.main(["--version"])
print(os.environ["OMP_WAIT_POLICY"], os.environ["TOKENIZERS_PARALLELISM"])
"""


def test_a_command_configures_its_threads():
    unset = ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "PASSIVE false"


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ({}, ("PASSIVE", "600")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ({"GOMP_SPINCOUNT": "9"}, ("PASSIVE", "9")),
    ],
)
def test_waiting_threads_spin_shortly_unless_the_user_decides(monkeypatch, users, expected):
    monkeypatch.setattr(os, "environ", {"TOKENIZERS_PARALLELISM": "false", **users})
    threads.configure()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == expected
