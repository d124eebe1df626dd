"""Write the READMEs' tables and plot from the result files (a GPU's: tables.py): python benchmarks/report.py

The result files come from `lookm demo --seed 7 --out out` (table.json and kept.png, kept as results/cpu/demo.json and
docs/kept.png), from `make bench`, from `make families` and from benchmarks/quality/train.py, scoring.py and measure.py.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from every_model.table import coverage
from quality.formats import formats
from quality.streaming import streamed
from quality.table import against_published, beds, curves, plot_of
from quality.table import measured as measured_beds
from tables import decoding, devices, disassembly, draw, floors, markdown, measured, outcome, target_table
from targets import CPU_TARGETS

from lookm import POLICIES
from lookm.policy import ALIASES, DESCRIPTIONS
from lookm.report import format_bytes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
ROOFLINE = ROOT / "benchmarks" / "roofline.svg"
sys.path.insert(0, str(ROOT / "tests"))


def read(name: str) -> dict[str, Any]:
    """A result file."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def demo() -> str:
    """Exact match of later-turn answers: a row a policy, a column a budget."""
    result = read("demo.json")
    cells = result["cells"]
    budgets = list(dict.fromkeys(cell["budget"] for cell in cells))
    found = {(cell["policy"], cell["budget"]): cell for cell in cells}

    def share(policy: str, budget: float) -> str:
        cell = found.get((policy, budget))
        if cell is None:
            return ""
        return f"{cell['exact_match']:.0f} ({cell['exact_match_after']:.0f}, {cell['exact_match_before']:.0f})"

    rows = [
        [f"`{policy}`", *(share(policy, budget) for budget in budgets)]
        for policy in dict.fromkeys(cell["policy"] for cell in cells)
    ]
    last = {cell["budget"]: cell for cell in cells}
    rows.append(["*tokens kept*", *(f"{last[budget]['kept']:.0f}" for budget in budgets)])
    rows.append(["*cache*", *(format_bytes(last[budget]["bytes"]) for budget in budgets)])
    text = (
        f"Exact match in % of {cells[0]['answers']} answers in later turns, from a cache compressed once after a "
        f"prompt of {cells[0]['seen']:.0f} tokens (in brackets: names after, names before their pictures; "
        f"`lookm demo --seed {result['seed']}`):"
    )
    return text + "\n\n" + markdown(["policy", *(f"budget {budget}" for budget in budgets)], rows)


def pinned(constraints: str, package: str) -> str:
    """The version a constraints file pins."""
    return re.findall(rf"^{package}==(.*)$", (ROOT / constraints).read_text(), re.M)[0]


def families() -> str:
    """The models of the tests and the versions these run on; then every other one."""
    from families import FAMILIES

    oldest, newest = (pinned(name, "transformers") for name in ("constraints-oldest.txt", "constraints.txt"))
    absent = f" (not with transformers {oldest})"
    names = [f"`{name}`{absent if family.hybrid else ''}" for name, family in FAMILIES.items()]
    return (
        f"Tested with transformers {oldest} and {newest}, torch {pinned('constraints.txt', 'torch')} and Python 3.11 "
        "on a processor, on tiny random models of the real classes: sdpa and eager attention; greedy, beam, sampled; "
        f"left-padded batches; a second turn, with text and with a new image:\n\n{', '.join(names)}.\n\n{coverage()}"
    )


def policies() -> str:
    """The registry."""
    rows = []
    for name in POLICIES:
        aliases = [alias for alias, target in ALIASES.items() if target == name]
        rows.append([" = ".join(f"`{each}`" for each in [name, *aliases]), DESCRIPTIONS[name]])
    return markdown(["name", "what it does"], rows)


def cost() -> str:
    """Time and memory against the materialised attention matrix."""
    result = read("reference.json")
    shape, runs = result["shape"], result["results"]
    rows = [
        [name, f"{runs[key]['median_s']:.2f} s", format_bytes(runs[key]["peak_bytes"])]
        for name, key in (("attention matrix in memory", "materialised"), ("lookm-kernels", "blocked"))
    ]
    rows.append(["ratio", f"{result['time_ratio']:.2f}", f"1/{1 / result['memory_ratio']:.0f}"])
    text = (
        f"Scoring and compressing one layer of {shape['heads']} heads x {shape['tokens']} tokens x {shape['width']} "
        f"({shape['dtype']}) on {result['threads']} threads of an {result['cpu']} processor (`make bench`):"
    )
    return text + "\n\n" + markdown(["", "time", "peak memory beyond the inputs"], rows)


def build() -> str:
    """Time and size of the CUDA extension, then of the wheels."""
    result = json.loads((RESULTS.parent / "build.json").read_text())
    rows = [
        [
            f"sm_{entry['archs'][0]}" if len(entry["archs"]) == 1 else f"these {len(entry['archs'])} together",
            f"{entry['configure']['wall_s']:.0f} s",
            f"{entry['compile']['wall_s']:.0f} s",
            f"{entry['compile']['processor_s']:.0f} s",
            format_bytes(entry["bytes"]),
        ]
        for entry in result["builds"]
    ]
    without, included = (format_bytes(wheel["bytes"]) for wheel in result["wheels"])
    text = (
        f"The extension, built by nvcc {result['cuda']} on {result['threads']} threads of an {result['cpu']} processor "
        f"at a load average of {result['load_average']:.1f} (`python benchmarks/build_times.py`); a wheel is "
        f"{included} with all of it and {without} without:"
    )
    return text + "\n\n" + markdown(["", "configure", "compile", "processor time", "size"], rows)


