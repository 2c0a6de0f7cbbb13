"""Concatenation of videos without encoding them again, so that a story equals its scenes bit for bit."""

import contextlib
import os
from collections.abc import Iterator, Sequence

import av
from etils import epath

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output


def join_videos(path: str | os.PathLike, parts: Sequence[str | os.PathLike]) -> None:
    """Concatenate videos that `write_video` wrote with the same size and frame rate into one mp4.

    Memory use does not grow with the number of frames.

    Args:
        path: Output, local or gs://.
        parts: Videos, local or gs://.

    Raises:
        UserError: A part is damaged or encoded differently from the first, or `path` cannot be written.
    """
    delay = max(_delay(part) for part in parts)
    with (
        atomic_output(path) as local,
        av.open(f"file:{local}", "w", format="mp4", options={"movflags": "+faststart"}) as whole,
    ):
        stream, header, start, number = None, None, 0, 0
        for part in parts:
            with _open(part) as container:
                video = container.streams.video[0]
                if stream is None:
                    stream = whole.add_stream_from_template(video)
                    stream.time_base = video.time_base
                    header = video.codec_context.extradata
                if video.codec_context.extradata != header:
                    raise UserError(f"{part} is not encoded like {parts[0]}; delete it to have it written again")
                for packet in container.demux(video):
                    if packet.size:
                        # Space the frames one tick apart in decoding order. Their own decoding times would collide at
                        # the joins, because a video of one or two frames has no delay for reordered frames.
                        packet.dts = (number - delay) * packet.duration
                        packet.pts += start
                        packet.stream = stream
                        number += 1
                        whole.mux(packet)
                start += video.duration


def _delay(part: str | os.PathLike) -> int:
    """Return the number of frames that a decoder reads ahead before it shows the first."""
    with _open(part) as container:
        first = next(packet for packet in container.demux(container.streams.video[0]) if packet.size)
        return (first.pts - first.dts) // first.duration


@contextlib.contextmanager
def _open(part: str | os.PathLike) -> Iterator[av.container.InputContainer]:
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(epath.Path(part).open("rb"))
            container = opened.enter_context(av.open(file))
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{part}: cannot be read ({error.strerror}); delete it to have it written again") from error
        yield container
