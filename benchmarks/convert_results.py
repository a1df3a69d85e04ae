"""Rewrites the committed result files in the one record format (schema 4). Numbers are moved, never changed."""

import json
import sys
from pathlib import Path

ROWS = dict(
    name="",
    role="",
    reason=None,
    seconds=[],
    tokens=[],
    flops=[],
    peak_bytes=None,
    held_bytes=None,
    errors={},
    launches=None,
    gemms=None,
    rate=None,
    of_limit=None,
    more={},
)


def row(**values):
    assert values.keys() <= ROWS.keys(), values.keys() - ROWS.keys()
    return {**ROWS, **values}


def case(what, name, sizes, dtype, mode="", rows=(), about=None, found=None, refused=None):
    return dict(
        what=what,
        name=name,
        sizes=sizes,
        dtype=dtype,
        mode=mode,
        rows=list(rows),
        about=about or {},
        found=found or {},
        refused=refused,
    )


def kernels(old):
    for result in old["results"]:
        groups = {}
        for r in result["rows"]:
            groups.setdefault((r["shape"], r["mode"]), []).append(r)
        for (shape, mode), rows in groups.items():
            new = [
                row(
                    name=r["candidate"],
                    **{
                        k: r[k]
                        for k in (
                            "role",
                            "reason",
                            "seconds",
                            "peak_bytes",
                            "errors",
                            "launches",
                            "gemms",
                            "rate",
                            "of_limit",
                        )
                    },
                )
                for r in rows
            ]
            yield case(
                result["benchmark"],
                shape,
                rows[0]["sizes"],
                result["dtype"],
                mode,
                new,
                {"operation": result["about"], "mode": result["modes"][mode]},
            )


def train_step(old):
    for r in old["results"]:
        rows = [row(more=x.pop("first"), **x) for x in r["rows"]]
        about = {k: r[k] for k in ("model", "parameters", "mixed", "cap_gib", "in_turns", "settings")}
        found = {k: r[k] for k in ("memory", "unplanned", "learned", "shrunk") if k in r}
        yield case(r["kind"], r["name"], r["sizes"], r["dtype"], "", rows, about, found, r["refused"])


def rollout(old):
    for r in old["results"]:
        rows = [
            row(
                name=x["sampler"],
                role=x["role"],
                seconds=x["seconds"],
                tokens=x["tokens"],
                peak_bytes=x["peak_bytes"],
                held_bytes=r["held_bytes"],
            )
            for x in r["rows"]
        ]
        sizes = {
            "prompts": r["prompts"],
            "shortest": r["prompt_lengths"][0],
            "longest": r["prompt_lengths"][1],
            "batch_size": r["batch_size"],
            "max_new_tokens": r["max_new_tokens"],
        }
        about = {k: r[k] for k in ("model", "parameters", "load_in_4bit", "temperature")}
        found = {k: r[k] for k in ("mean_response", "error_logprobs", "step")}
        yield case("rollout", r["name"], sizes, r["dtype"], "", rows, about, found, r["refused"])


def sharing(old):
    for c in old["cases"]:
        rows = [
            row(
                name=x["name"],
                role="ours",
                seconds=x["seconds"],
                tokens=[c["tokens"]] * len(x["seconds"]),
                peak_bytes=x["peak_bytes"],
                more={"rows": x["rows"]},
            )
            for x in c["rows"]
        ]
        for x, y in zip(c["rows"], rows, strict=True):
            assert x["rate"]["count"] == len(y["seconds"])
        yield case(
            "sharing",
            f"{c['prompt']}/{c['response']}",
            {"prompt": c["prompt"], "response": c["response"], "pairs": c["pairs"]},
            old["dtype"],
            "",
            rows,
            {"parameters": old["parameters"]},
            {"error": c["error"]},
        )


def profile(old):
    rows = [
        row(
            name=p["name"],
            role="ours",
            seconds=[p["seconds"]],
            tokens=[p["tokens"]],
            flops=[p["flops"]],
            of_limit=p["of_rate"] if p["flops"] else None,
            launches=None,
            more={k: p[k] for k in ("busy", "launches", "synchronisations", "profiled", "operators")},
        )
        for p in old["phases"]
    ]
    rows.append(row(name="the whole iteration", role="ours", seconds=[old["seconds"]]))
    about = {k: old[k] for k in ("model", "parameters", "settings")}
    found = {k: old[k] for k in ("profiled_seconds", "rate", "bandwidth", "costs")}
    yield case("ppo", old["case"], {}, old["dtype"], "", rows, about, found)


KINDS = {
    "kernels": kernels,
    "train-step": train_step,
    "rollout": rollout,
    "sharing": sharing,
    "where-time-goes": profile,
}
for name in sys.argv[1:]:
    path = Path(name)
    old = json.loads(path.read_text())
    kind = next(k for k in KINDS if path.name.startswith(k))
    new = dict(benchmark={"where-time-goes": "ppo-profile"}.get(kind, kind))
    rest = {"complete": True, "clock": "wall time", "repeats": 1}
    if "repeats" not in old and kind == "train-step":
        rest["repeats"] = max(len(r["seconds"]) for x in old["results"] for r in x["rows"])
    for key in (
        "device",
        "machine",
        "folder",
        "quick",
        "complete",
        "clock",
        "repeats",
        "date",
        "commit",
        "dirty",
        "load",
        "versions",
    ):
        new[key] = old[key] if key in old else rest[key]
    new["cases"] = list(KINDS[kind](old))
    new["schema"] = 4
    path.write_text(json.dumps(new, indent=1) + "\n")
