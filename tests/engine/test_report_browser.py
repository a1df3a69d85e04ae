"""The report in a real browser: laid out, nothing sticks out at the side, pictures and answers are seen."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from onecard import reporting

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page is not looked at")
QUIET = (
    "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--force-device-scale-factor=1",
)  # fmt: skip
WIDE, NARROW = 1200, 390


def browse(page: Path, *flags: str) -> str:
    """What Chromium writes to standard output."""
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(BROWSER), *QUIET, *root, profile, *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def picture(page: Path, width: int, height: int, *flags: str) -> np.ndarray:
    """A screenshot [height, width, 3], from 0 to 1."""
    from matplotlib import image

    shot = page.with_name(f"shot-{width}{len(flags)}.png")
    browse(page, f"--screenshot={shot}", f"--window-size={width},{height}", *flags)
    return image.imread(shot)[..., :3]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a PPO run with awkward answers: markup, a word without end, several lines."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    folder.mkdir()
    rows = [
        {"step": step, "loss": 1 / step, "objective/scores": math.sqrt(step), "objective/kl": 0.1 * step,
         "policy/clipfrac_avg": 0.01 * step, "policy/entropy_avg": 2.0 - 0.05 * step, "val/explained_variance": 0.5,
         "completions/mean_length": 20.0 + step, "time/tokens_per_second": 900.0, "memory/peak_gib": 1.5,
         "memory/rollout_gib": 1.1, "memory/learn_gib": 1.4}
        for step in range(1, 13)
    ]  # fmt: skip
    answers = ["<h1>not a heading</h1>", "endless" * 60, "one\ntwo\nthree"]
    samples = [
        {"step": step, "prompt": f"prompt {i} " * 12, "completion": f"{text} {step}", "score": step - i}
        for step in (0, 6, 12)
        for i, text in enumerate(answers)
    ]
    for name, lines in {"metrics.jsonl": rows, "samples.jsonl": samples}.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("model: tiny\nlearning_rate: 0.001\n")
    return reporting.write_run_report(folder)


def measured(page: Path, width: int) -> dict[str, float]:
    """What the browser's own layout says, from a frame of that width around the page."""
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(
        f'<iframe id="f" width="{width}" height="900" style="border:0" src="{page.name}"></iframe><script>'
        "f.onload = () => { const d = f.contentDocument, e = d.documentElement;"
        "const shown = [...d.images].filter(i => i.naturalWidth > 0 && i.getBoundingClientRect().width > 200).length;"
        "const clipped = [...d.querySelectorAll('.sides p, .prompt')].filter(p => p.scrollWidth > p.clientWidth + 1);"
        "document.title = JSON.stringify({overflow: e.scrollWidth - e.clientWidth, height: e.scrollHeight, shown,"
        "images: d.images.length, clipped: clipped.length, headings: d.querySelectorAll('h1').length,"
        "sides: d.querySelectorAll('.sides > div').length}) }</script>"
    )
    dom = browse(frame, "--dump-dom", "--virtual-time-budget=5000", "--allow-file-access-from-files")
    found = re.search(r"<title>({.*?})</title>", dom)
    assert found, dom[:500]
    return json.loads(found[1])


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_fits_the_window_and_shows_everything(page, width):
    seen = measured(page, width)
    assert seen["overflow"] == 0
    assert seen["clipped"] == 0
    assert seen["shown"] == seen["images"] > 8
    assert seen["sides"] == 3 * 3
    assert seen["headings"] == 1  # an answer's markup is text


def test_the_screenshot_has_curves_in_the_reader_s_colours(page):
    light = picture(page, WIDE, 1600)
    dark = picture(page, WIDE, 1600, "--blink-settings=preferredColorScheme=0")
    assert light.shape == dark.shape == (1600, WIDE, 3)
    # the corner is the page itself, and the text on it is readable
    assert light[5, 5].min() > 0.95
    assert dark[5, 5].max() < 0.15
    for shot, paper in ((light, 1.0), (dark, 0.0)):
        heading = shot[40:90, 66:400].mean(-1)
        assert abs(heading - paper).max() > 0.7
        blue = (abs(shot - np.array([0x25, 0x63, 0xEB]) / 255) < 0.06).all(-1)  # the colour of a training curve
        assert blue[200:].sum() > 500


def test_the_answers_are_side_by_side_where_there_is_room(page):
    """A wide window is shorter than a narrow one by more than the pictures explain, for columns become rows."""
    wide, narrow = measured(page, WIDE), measured(page, NARROW)
    assert narrow["height"] > 1.5 * wide["height"]
