"""Exact frame-by-frame reading of video files through PyAV."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from jaxtyping import UInt8

from mask2dit_jax.errors import UserError
from mask2dit_jax.media.display import NotShown, check_colours, shown_picture, upright_size
from mask2dit_jax.media.pictures import is_animation, read_animation

_REMEDY = "replace the file or remove it from the data"
_STILL = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
# In these a packet is a frame, if the stream begins with a key frame, and only a key frame changes the size. VP8, VP9
# and AV1 have packets that show nothing and frames of other sizes between key frames; MPEG-TS begins and ends anywhere.
_COUNTABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")
_COUNTABLE_CODECS = ("h264", "hevc", "mpeg4", "mjpeg", "prores", "dnxhd", "ffv1", "rawvideo")
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop the transparency


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """The properties of a video as it is displayed.

    Attributes:
        num_frames: Number of frames that are shown.
        width: Width in pixels, which are square, after rotation.
        height: Height in pixels after rotation.
        fps: Average frame rate.
        times: Seconds from the first frame to each frame, by their time stamps.
    """

    num_frames: int
    width: int
    height: int
    fps: Fraction
    times: tuple[float, ...] = dataclasses.field(repr=False)

    @property
    def duration(self) -> float:
        """Duration in seconds; at a varying rate the last frame counts as long as the one before it."""
        if self.is_steady:
            return float(self.num_frames / self.fps)
        return 2 * self.times[-1] - self.times[-2]

    @property
    def is_steady(self) -> bool:
        """Whether every frame is within half a frame of where its number and the average rate put it."""
        rate = float(self.fps)
        return all(abs(time * rate - number) <= 0.5 for number, time in enumerate(self.times))


class _Frame(NamedTuple):
    """A decoded frame, with what the frame itself does not know."""

    seconds: float
    image: av.VideoFrame
    pixel_aspect: Fraction | None


def probe(path: str | Path, all_frames: bool = False) -> VideoInfo:
    """Return the properties of a video, with the number of frames that can be decoded.

    Where packets are exactly frames, this reads all packets but decodes only the key frames, so it does not see damage
    between them. Elsewhere, and with `all_frames`, it decodes everything. The count in the header is not reliable: it
    is too large for a truncated file, it includes frames that an edit list hides, and some containers have none.

    Raises:
        UserError: The file is missing, empty, not a video, has no moving picture, or has fewer frames than its header
            promises; it is damaged, changes its size or is HDR.
    """
    times, rate = _packet_times(path)
    if all_frames or times is None:
        times = [frame.seconds for frame in _decoded(path)]
    if rate and times != sorted(times):  # parts were joined without new time stamps
        times = [float(number / rate) for number in range(len(times))]
    rate = _average_rate(times, rate)
    if not rate:
        raise UserError(f"{path}: has no moving picture; {_REMEDY}")
    height, width, _ = read_frames(path, [0])[0].shape
    return VideoInfo(len(times), width, height, rate, tuple(time - times[0] for time in times))


def check_frames(path: str | Path, count: int | None = None) -> None:
    """Decode the first `count` frames, or all.

    Raises:
        UserError: One of them is damaged or cannot be shown, or there are fewer.
    """
    num_frames = sum(1 for _ in itertools.islice(_decoded(path), count))
    if count is not None and num_frames < count:
        raise UserError(f"{path}: frame {count - 1} was asked for, but only {num_frames} frames can be decoded")


def iter_frames(path: str | Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yield all frames in display order, as a player shows them. Holds one frame at a time in memory.

    Raises:
        UserError: The file cannot be opened (see `probe`), or a frame cannot be decoded or shown, is damaged or has
            another size than the first.
    """
    with _named(path):
        for frame in _decoded(path):
            yield shown_picture(frame.image, frame.pixel_aspect)


