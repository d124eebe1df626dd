"""`lookm chat`: a conversation in the terminal, on one cache."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from lookm.cache import LookMCache
from lookm.errors import reason
from lookm.generate import Checkpoint, Sampling, answer, build_inputs, video_arguments
from lookm.media import Video, open_image, open_video
from lookm.turns import next_turn

HELP = "/image FILE and /video FILE go with the next line, /report shows the cache, /quit ends"


def chat(
    checkpoint: Checkpoint,
    model: Any,
    cache: LookMCache,
    images: list[Image],
    videos: list[Video],
    *,
    frames: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Read lines from the terminal and stream answers, until /quit or the end of the input.

    images, videos: of the first turn; frames: of each video opened later.
    """
    processor = checkpoint.processor
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"model {checkpoint.name} has no chat template: it answers one prompt, with lookm generate")
    with suppress(ImportError):  # edits lines where there is one
        import readline  # noqa: F401
    print(HELP)
    messages: list[dict[str, Any]] = []
    shown: list[Video] = []
    sequences = None
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        command, _, file = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/image":
                images.append(open_image(Path(file.strip())))
            elif command == "/video":
                videos.append(open_video(Path(file.strip()), frames))
            elif command == "/report":
                print("nothing read yet" if sequences is None else cache.report())
            elif line.startswith("/"):
                print(HELP)
            if not line or line.startswith("/"):
                continue
            turn = [*messages, checkpoint.message(line, images, videos)]
            told = video_arguments(shown + videos)
            inputs = (
                build_inputs(processor, turn, **told)
                if sequences is None
                else next_turn(model, processor, turn, sequences, cache, **told)
            )
        except (ValueError, NotImplementedError) as error:
            print(f"error: {reason(error)}")
            if not line.startswith("/"):
                # they may be what was refused
                images, videos = [], []
            continue
        shown += videos
        images, videos = [], []
        streamer = TextStreamer(getattr(processor, "tokenizer", processor), skip_prompt=True, skip_special_tokens=True)
        with interruptible() as criterion:
            result = answer(
                model,
                processor,
                inputs,
                cache,
                max_new_tokens,
                sampling,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([criterion]),
            )
        print(f"({result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s)")
        sequences = result.sequences
        said = result.text if isinstance(turn[-1]["content"], str) else [{"type": "text", "text": result.text}]
        messages = [*turn, {"role": "assistant", "content": said}]


class Interrupted(StoppingCriteria):
    """Ends an answer after the token under way, once asked."""

    asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """The same for every row."""
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)


@contextmanager
def interruptible() -> Iterator[Interrupted]:
    """Ctrl-C ends the answer, so that the cache stays usable; a second one does what it does elsewhere."""
    criterion, before = Interrupted(), signal.getsignal(signal.SIGINT)

    def ask(*_: Any) -> None:
        criterion.asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield criterion
    finally:
        signal.signal(signal.SIGINT, before)
