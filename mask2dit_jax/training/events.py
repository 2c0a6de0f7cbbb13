"""TensorBoard's file of a run, written by the thread that logs.

tensorboardX makes the events and the records. Its own SummaryWriter hands them to a thread, which a full disk kills
with a traceback wherever the run happens to be.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from absl import logging
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import directory_check

FLUSH_SECONDS = 60


@contextmanager
def open_event_file(folder: epath.PathLike) -> Iterator["EventFile | None"]:
    """Of the first process; None on the others. However a run ends, what was logged is written."""
    if jax.process_index() != 0:
        yield None
        return
    events = EventFile(folder)
    try:
        yield events
    finally:
        events.close()


class EventFile:
    """Events reach the disk once in a while, and at the end.

    What finds no room there is lost and said; the next event begins a new file, since the old one may end within a
    record. TensorBoard reads all files of a folder as one run.
    """

    def __init__(self, folder: epath.PathLike):
        """folder: local, or gs:// with google-cloud-storage installed."""
        self._folder = str(folder)
        self._writer, self._num_opened, self._flushed = None, 0, -math.inf

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(summary.scalar(name, value), step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self._add(summary.text(name, text), step)

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """image: (h w c) uint8."""
        self._add(summary.image(name, image, dataformats="HWC"), step)

    def close(self) -> None:
        if self._writer:
            self._try(self._writer.close)
            self._writer = None

    def _add(self, made, step: int) -> None:
        event = Event(wall_time=time.time(), step=step, summary=made)
        self._try(lambda: self._opened().write_event(event))
        if self._writer and time.monotonic() - self._flushed > FLUSH_SECONDS:  # a whole file goes up to gs://
            self._try(self._writer.flush)
            self._flushed = time.monotonic()

    def _opened(self) -> EventsWriter:
        if self._writer is None:
            directory_check(self._folder)
            suffix = f".{self._num_opened}" if self._num_opened else ""  # the name alone tells seconds apart
            self._writer = EventsWriter(f"{self._folder}/events", suffix)
            self._num_opened += 1
        return self._writer

    def _try(self, write) -> None:
        try:
            write()
        except Exception as error:  # of a disk or of gs://; no figure is worth the run it is about
            logging.warning("what was to be shown could not be written to %s: %s", self._folder, _short(error))
            self._writer = None


def _short(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".splitlines()[0]
