"""One answer of a checkpoint with its own processor, on a LookMCache: what `lookm generate` does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image, UnidentifiedImageError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from lookm.cache import LookMCache, check_config
from lookm.report import Report


@dataclass(frozen=True)
class Answer:
    """The generated text, seconds of wall time, and what the cache held."""

    text: str
    seconds: float
    report: Report


def open_images(paths: Sequence[Path]) -> list[Image.Image]:
    """The images as RGB. ValueError that names the file when one is missing or does not open."""
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        except FileNotFoundError:
            raise ValueError(f"image {path} does not exist") from None
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"image {path} does not open: {error}") from None
    return images


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Readers of configurations, tokenizers and weights each raise errors of their own: one ValueError for all."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"model {name} does not load as a vision-language model: {reason}") from error


def load_processor(name: str) -> Any:
    """The processor of a folder or hub id.

    ValueError when it does not load, NotImplementedError when its model is not supported.
    """
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise ValueError(f"model folder {name} does not exist")
    with loading(name):
        check_config(AutoConfig.from_pretrained(name))
        return AutoProcessor.from_pretrained(name)


def load_model(name: str) -> Any:
    """The model of a folder or hub id, on the GPU where there is one. ValueError when it does not load."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with loading(name):
        return AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(device).eval()


def build_inputs(processor: Any, images: Sequence[Image.Image], prompt: str) -> Any:
    """The processor's inputs for one user turn: all images in order, then the text.

    Through the processor's chat template; without one, image placeholders stand before the text. ValueError where the
    template fails.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        try:
            return processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of this model fails: {str(error) or type(error).__name__}") from error
    placeholder = getattr(processor, "image_token", "<image>")
    text = " ".join([placeholder] * len(images) + [prompt])
    return processor(text=[text], images=list(images) or None, return_tensors="pt")


def answer(
    model: Any, processor: Any, inputs: Any, budget: float | int | str, policy: str, max_new_tokens: int
) -> Answer:
    """Generate greedily on a fresh LookMCache; inputs as build_inputs makes them."""
    inputs = inputs.to(model.device)
    cache = LookMCache(model, budget, policy)
    start = time.perf_counter()
    tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - start
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return Answer(processor.decode(new, skip_special_tokens=True).strip(), seconds, cache.report())
