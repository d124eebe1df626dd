"""Run outside of the source tree against an installed wheel: is everything in it that it needs?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import lookm
import lookm_kernels
from lookm.demo.checkpoint import load
from lookm.demo.task import draw_prompts, held_out_scans


def test_the_packages_are_the_installed_ones() -> None:
    for package in (lookm, lookm_kernels):
        folder = Path(package.__file__ or "").parent
        assert "site-packages" in folder.parts
        assert (folder / "py.typed").is_file()


def test_the_shipped_model_answers_from_a_compressed_cache() -> None:
    model, processor = load()
    prompt = draw_prompts(1, 8, "before", 3, held_out_scans(), torch.Generator().manual_seed(0))
    question = processor(text="Q note", add_special_tokens=False, return_tensors="pt")["input_ids"]
    cache = lookm.LookMCache(model, budget=0.5)
    tokens = torch.cat([prompt.input_ids, question], 1)
    answer = model.generate(
        input_ids=tokens, pixel_values=prompt.pixel_values, past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    assert answer.shape[1] > tokens.shape[1]
    assert cache.report().bytes < 0.6 * cache.report().bytes_full


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("lookm")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
