"""What a run logs, read back: also where the disk gives out for a while."""

import resource
import struct
import threading

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from mask2dit_jax.training import events as events_module
from mask2dit_jax.training.events import open_event_file


def read_events(folder):
    """(step, value) of all files of a run: records of a length, a checksum, an event and a checksum."""
    for file in sorted(folder.glob("events*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            yield from ((event.step, value) for value in event.summary.value)


def test_what_is_written_is_read(tmp_path):
    threads = threading.active_count()
    with open_event_file(tmp_path / "run") as events:
        events.add_scalar("loss", 0.5, 3)
        events.add_text("skipped", "a.mp4: no video stream", 4)
        events.add_image("board", np.zeros((4, 6, 3), np.uint8), 5)
        assert threading.active_count() == threads
    (first, loss), (second, text), (third, image) = read_events(tmp_path / "run")
    assert (first, loss.tag, loss.simple_value) == (3, "loss", 0.5)
    assert (second, text.tensor.string_val[0]) == (4, b"a.mp4: no video stream")
    assert (third, image.image.height, image.image.width) == (5, 4, 6)


def test_a_full_disk_costs_what_was_logged_meanwhile(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(events_module, "FLUSH_SECONDS", -1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_event_file(tmp_path) as events:
        events.add_scalar("loss", 1.0, 1)
        size = next(tmp_path.iterdir()).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            events.add_scalar("loss", 2.0, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        events.add_scalar("loss", 3.0, 3)
    assert [step for step, _ in read_events(tmp_path)] == [1, 3]
    (line,) = caplog.messages
    assert line == f"cannot write events to {tmp_path}: File too large"