def targets() -> str:
    """Targets of a GPU, then those of a processor."""
    rows = []
    for name, target in CPU_TARGETS.items():
        result = read(f"{target.benchmark}.json") if (RESULTS / f"{target.benchmark}.json").exists() else {}
        found = result.get(name, result.get("targets", {}).get(name, {}).get("measured"))
        shown = "not measured yet" if found is None else outcome(target.value(found), target.met(found))
        rows.append([target.text, target.shown(), f"{shown} ({result['cpu']})" if "cpu" in result else shown])
    return target_table(devices()) + "\n\n" + markdown(["what", "target", "a processor (`make bench`)"], rows)


def decode() -> str:
    """Caches beside each other in decoding: on this processor, then on GPUs."""
    own = [read("generate.json")] if (RESULTS / "generate.json").exists() else []
    return decoding(own + [each.records["generate"] for each in devices() if "generate" in each.records])


def training(name: str = "train") -> str:
    """Held-out accuracy of a demo model, by seed."""
    columns = ["layout", "frames", "tokens", "answers", "answer", "first", "later", "colour", "digit", "note"]
    rows = []
    for path in sorted((ROOT / "benchmarks" / "quality" / "results").glob(f"{name}-seed*.json")):
        record = json.loads(path.read_text())
        for row in record["held_out"]:
            rows.append([str(cell) for cell in (record["seed"], record["minutes"], *(row[name] for name in columns))])
    return markdown(["seed", "minutes", *columns], rows)


def votes() -> str:
    """What votes and each way to merge cost beside the plain path."""
    rows = []
    for what, times in read("votes.json")["seconds"].items():
        rows += [
            [what, name, f"{1e3 * seconds:.2f} ms", f"{seconds / times['plain']:.2f}"]
            for name, seconds in times.items()
        ]
    return markdown(["", "with", "time", "beside plain"], rows)


def scoring() -> str:
    """What cheaper scoring costs: exact match, and the tokens kept as by the exact scores."""
    result = read("scoring.json")
    cells = {(cell["scoring"], cell["budget"]): cell for cell in result["cells"]}
    names, budgets = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    header = ["scoring", "queries scored"]
    for budget in budgets:
        header += [f"answers at {budget}", f"kept alike at {budget}"]
    rows = []
    for name in names:
        row = [name, f"{cells[name, budgets[0]]['queries']:.1f}"]
        for budget in budgets:
            cell = cells[name, budget]
            answers = (cell[f"exact_match{layout}"] for layout in ("", "_after", "_before"))
            row.append("{:.0f} ({:.0f}, {:.0f})".format(*answers))
            row.append(f"{cell['overlap']:.0f} ({cell['overlap_important']:.0f})")
        rows.append(row)
    lost = {key: cells[names[0], key[1]]["exact_match"] - cell["exact_match"] for key, cell in cells.items()}
    text = [loss for (name, _), loss in lost.items() if name == "text queries"]
    others = [loss for (name, _), loss in lost.items() if name != "text queries"]
    count = result["cells"][0]["answers"]
    return (
        f"In %, policy `lookm`, the {count} answers and the prompts of `lookm demo --seed {result['seed']}` (in "
        "brackets: names after, names before their pictures). Kept alike: tokens kept of those that the attention of "
        "all queries keeps, mean over rows, heads and layers (in brackets: without the recent tokens, which any "
        f"scoring keeps).\n\n{markdown(header, rows)}\n\n"
        f"Text queries alone lose {min(text):.0f} to {max(text):.0f} points of exact match here; no sample and no "
        f"8-bit score loses more than {max(others):.1f} (one answer is {100 / count:.1f} points)."
    )


SECTIONS = {
    "benchmarks/README.md": {"targets": targets, "decoding": decode, "measured": measured},
    "benchmarks/NOTES.md": {"floors": floors, "disassembly": disassembly},
    "README.md": {"build": build, "demo": demo, "families": families, "policies": policies, "cost": cost},
    "benchmarks/quality/README.md": {
        "training": training,
        "detail": lambda: training("detail"),
        "beds": beds,
        "auto": against_published,
        "votes": votes,
        "formats": formats,
        "streaming": streamed,
        "scoring": scoring,
    },
}


def plots() -> dict[Path, str]:
    """Every plot: its file and what is in it."""
    return {ROOFLINE: draw()} | {plot_of(bed): curves(bed) for bed in measured_beds()}


def render(file: str, text: str) -> str:
    """The text of a README with every generated section written anew."""
    for name, section in SECTIONS[file].items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        table = section()
        text, count = re.subn(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{file} must have one section {name!r}, it has {count}")
    return text


if __name__ == "__main__":
    for file in SECTIONS:
        path = ROOT / file
        path.write_text(render(file, path.read_text()))
    for path, plot in plots().items():
        path.write_text(plot)
