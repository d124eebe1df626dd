"""Pictures and videos from files: upright, in their own range, and one clear line for what does not open."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lookm import media
from lookm.media import open_image, open_video

RAMP = np.linspace(0, 65535, 16 * 8).round().astype(np.uint16).reshape(8, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """The corner that is red in the upright picture is red, whatever way the camera was held."""
    upright = Image.new("RGB", (20, 10))
    upright.putpixel((0, 0), (255, 0, 0))
    # the inverse of what each orientation asks for (the EXIF standard's table)
    ways = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    ways |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose[ways[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    opened = open_image(tmp_path / "photo.png")
    assert opened.size == (20, 10)
    assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    opened = np.asarray(open_image(tmp_path / "deep.png"))
    assert opened.shape == (8, 16, 3)
    np.testing.assert_array_equal(opened[..., 0], (RAMP / 257).round())
    Image.fromarray(RAMP // 64).save(tmp_path / "dark.png")
    assert np.asarray(open_image(tmp_path / "dark.png")).max() == 4, "a dark picture stays dark"


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), 0, 255),
        (np.array([[0.25, 0.3, 0.5]], dtype=np.float32), 64, 128),
        (np.array([[-3.0, 2.0, 7.0]], dtype=np.float32), 0, 255),
        (np.array([[-(10**6), 0, 10**6]], dtype=np.int32), 0, 255),
        (np.array([[np.nan, 0.5, 1.0]], dtype=np.float32), 0, 255),
        (np.array([[5, 5, 5]], dtype=np.int32), 0, 0),
    ],
)
def test_floats_and_long_integers(tmp_path: Path, values: np.ndarray, first: int, last: int) -> None:
    Image.fromarray(values).save(tmp_path / "raw.tiff")
    opened = np.asarray(open_image(tmp_path / "raw.tiff"))[0, :, 0]
    assert (opened[0], opened[-1]) == (first, last)


def test_a_picture_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "large.png").size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"large\.png has more than 1,000 pixels: make it smaller"):
        open_image(tmp_path / "large.png")


def frames_on_disk(folder: Path, count: int) -> list[int]:
    """Grey frames named in order; returns their shades."""
    folder.mkdir()
    shades = [10 * index for index in range(count)]
    for index, shade in enumerate(shades):
        Image.new("RGB", (8, 6), (shade,) * 3).save(folder / f"{index:03}.png")
    return shades


def test_a_folder_of_frames(tmp_path: Path) -> None:
    shades = frames_on_disk(tmp_path / "frames", 10)
    whole = open_video(tmp_path / "frames", 16)
    assert whole.frames.shape == (10, 6, 8, 3)
    assert whole.frames[:, 0, 0, 0].tolist() == shades
    part = open_video(tmp_path / "frames", 4)
    assert part.metadata["frames_indices"] == [0, 2, 5, 7]
    assert part.frames[:, 0, 0, 0].tolist() == [shades[index] for index in (0, 2, 5, 7)]
    assert (part.metadata["total_num_frames"], part.metadata["fps"]) == (10, None)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation(tmp_path: Path, kind: str) -> None:
    shades = frames_on_disk(tmp_path / "frames", 6)
    pictures = [Image.open(file) for file in sorted((tmp_path / "frames").iterdir())]
    options = {"lossless": True} if kind == "webp" else {}
    pictures[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=pictures[1:], duration=250, **options)
    video = open_video(tmp_path / f"a.{kind}", 3)
    assert video.frames[:, 0, 0, 0].tolist() == [shades[index] for index in (0, 2, 4)]
    assert (video.metadata["fps"], video.metadata["total_num_frames"]) == (4.0, 6)


def test_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(20):
            grey = np.full((48, 64, 3), 10 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    video = open_video(tmp_path / "a.mp4", 5)
    assert video.frames.shape == (5, 48, 64, 3)
    assert np.abs(video.frames[:, 20, 20, 0] - np.array([0.0, 40, 80, 120, 160])).max() < 8
    assert (video.metadata["fps"], video.metadata["frames_indices"]) == (10.0, [0, 4, 8, 12, 16])


def test_videos_that_do_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none\.mp4 does not exist"):
        open_video(tmp_path / "none.mp4", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        open_video(tmp_path / "empty", 4)
    frames_on_disk(tmp_path / "mixed", 2)
    Image.new("RGB", (3, 3)).save(tmp_path / "mixed" / "z.png")
    with pytest.raises(ValueError, match="mixed holds pictures of different sizes"):
        open_video(tmp_path / "mixed", 4)
    (tmp_path / "text.mp4").write_text("no video")
    monkeypatch.setattr(media, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"text\.mp4 needs a decoder: pip install av"):
        open_video(tmp_path / "text.mp4", 4)
    monkeypatch.setattr(media, "find_spec", lambda _: sys)
    with pytest.raises(ValueError, match=r"text\.mp4 does not open with torchcodec: \S+"):
        open_video(tmp_path / "text.mp4", 4)