def read_frames(path: str | Path, indices: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
    """Return the frames `indices`, in that order.

    The file is decoded up to the last of them. Only the requested frames are kept in memory.

    Raises:
        UserError: See `iter_frames`; or an index is negative or beyond the last frame.
    """
    wanted = set(indices)
    if not wanted or min(wanted) < 0:
        raise UserError(f"{path}: frame indices must not be empty or negative, but are {list(indices)}")
    frames = itertools.islice(iter_frames(path), max(wanted) + 1)
    kept, num_frames = {}, 0
    for num_frames, frame in enumerate(frames, start=1):
        if num_frames - 1 in wanted:
            kept[num_frames - 1] = frame
    if num_frames <= max(wanted):
        raise UserError(f"{path}: frame {max(wanted)} was asked for, but only {num_frames} frames can be decoded")
    return np.stack([kept[index] for index in indices])


def _packet_times(path: str | Path) -> tuple[list[float] | None, Fraction | None]:
    """Return the times of the frames in seconds, None where only decoding tells them, and the average frame rate."""
    if is_animation(path):
        return None, None
    repeats = _repeats(path)
    with _open(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        exact = container.format.name in _COUNTABLE_FORMATS and stream.codec_context.name in _COUNTABLE_CODECS
        stream.codec_context.skip_frame = "NONKEY"
        times, num_packets, first, size = [], 0, None, None
        for packet in container.demux(stream):
            try:
                for frame in packet.decode() if exact else ():
                    size = _checked_size(frame, size, num_packets)
            except (av.FFmpegError, NotShown):  # `_decoded` names it, unless the file is truncated
                exact = False
            if not packet.size:
                continue
            num_packets += 1
            if packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata"):
                exact = False
                continue
            first = packet if first is None else first
            # What is shown before the first key frame, but comes after it, refers to frames that are not there.
            exact = exact and first.is_keyframe and packet.pts >= first.pts
            if not packet.is_discard:
                times.append(float(packet.pts * stream.time_base))
        num_frames = sum(repeats) if repeats else num_packets
        if num_frames < stream.frames:
            raise UserError(f"{path}: truncated, {num_frames} of {stream.frames} frames are present; {_REMEDY}")
    if not exact:
        return None, rate
    times.sort()
    if repeats and len(repeats) == len(times):
        times = [times[0] + float(slot / rate) for slot in range(num_frames)]
    return times, rate


def _average_rate(times: Sequence[float], stated: Fraction | None) -> Fraction | None:
    """Return the rate that the file states, unless the time stamps tell another: some files state the highest."""
    span, intervals = times[-1] - times[0] if times else 0, len(times) - 1
    if span <= 0 or (stated and abs(span * stated - intervals) <= max(1, intervals / 50)):
        return stated if times else None
    return Fraction(intervals / span).limit_denominator(1001)


def _decoded(path: str | Path) -> Iterator[_Frame]:
    """Yield the frames in display order, each one whole and as large as the first."""
    if is_animation(path):
        with _named(path):
            for seconds, pixels in read_animation(path):
                yield _Frame(seconds, av.VideoFrame.from_ndarray(pixels, format="rgb24"), None)
        return
    repeats = _repeats(path)
    with _open(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        size, number = None, 0
        for frame, repeat in zip(
            _images(container, stream), itertools.chain(repeats, itertools.repeat(1)), strict=False
        ):
            size = _checked_size(frame, size, number)
            for _ in range(repeat):
                untimed = repeats or frame.pts is None
                seconds = float(number / rate) if untimed else float(frame.pts * stream.time_base)
                yield _Frame(seconds, frame, stream.sample_aspect_ratio)
                number += 1


def _images(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    decoder = stream.codec_context
    if decoder.name in _ALPHA_DECODERS and stream.metadata.get("alpha_mode") == "1":
        decoder = av.CodecContext.create(_ALPHA_DECODERS[decoder.name], "r")
    decoder.thread_type = "SLICE"  # with a thread a frame, FFmpeg hands some damaged frames out before it flags them
    for number, (packet, following) in enumerate(_with_following(container.demux(stream))):
        # Something is missing here. If a key frame follows, files were joined, and no frame refers to what is missing.
        if packet.is_corrupt and not any(later.is_keyframe for later in following):
            yield from decoder.decode(None)
            raise NotShown(f"damaged, data is missing after about {number} frames; {_REMEDY}")
        if packet.size:
            yield from decoder.decode(packet)
    yield from decoder.decode(None)


def _with_following(packets: Iterator[av.Packet]) -> Iterator[tuple[av.Packet, tuple[av.Packet, ...]]]:
    """Yield each packet with the two after it: FFmpeg's MPEG-TS marks a gap up to two packets before it."""
    window = collections.deque()
    for packet in itertools.chain(packets, (None, None)):
        window.append(packet)
        if len(window) > 2:
            yield window.popleft(), tuple(filter(None, window))


def _checked_size(frame: av.VideoFrame, size: tuple[int, int] | None, number: int) -> tuple[int, int]:
    """Return the size of a frame, which must be whole, have colours that can be shown, and be of `size` if given."""
    if frame.is_corrupt:
        raise NotShown(f"damaged, as of frame {number}; {_REMEDY}")
    check_colours(frame)
    shown = upright_size(frame)
    if size not in (None, shown):
        raise NotShown(
            f"the picture changes its size at frame {number}, from {size[0]} x {size[1]} to {shown[0]} x {shown[1]}; "
            "cut the video there"
        )
    return shown


def _repeats(path: str | Path) -> list[int]:
    """Return how often each frame of an AVI is shown; empty for other files.

    Capture programs write an empty chunk where nothing has changed. FFmpeg leaves it out, but counts it as time.
    """
    with _open(path) as (container, stream):
        if container.format.name != "avi":
            return []
        slots = [packet.dts for packet in container.demux(stream) if packet.size]
        if None in slots or not slots or any(later <= slot for slot, later in itertools.pairwise(slots)):
            return []
        # Empty chunks at the end and a truncated file look alike, but for the size that the header promises.
        with open(path, "rb") as file:
            promised = 8 + int.from_bytes(file.read(8)[4:], "little")
        is_whole = abs(Path(path).stat().st_size - promised) <= 1
        end = max(slots[-1] + 1, stream.frames if is_whole else 0)
    return [later - slot for slot, later in itertools.pairwise([0, *slots[1:], end])]


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Yield the container and its moving track. Turns every error in the block into a UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; correct the path in the data")
    if not Path(path).stat().st_size:
        raise UserError(f"{path}: the file is empty; {_REMEDY}")
    with _named(path):
        track = _moving_track(path)
        with _open_file(path) as container:
            yield container, container.streams[track]


def _open_file(path: str | Path) -> av.container.InputContainer:
    """Open a file as a file: `Scene: one.mp4` is no address. Nor may it refer to anything but files."""
    return av.open(f"file:{path}", options={"protocol_whitelist": "file"})


def _moving_track(path: str | Path) -> int:
    """Return the number of FFmpeg's choice among the tracks that are no cover and no thumbnail."""
    with _open_file(path) as container:
        tracks = [track for track in container.streams.video if not track.disposition & _STILL]
        if not tracks:
            kind = "moving picture" if container.streams.video else "video stream"
            raise UserError(f"{path}: has no {kind}; {_REMEDY}")
        best = container.streams.best("video")
        best = best if best in tracks else tracks[0]
        counts = dict.fromkeys([best.index, *(track.index for track in tracks)], 0)
        for packet in container.demux(tracks) if len(tracks) > 1 else ():
            counts[packet.stream_index] += packet.size > 0
            if counts[best.index] > 1:
                break
        return max(counts, key=counts.get)


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Turn every error of a decoder into a UserError that names the file: one bad file must not end a job."""
    try:
        yield
    except NotShown as error:
        raise UserError(f"{path}: {error}") from error
    except UserError:
        raise
    except av.FFmpegError as error:
        raise UserError(f"{path}: damaged, truncated or not a video ({error.strerror}); {_REMEDY}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{path}: cannot be read ({reason}); {_REMEDY}") from error
