"""Write the results table of README.md from results/train-seed*.json."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- table.py -->\n", "<!-- end -->"
COLUMNS = ("layout", "frames", "tokens", "answers", "answer", "first", "later", "colour", "digit", "note")


def table() -> str:
    lines = ["| seed | minutes | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for path in sorted((HERE / "results").glob("train-seed*.json")):
        record = json.loads(path.read_text())
        for row in record["held_out"]:
            cells = [record["seed"], record["minutes"], *(row[column] for column in COLUMNS)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.split(END)[1])
