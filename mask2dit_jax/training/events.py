"""A run's TensorBoard event file, written by the thread that logs.

tensorboardX encodes the events and records. Its SummaryWriter is not used, because it writes from a thread that a full
disk kills with a traceback in the middle of a run.
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
    """Yield an event file in the first process and None in the others. All events are written however the run ends.

    Args:
        folder: Local folder, or gs:// with google-cloud-storage installed.
    """
    if jax.process_index() != 0:
        yield None
        return
    events = EventFile(folder)
    try:
        yield events
    finally:
        events.close()


class EventFile:
    """An event file, flushed every FLUSH_SECONDS and at the end.

    An event that cannot be written is lost, with a warning. The next event then starts a new file, because the old one
    may end in the middle of a record. TensorBoard reads all files of a folder as one run.
    """

    def __init__(self, folder: epath.PathLike):
        """Remember the folder. The file is created by the first event.

        Args:
            folder: Local folder, or gs:// with google-cloud-storage installed.
        """
        self._folder = str(folder)
        self._writer, self._num_opened, self._flushed = None, 0, -math.inf

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a number."""
        self._add(summary.scalar(name, value), step)

    def add_text(self, name: str, text: str, step: int) -> None:
        """Add a text."""
        self._add(summary.text(name, text), step)

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Add an image, (h w c) uint8."""
        self._add(summary.image(name, image, dataformats="HWC"), step)

    def close(self) -> None:
        """Write all events and close the file."""
        if self._writer:
            self._try(self._writer.close)
            self._writer = None

    def _add(self, made, step: int) -> None:
        event = Event(wall_time=time.time(), step=step, summary=made)
        self._try(lambda: self._opened().write_event(event))
        # Rarely, because in a bucket a flush uploads the whole file.
        if self._writer and time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._try(self._writer.flush)
            self._flushed = time.monotonic()

    def _opened(self) -> EventsWriter:
        if self._writer is None:
            directory_check(self._folder)
            # tensorboardX's own names differ only by the second.
            suffix = f".{self._num_opened}" if self._num_opened else ""
            self._writer = EventsWriter(f"{self._folder}/events", suffix)
            self._num_opened += 1
        return self._writer

    def _try(self, write) -> None:
        try:
            write()
        except Exception as error:  # from a disk or a bucket; no figure is worth the run
            logging.warning("cannot write events to %s: %s", self._folder, _short(error))
            self._writer = None


def _short(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".splitlines()[0]
