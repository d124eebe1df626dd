"""Run outside of the source tree against an installed wheel: is everything in it that it needs?

`.ci/run` runs it without torchvision, and once more with the whole extra `transformers`: the index's torchvision is for
CUDA builds of torch. Beside a CPU build it does not import, nor do the models of transformers with it; the rest works.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lookm
import lookm_kernels

COMMAND = Path(sys.executable).with_name("lookm")
BROKEN = bool(
    find_spec("torchvision")
    and subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode
)


def test_the_packages_are_the_installed_ones() -> None:
    for package in (lookm, lookm_kernels):
        folder = Path(package.__file__ or "").parent
        assert "site-packages" in folder.parts
        assert (folder / "py.typed").is_file()


@pytest.mark.skipif(BROKEN, reason="torchvision does not import here, nor does transformers with it")
def test_the_shipped_model_answers_from_a_compressed_cache() -> None:
    from lookm.demo.checkpoint import load
    from lookm.demo.task import draw_prompts, held_out_scans

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


@pytest.mark.parametrize(("argument", "expected"), [("--help", "generate"), ("policies", "lookm")])
def test_the_command_is_installed(argument: str, expected: str) -> None:
    done = subprocess.run([COMMAND, argument], capture_output=True, text=True, check=True)
    assert expected in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(not BROKEN, reason="torchvision imports here, or is not installed")
def test_a_broken_torchvision_is_named_in_one_line() -> None:
    done = subprocess.run([COMMAND, "demo"], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert "torchvision" in line
    assert done.returncode == 2
    with pytest.raises(ImportError, match="torchvision is broken"):
        lookm.LookMCache  # noqa: B018  (imported now)
