"""Pictures and videos from files, as the processors take them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

DEEP = 65535
# names of transformers.video_utils, and the package that each needs
DECODERS = {"torchcodec": "torchcodec", "pyav": "av", "decord": "decord", "opencv": "cv2"}


@dataclass(frozen=True)
class Video:
    """frames [T, H, W, 3] uint8, and the fields of transformers' VideoMetadata; fps None: not known."""

    frames: NDArray[np.uint8]
    metadata: dict[str, Any]


def open_image(path: Path) -> Image.Image:
    """The picture as 8-bit RGB, turned upright as its EXIF data say.

    More than 8 bits are scaled: the range of 16 bits, 0 to 1 of floats, and from the darkest to the brightest value
    where a file's range is not known. ValueError that names the file when it is missing or does not open.
    """
    try:
        # a picture of 90 million pixels or more warns; one of twice as many is refused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return _rgb(ImageOps.exif_transpose(file), file.format)
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(f"image {path} has more than {most:,} pixels: make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {path} does not open: {error}") from None


def _rgb(image: Image.Image, kind: str | None = None) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        low, high = 0.0, DEEP
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (values - low) * (255 / (high - low or 1))
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


def open_video(path: Path, frames: int) -> Video:
    """At most `frames` frames at equal distances: of a folder of pictures in the order of their names, of an animation
    that PIL reads (GIF, WebP, PNG), or of a video.

    ValueError that names the file, and what to install where no decoder is.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise ValueError(f"video folder {path} holds no pictures")
        chosen = _spread(len(files), frames)
        return _stack(path, [open_image(files[index]) for index in chosen], chosen, len(files))
    if not path.exists():
        raise ValueError(f"video {path} does not exist")
    try:
        with Image.open(path) as file:
            count = getattr(file, "n_frames", 1)
            chosen = _spread(count, frames)
            pictures, milliseconds = [], None
            for index, frame in enumerate(ImageSequence.Iterator(file)):
                if index in chosen:
                    pictures.append(_rgb(frame, file.format))
                    # known once a frame has been read
                    milliseconds = frame.info.get("duration")
            return _stack(path, pictures, chosen, count, fps=1000 / milliseconds if milliseconds else None)
    except UnidentifiedImageError:
        return _decode(path, frames)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"video {path} does not open: {error}") from None


def _spread(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` frames, at equal distances."""
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]


def _stack(
    path: Path, pictures: Sequence[Image.Image], chosen: list[int], count: int, fps: float | None = None
) -> Video:
    if len({picture.size for picture in pictures}) != 1:
        raise ValueError(f"video {path} holds pictures of different sizes")
    width, height = pictures[0].size
    known = {"total_num_frames": count, "fps": fps, "duration": count / fps if fps else None}
    frames = np.stack([np.asarray(picture) for picture in pictures])
    return Video(frames, {**known, "width": width, "height": height, "frames_indices": chosen})


def _decode(path: Path, frames: int) -> Video:
    from transformers.video_utils import load_video

    installed = [name for name, package in DECODERS.items() if find_spec(package)]
    if not installed:
        raise ValueError(
            f"video {path} needs a decoder: pip install av (or torchcodec), or give a folder of its frames"
        )
    try:
        decoded, metadata = load_video(
            str(path),
            backend=installed[0],
            sample_indices_fn=lambda metadata, **_: np.array(_spread(metadata.total_num_frames, frames)),
        )
        chosen = _spread(metadata["total_num_frames"], frames)
        return Video(np.asarray(decoded), {**metadata, "frames_indices": chosen})
    except Exception as error:  # every decoder has errors of its own
        raise ValueError(f"video {path} does not open with {installed[0]}: {error or type(error).__name__}") from error
