"""A checkpoint with its own processor, answering on a LookMCache: what `lookm generate` and `lookm chat` do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from jinja2 import TemplateError
from PIL.Image import Image
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

from lookm.cache import LookMCache
from lookm.errors import reason
from lookm.media import Video
from lookm.modality import cache_keyword
from lookm.parallel import checked_split, own_gpu, processes
from lookm.report import Report
from lookm.supported import check_config

CONFIG = "config.json"
SECONDS_FOR_THE_HUB = 10


@dataclass(frozen=True)
class Answer:
    """Text, number of tokens, seconds of wall time, what the cache held; sequences [1, n]: the whole dialogue."""

    text: str
    tokens: int
    seconds: float
    report: Report
    sequences: torch.Tensor = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by wall time, the reading of the prompt included."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily where nothing is given."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of generate; seeds torch where a seed is given."""
        if self.seed is not None:
            torch.manual_seed(self.seed)
        values = asdict(self)
        values.pop("seed")
        if self.temperature == 0 or all(value is None for value in values.values()):
            return {"do_sample": False}
        return {"do_sample": True, **{name: value for name, value in values.items() if value is not None}}


@dataclass(frozen=True)
class Checkpoint:
    """A folder or a hub id; where: arguments of from_pretrained. processor: a tokenizer for a model of text alone, or
    None where it was not asked for.
    """

    name: str
    where: dict[str, Any]
    config: Any
    processor: Any

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""
        return _sees(self.config)

    def load_model(self, device: str = "auto", dtype: str = "auto") -> Any:
        """The model in evaluation mode, under torchrun this process's part of it.

        ValueError when it, the device or the dtype is not there, and under torchrun for a model that cannot be split.
        """
        kind = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
        split = {} if processes() == 1 else checked_split(self.name, kind, self.config, device)
        if device == "auto":
            device = own_gpu() if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"`device` {device!r} is not there: {reason(error)}") from error
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype, None)
        if wanted != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
            raise ValueError(f"`dtype` must be auto, float32, bfloat16 or float16, got {dtype!r}")
        with loading(self.name):
            model = kind.from_pretrained(self.name, dtype=wanted, **split, **self.where).eval()
            return model if split else model.to(device)

    def message(self, text: str, images: Sequence[Image] = (), videos: Sequence[Video] = ()) -> dict[str, Any]:
        """One user turn: all images in order, then the videos, then the text.

        ValueError where the model or its processor does not take them.
        """
        if not self.sees:
            if images or videos:
                raise ValueError(
                    f"model {self.name} is a text-only model ({self.config.model_type}): no images, no videos"
                )
            return {"role": "user", "content": text}
        if videos and getattr(self.processor, "video_processor", None) is None:
            raise ValueError(f"the processor of {self.name} takes no videos: give a few frames as --image")
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content += [{"type": "video", "video": video.frames} for video in videos]
        return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def load_checkpoint(name: str, with_processor: bool = True) -> Checkpoint:
    """Configuration and processor of a folder or hub id, its model to be loaded later.

    ValueError when they do not load, NotImplementedError when the model is not supported.
    """
    where = _where(name)
    with loading(name):
        config = AutoConfig.from_pretrained(name, **where)
        check_config(config)
    if not _sees(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model {name} ({config.model_type}) is neither a vision-language nor a text model")
    if not with_processor:
        return Checkpoint(name, where, config, None)
    with loading(name):
        processor = (AutoProcessor if _sees(config) else AutoTokenizer).from_pretrained(name, **where)
        if _sees(config) and not isinstance(processor, ProcessorMixin):
            raise ValueError("it has no processor, only a tokenizer (preprocessor_config.json is missing)")
        return Checkpoint(name, where, config, processor)


def _sees(config: Any) -> bool:
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _where(name: str) -> dict[str, Any]:
    """Arguments for from_pretrained, after one short request to the hub: the library itself would retry for minutes."""
    if Path(name).is_dir():
        return {}
    if name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"model folder {name} does not exist")
    neither = f"model {name} is neither a folder here nor a model on the hub"
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=SECONDS_FOR_THE_HUB)
    except (HFValidationError, RepositoryNotFoundError, EntryNotFoundError) as error:
        if isinstance(error, GatedRepoError):
            raise ValueError(f"model {name} is gated: ask for access on its page, then `hf auth login`") from error
        raise ValueError(neither) from error
    except Exception as error:  # whatever the network raises, and its absence is no error where the files are here
        if not isinstance(try_to_load_from_cache(name, CONFIG), str):
            raise ValueError(f"model {name} is no folder here, and the hub is out of reach: {reason(error)}") from error
        return {"local_files_only": True}
    return {}


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Readers of configurations, tokenizers and weights each raise errors of their own: one ValueError for all."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        raise ValueError(f"model {name} does not load: {reason(error)}") from error


def build_inputs(processor: Any, messages: Sequence[dict[str, Any]], **extra: Any) -> Any:
    """The inputs of a conversation, through the chat template of a processor or tokenizer.

    Without a template, image placeholders stand before the text of the only message. extra: for the processor.
    ValueError where template or processor fails.
    """
    try:
        if getattr(processor, "chat_template", None):
            return processor.apply_chat_template(
                list(messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **({"processor_kwargs": extra} if extra else {}),
            )
        return _without_template(processor, messages)
    except TemplateError as error:
        raise ValueError(f"the chat template of this model fails: {reason(error)}") from error


def video_arguments(videos: Sequence[Video]) -> dict[str, Any]:
    """What a processor has to know of all videos of a conversation, whose frames were chosen here."""
    if not videos:
        return {}
    return {"do_sample_frames": False, "video_metadata": [[video.metadata for video in videos]]}


def _without_template(processor: Any, messages: Sequence[dict[str, Any]]) -> Any:
    (message,) = messages
    content = message["content"]
    if isinstance(content, str):
        return processor(content, return_tensors="pt")
    images = [part["image"] for part in content if part["type"] == "image"]
    placeholder = getattr(processor, "image_token", "<image>")
    text = " ".join([placeholder] * len(images) + [part["text"] for part in content if part["type"] == "text"])
    return processor(text=[text], images=images or None, return_tensors="pt")


def answer(
    model: Any,
    processor: Any,
    inputs: Any,
    cache: LookMCache,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    **generate: Any,
) -> Answer:
    """Generate on a LookMCache; inputs as build_inputs or next_turn makes them, generate: further arguments of it."""
    inputs = inputs.to(model.device)
    start = time.perf_counter()
    sequences = model.generate(
        **inputs, **{cache_keyword(model): cache}, max_new_tokens=max_new_tokens, **sampling.arguments(), **generate
    )
    seconds = time.perf_counter() - start
    new = sequences[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(new, skip_special_tokens=True).strip()
    return Answer(text, len(new), seconds, cache.report(), sequences)
