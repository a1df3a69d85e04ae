"""What docs/dpo.md and docs/trl.md promise: every loss, setting and name in them is there."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from onecard.algorithms.dpo.variants import SUMMABLE_VARIANT, pick_variant
from onecard.config import DPOConfig, PPOConfig
from onecard.config.dpo import UNSUMMABLE
from onecard_kernels.dpo.losses import LOSSES

DOCS = Path(__file__).parents[2] / "docs"
NONE = "–"


def sections(name: str) -> dict[str, str]:
    """`heading -> text` of a page."""
    _, *parts = re.split(r"^## (.+)$", (DOCS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """Cells of a section's table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def settings(kind: type) -> set[str]:
    return {item.name for item in fields(kind)}


TRL = {
    "DPOConfig": ("trl", DPOConfig),
    "CPOConfig": ("trl.experimental.cpo", DPOConfig),
    "ORPOConfig": ("trl.experimental.orpo", DPOConfig),
    "KTOConfig": ("trl", DPOConfig),
    "PPOConfig": ("", PPOConfig),
}


@pytest.mark.parametrize("name", [*TRL, "Every trainer"])
def test_every_name_of_ours_is_a_setting(name):
    ours = settings(TRL[name][1]) if name in TRL else settings(DPOConfig) & settings(PPOConfig)
    table = rows(sections("trl.md")[name])
    assert len(table) > 8
    for theirs, mine, _ in table:
        assert len(names(theirs)) == 1, theirs
        assert mine == NONE or (len(names(mine)) == 1 and names(mine)[0] in ours), (theirs, mine)


@pytest.mark.parametrize("name", [name for name, (module, _) in TRL.items() if module])
def test_every_name_of_trl_s_is_one_and_none_is_forgotten(name):
    module = pytest.importorskip(TRL[name][0], reason="compares with TRL's own configs")
    from transformers import TrainingArguments

    theirs = settings(getattr(module, name))
    listed = [names(cells[0])[0] for cells in rows(sections("trl.md")[name])]
    assert len(listed) == len(set(listed))
    assert set(listed) == theirs - settings(TrainingArguments)


def test_names_that_are_the_same_are_mapped_to_themselves():
    """A dash beside a name that we have would be a mistake."""
    for name, (_, ours) in TRL.items():
        for theirs, mine, _ in rows(sections("trl.md")[name]):
            if names(theirs)[0] in settings(ours):
                assert names(mine) == names(theirs), (name, theirs)


def test_the_table_of_losses_is_the_table_in_the_code():
    listed = {names(cells[0])[0]: cells for cells in rows(sections("dpo.md")["All losses"])}
    assert [*listed] == [*(name for name in listed if name in LOSSES), *UNSUMMABLE]
    assert {*listed} == {*LOSSES, *UNSUMMABLE}
    for name, (_, _, columns, reference, paper) in listed.items():
        variant = pick_variant(DPOConfig(loss_type=[name])) if name in UNSUMMABLE else SUMMABLE_VARIANT
        assert (columns == "labelled") == variant.labelled, name
        assert (reference == "yes") == (variant.compute_ref_logps is not None), name
        assert "arxiv.org/abs/" in paper or paper == "the same"


def test_every_command_is_one():
    """Flags are settings, and losses are losses."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / "dpo.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "onecard dpo" in line]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["onecard", "dpo"]
        given = [word[2:] for word in words if word.startswith("--")]
        assert set(given) <= settings(DPOConfig)
        DPOConfig(
            loss_type=[words[i + 1] for i, word in enumerate(words) if word == "--loss_type"] or ["sigmoid"],
            loss_weights=[float(words[i + 1]) for i, word in enumerate(words) if word == "--loss_weights"],
        ).validate()
