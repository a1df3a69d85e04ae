"""The HTML page of a report: its template and style. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from onecard.training.run_folder import REPORT
from onecard.utils.files import write_text

Section: TypeAlias = tuple[str, Sequence[tuple[str, str]]]  # heading, and name and data URI of each image


@dataclass(frozen=True)
class TableRow:
    """One row of the results table. `value`: already formatted."""

    stage: str
    metric: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Side:
    """One response: the name of its model or step, its text, and its reward or None."""

    name: str
    text: str
    reward: float | None = None


@dataclass(frozen=True)
class Sample:
    """Responses to one prompt, shown side by side in the order of training."""

    prompt: str
    sides: tuple[Side, ...]


def _reward(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}" if math.isfinite(value) else str(value)


def _sample_texts(samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        sides = [(side.name, side.text.strip(), _reward(side.reward)) for side in sample.sides]
        yield {"prompt": sample.prompt.strip(), "sides": sides}


def write_page(
    folder: Path,
    *,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    samples: Sequence[Sample],
    configs: Sequence[tuple[str, str]],
    table: Sequence[TableRow] = (),
    details: Sequence[Section] = (),
) -> Path:
    """Write `report.html` into `folder` and return its path.

    `configs`: name and text of each config.yaml; `details`: sections that are collapsed until the reader opens them.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(PAGE).render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        samples=list(_sample_texts(samples)),
        configs=configs,
        table=table,
        details=details,
    )
    write_text(folder / REPORT, html)
    return folder / REPORT


# Colours follow the browser's light or dark mode; plots have a white background in both.
STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#212529, #e9ecef); --soft: light-dark(#5c636a, #adb5bd);
  --line: light-dark(#dee2e6, #3b4046); --page: light-dark(#ffffff, #16181b); --card: light-dark(#f8f9fa, #1f2226);
  --good: light-dark(#2b8a3e, #69db7c); --accent: light-dark(#1d4ed8, #91a7ff); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.02em; }
h2 { margin: 2.5rem 0 0.9rem; font-size: 1.2rem; }
.subtitle { margin: 0.3rem 0 0; color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-size: 0.95rem; }
th { color: var(--soft); font-weight: 500; font-size: 0.82rem; }
th, td { padding: 0.5rem 0.9rem 0.5rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.value { font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--accent); }
td.meaning { color: var(--soft); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.plots.one { grid-template-columns: 1fr; }
img { display: block; width: 100%; max-width: 46rem; padding: 0.6rem; background: #fff;
  border: 1px solid var(--line); border-radius: 10px; }
.one img { max-width: none; }
.sample { margin-bottom: 1rem; padding: 0.9rem 1.1rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.prompt { margin: 0 0 0.6rem; font-weight: 600; overflow-wrap: anywhere; }
.sides { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.sides p { margin: 0.15rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.side { color: var(--soft); font-size: 0.82rem; }
.side b { margin-left: 0.4rem; color: var(--ink); font-variant-numeric: tabular-nums; }
.after .side b { color: var(--good); }
details { margin-top: 0.8rem; } summary { cursor: pointer; color: var(--soft); }
details > div, pre { margin-top: 0.7rem; }
pre { padding: 1rem; overflow-x: auto; font-size: 0.82rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>"""
    + STYLE
    + """</style></head>
<body>
{% macro gallery(images) %}
<div class="plots{{ " one" if images[0][0] == "curves" }}">
{% for name, uri in images %}<img alt="{{ name }}" src="{{ uri }}">
{% endfor %}</div>
{% endmacro %}
<h1>{{ title }}</h1>
<p class="subtitle">{{ subtitle }}</p>
{% if table %}
<h2>Results</h2>
<table><thead><tr><th>stage</th><th>metric</th><th>value</th><th>meaning</th></tr></thead><tbody>
{% for row in table %}
<tr><td>{{ row.stage }}</td><td>{{ row.metric }}</td><td class="value">{{ row.value }}</td>
<td class="meaning">{{ row.meaning }}</td></tr>
{% endfor %}
</tbody></table>
{% endif %}
{% for heading, images in sections %}
<h2>{{ heading }}</h2>
{{ gallery(images) }}
{% endfor %}
{% if samples %}
<h2>Answers before and after</h2>
{% for sample in samples %}
<div class="sample"><p class="prompt">{{ sample.prompt }}</p><div class="sides">
{% for name, text, reward in sample.sides %}
<div{% if loop.last %} class="after"{% endif %}>
<span class="side">{{ name }}{% if reward %} <b>{{ reward }}</b>{% endif %}</span>
<p>{{ text }}</p></div>
{% endfor %}
</div></div>
{% endfor %}
{% endif %}
{% if details or configs %}
<h2>Details</h2>
{% for heading, images in details %}
<details><summary>{{ heading }}</summary><div>{{ gallery(images) }}</div></details>
{% endfor %}
{% for name, text in configs %}
<details><summary>{{ name }}: config.yaml</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% endif %}
</body>
</html>
"""
)
