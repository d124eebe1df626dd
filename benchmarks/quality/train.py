"""Train the demo model from scratch, or on to small digits: one seed, well under an hour on two cores.

    python benchmarks/quality/train.py --seed 0 --out DIRECTORY                       # four stages
    python benchmarks/quality/train.py --seed 0 --out DIRECTORY --detail FROM         # six more, on the model in FROM

writes model, tokenizer and processor to DIRECTORY (`save_pretrained`) and the log, with the accuracy on held-out
scans, to DIRECTORY/../train-seed0.json or detail-seed0.json. README.md says what the stages are for.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from build import build_model, save
from evaluate import evaluate
from scans import training_scans
from stages import ALBUM, FAR, JOINT, LONG, SEEK, SETTLE, SMALL, TEXT, align_patches, align_tower, train_language
from transformers import LlavaForConditionalGeneration

from lookm.demo.task import CLOSE_UP, DETAIL, held_out_scans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--detail", type=Path, metavar="FROM", help="train the model in this folder on to small digits")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    seed, out = arguments.seed, arguments.out
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    scans, steps = training_scans(), []
    start = time.time()

    def log(entry: dict[str, object]) -> None:
        steps.append(entry)
        print(json.dumps(entry), flush=True)

    if arguments.detail:
        model = LlavaForConditionalGeneration.from_pretrained(arguments.detail)
        align_patches(model, scans, 10 * seed + 5, log)
        for number, stage in enumerate((SMALL, SEEK, FAR, ALBUM, SETTLE), 6):
            train_language(model, stage, scans, 10 * seed + number, log)
    else:
        model = build_model()
        train_language(model, TEXT, scans, 10 * seed + 1, log)
        align_tower(model, scans, 10 * seed + 2, log)
        train_language(model, JOINT, scans, 10 * seed + 3, log)
        train_language(model, LONG, scans, 10 * seed + 4, log)
    minutes = (time.time() - start) / 60

    model.eval().requires_grad_(False)
    save(model, out)
    scene, name = (DETAIL, "detail") if arguments.detail else (CLOSE_UP, "train")
    results = evaluate(LlavaForConditionalGeneration.from_pretrained(out).eval(), held_out_scans(), scene=scene)
    for row in results:
        print(json.dumps(row), flush=True)
    record = {
        "seed": seed,
        "threads": arguments.threads,
        "minutes": round(minutes, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "held_out": results,
        "steps": steps,
    }
    out.with_name(f"{name}-seed{seed}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
