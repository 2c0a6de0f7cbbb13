"""A data set of many clips in which some are damaged, each in another way, and some are only unusual."""

import dataclasses
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mask2dit_jax.data.sources import CSV_COLUMNS
from tests.data.clips import make_clip, numbered_frames

PLAIN_COUNTS = (20, 23, 26)  # frames of the clips that all others are copies of


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the csv. `fault`: a part of what is to be said of it; empty if the clip can be used."""

    name: str
    fault: str = ""
    caption: str = ""
    num_frame: str = "20"

    def line(self) -> str:
        caption = self.caption if self.fault or self.caption else "a grey picture"
        fields = dict(zip(CSV_COLUMNS, ("25", "48", "32", caption, self.name, self.num_frame), strict=True))
        return ",".join(fields[column] for column in CSV_COLUMNS) + "\n"


def write_packets(
    path: Path, frames: np.ndarray, times=None, pixels="yuv420p", rotation=0, format=None, **tags
) -> None:
    """Encodes frames with what `write_video` does not offer: times, full chroma, a rotation, colour tags."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if rotation:
            stream.set_display_rotation(rotation)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            if times is not None:
                picture.pts, picture.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _transport_stream(folder: Path, frames: np.ndarray) -> bytes:
    write_packets(folder / "part.ts", frames)
    return (folder / "part.ts").read_bytes()


def _noise() -> np.ndarray:
    """Frames that fill many packets."""
    return np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3)).astype(np.uint8)


def uneven_times(count: int) -> np.ndarray:
    """Milliseconds; the frame rate changes all the time."""
    return np.cumsum(np.tile([20, 90, 40, 250], count // 4 + 1)[:count])


def write_clips(folder: Path) -> list[Row]:
    """The unusual clips: first those that cannot be used, then those that can."""
    plain = [make_clip(folder, f"plain{n}.mp4", count=count).path.read_bytes() for n, count in enumerate(PLAIN_COUNTS)]
    frames = numbered_frames(20)
    text = "fps,width,height\n25,48,32\n" * 50

    def put(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        return name

    make_clip(folder, "short.mp4", count=4)
    write_sound(folder / "sound.mp4")
    write_packets(folder / "late.mp4", frames)  # its index comes last
    late = (folder / "late.mp4").read_bytes()
    write_packets(folder / "hdr.mp4", frames, pixels="yuv420p10le", color_trc=16, color_primaries=9, colorspace=9)
    small, large, noise = (
        _transport_stream(folder, frames) for frames in (frames, numbered_frames(20, 64, 96), _noise())
    )
    unusable = [
        Row(put("cut.mp4", plain[0][: len(plain[0]) * 2 // 3]), "truncated", "a"),
        Row(put("late.mp4", late[:-200]), "truncated", "b"),
        Row(put("empty.mp4", b""), "the file is empty", "c"),
        Row(put("pdf.mp4", b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n"), "not a video", "d"),
        Row(put("text.mp4", text.encode()), "not a video", "e"),
        Row("sound.mp4", "has no video stream", "f"),
        Row("short.mp4", "a clip of 4 frames is too short", "g"),
        Row("gone.mp4", "no video at", "h"),
        Row("hdr.mp4", "is HDR or of a wide gamut (PQ)", "j"),
        Row(put("resize.ts", small + large), "the picture changes its size at frame 20", "k"),
        Row(put("lost.ts", noise[: 188 * 100] + noise[188 * 110 :]), "damaged, data is missing", "l"),
        Row(put("silent.mp4", plain[0]), "the caption is empty", ""),
        Row(put("blank.mp4", plain[0]), "the caption is empty", "   "),
        Row(put("latin.mp4", plain[0]), "the caption is not UTF-8", os.fsdecode(b"un caf\xe9")),
        Row(put("many.mp4", plain[0]), "has more values than columns", "a bus, red, in a street"),
        Row(put("wordy.mp4", plain[0]), "num_frame is 'twenty'", "i", "twenty"),
    ]
    write_packets(folder / "odd.mp4", numbered_frames(20, 33, 47), pixels="yuv444p")
    write_packets(folder / "rotated.mp4", np.rot90(frames, -1, axes=(1, 2)), rotation=90)
    write_packets(folder / "uneven.mp4", frames, times=uneven_times(20))
    write_packets(folder / "matroska.mp4", frames, format="matroska")
    usable = [
        Row("odd.mp4"),
        Row("rotated.mp4"),
        Row("uneven.mp4"),
        Row("matroska.mp4"),
        Row(put("novel.mp4", plain[0]), caption="word " * 9_999 + "end"),
        Row(put(os.fsdecode(b"caf\xe9.mp4"), plain[1])),
        Row(put("汉字 clip.mp4", plain[2])),
        Row(put("Scene: one.mp4", plain[0])),
        Row(put("joined.ts", small * 2), num_frame="40"),
    ]
    return unusable + usable


def write_data_set(folder: Path, num_clips: int) -> list[Row]:
    """`folder/data.csv` of `num_clips` rows, the unusual ones spread over it."""
    unusual = write_clips(folder)
    plain = [(folder / f"plain{n}.mp4").read_bytes() for n in range(len(PLAIN_COUNTS))]
    rows = []
    for number in range(num_clips - len(unusual)):
        rows.append(Row(f"clip{number}.mp4"))
        (folder / rows[-1].name).write_bytes(plain[number % len(plain)])
    for number, row in enumerate(unusual):
        rows.insert(number * num_clips // len(unusual), row)
    lines = [",".join(CSV_COLUMNS) + "\n", *(row.line() for row in rows)]
    (folder / "data.csv").write_bytes(os.fsencode("".join(lines)))
    return rows
