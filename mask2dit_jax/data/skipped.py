"""The account of what cannot be used: every item with its name and reason, up to a share of all."""

import threading
from collections.abc import Iterator, Mapping

from absl import logging

from mask2dit_jax.data.sources import printable
from mask2dit_jax.errors import UserError


class Skipped(Mapping[str, str]):
    """Name -> reason of every item that was left out. It grows while training reads; threads may add to it.

    Args:
        total: how many items there are, usable or not.
        max_share: how many of them may be left out, as a share.
    """

    def __init__(self, total: int, max_share: float):
        self.total, self.max_share = total, max_share
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Says so in the log, once for each name.

        Raises:
            UserError: that makes too many.
        """
        name, reason = printable(name), printable(reason)
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = reason
        logging.warning("%s is skipped: %s", name, reason)
        self.check()

    def check(self) -> None:
        """Raises UserError if more than the allowed share is left out."""
        if len(self) <= self.max_share * self.total:
            return
        some = "; ".join(f"{name}: {reason}" for name, reason in list(self.items())[:3])
        raise UserError(
            f"{len(self)} of {self.total} items cannot be used, more than data.max_skipped_share={self.max_share:g} "
            f"({some}{'; ...' if len(self) > 3 else ''}); build_data --check lists all; correct or remove them"
        )

    def __getitem__(self, name: str) -> str:
        return self._reasons[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._reasons))

    def __len__(self) -> int:
        return len(self._reasons)
