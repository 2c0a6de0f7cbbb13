"""The latent data set: what the frozen encoders make of each clip, as ArrayRecord files that TFDS and Grain read.

    DIR/settings.json                                    what made it; the first file written
    DIR/scene_latents-train.array_record-00003-of-00064  shards
    DIR/shard-00003-of-00064.json                        what is in a shard; without it the shard does not count
    DIR/features.json  DIR/dataset_info.json             for TFDS
    DIR/index.json                                       clips, groups, what was skipped; the last file written

A record is one variant (choice of frames) of one clip, complete: latents, embedding, caption, where they come from. So
a scene of training is one read of just its bytes, however many variants a clip has and however long its group is: the
groups are lists of clips in the index. The embedding comes again in each variant, a sixth of a record of the full size.

Records are not compressed (latents do not shrink, and training would unpack them again and again), but hashed: what a
disk or a transfer has changed is noticed. DIR may be gs://.
"""

import bisect
import concurrent.futures
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from mask2dit_jax.data.latent_cache import CacheSettings
from mask2dit_jax.data.scene_store import UnreadableScene
from mask2dit_jax.data.sources import Group
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output

FORMAT = 1  # raise it when the meaning of a stored number changes
SPLIT = "train"
SETTINGS, INDEX = "settings.json", "index.json"
_T, _R = TypeVar("_T"), TypeVar("_R")


@dataclasses.dataclass(frozen=True)
class RecordShapes:
    """`latents` (f h w c) of a scene, `text` (t x) of a caption."""

    latents: tuple[int, int, int, int]
    text: tuple[int, int]

    def features(self) -> tfds.features.FeaturesDict:
        """What a record holds: strings are UTF-8, `video` is the path in the data file with other bytes escaped."""
        feature = tfds.features
        raw = feature.Encoding.BYTES
        return feature.FeaturesDict(
            {
                "mean": feature.Tensor(shape=self.latents, dtype=np.float32, encoding=raw),
                "logvar": feature.Tensor(shape=self.latents, dtype=np.float32, encoding=raw),
                "text": feature.Tensor(shape=self.text, dtype=ml_dtypes.bfloat16, encoding=raw),
                "caption": feature.Text(),
                "video": feature.Text(),
                "source": feature.Text(),  # size and time of the video file
                "variant": feature.Scalar(np.int32),
                "start": feature.Scalar(np.int32),
                "stride": feature.Scalar(np.int32),
                "settings": feature.Text(),  # the fingerprint of what made it
            }
        )

    @property
    def num_bytes(self) -> int:
        """Of one record, nearly."""
        return 2 * 4 * int(np.prod(self.latents)) + 2 * int(np.prod(self.text))


@dataclasses.dataclass(frozen=True)
class StoredClip:
    """A clip in a data set: its records are `number * variants` and the following ones."""

    name: str
    number: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished file of records."""

    file: str
    num_bytes: int
    num_records: int


@dataclasses.dataclass(frozen=True)
class Index:
    """What is in a data set.

    Attributes:
        clips: names of the usable clips, in the order of the data file.
        groups: names, and the numbers in `clips` of their shots (None: not usable); None without groups.
        skipped: name -> reason of every other clip.
        shards: in order; records follow each other through them.
    """

    clips: tuple[str, ...]
    groups: tuple[tuple[str, tuple[int | None, ...]], ...] | None
    skipped: Mapping[str, str]
    shards: tuple[Shard, ...]

    def write(self, folder: epath.Path) -> None:
        with atomic_output(folder / INDEX) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: epath.Path) -> "Index":
        raw = _read_json(folder / INDEX)
        groups = raw["groups"] and tuple((name, tuple(shots)) for name, shots in raw["groups"])
        shards = tuple(Shard(**shard) for shard in raw["shards"])
        return cls(tuple(raw["clips"]), groups, raw["skipped"], shards)


class SceneRecords:
    """A complete data set, opened for reading; threads may share it."""

    def __init__(self, folder: epath.PathLike):
        """Raises UserError if it is not complete, or a shard is not there as it was written."""
        self.folder = epath.Path(folder)
        self.settings = read_settings(self.folder)
        if not (self.folder / INDEX).exists():
            raise UserError(
                f"{folder} is not complete; start its build_data --encode again, it goes on where it stopped"
            )
        self.variants: int = self.settings["variants"]
        self.index = Index.read(self.folder)
        whole = in_parallel(lambda shard: is_whole(self.folder, shard), self.index.shards)
        damaged = [shard.file for shard, ok in zip(self.index.shards, whole, strict=True) if not ok]
        if damaged:
            raise UserError(f"{folder}: {', '.join(damaged)} missing or cut short; start its build_data --encode again")
        self._source = tfds.builder_from_directory(self.folder).as_data_source(SPLIT)

    @property
    def clips(self) -> tuple[StoredClip, ...]:
        return tuple(StoredClip(name, number) for number, name in enumerate(self.index.clips))

    @property
    def groups(self) -> tuple[Group, ...]:
        clips = self.clips
        return tuple(
            Group(name, tuple(None if shot is None else clips[shot] for shot in shots))
            for name, shots in self.index.groups or ()
        )

    def read(self, clip: StoredClip, variant: int) -> dict[str, np.ndarray]:
        """`mean`, `logvar` (f h w c) and `text` (t x, bf16) of one variant; nothing else is read.

        Raises:
            UnreadableScene: its bytes are not those that were written, or cannot be had.
        """
        number = clip.number * self.variants + variant
        try:
            record = self._source[number]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            reason = " ".join(str(error).split())
            message = (
                f"{self.folder}: record {number} (variant {variant}) cannot be read ({reason}); delete "
                f"{self._shard_of(number)} and start its build_data --encode again"
            )
            raise UnreadableScene(clip.name, message) from error
        return {name: record[name] for name in ("mean", "logvar", "text")}

    def _shard_of(self, record: int) -> str:
        ends = list(itertools.accumulate(shard.num_records for shard in self.index.shards))
        return self.index.shards[bisect.bisect_right(ends, record)].file


def is_data_set(path: epath.PathLike) -> bool:
    """True for the folder of a data set, finished or not."""
    return (epath.Path(path) / SETTINGS).exists()


def read_settings(folder: epath.PathLike) -> dict:
    """What made the data set (CacheSettings.describe).

    Raises:
        UserError: it is no data set, or one of another version of this format.
    """
    if not is_data_set(folder):
        raise UserError(f"{folder} is no latent data set; build_data --encode makes one")
    raw = _read_json(epath.Path(folder) / SETTINGS)
    if not isinstance(raw, dict) or "records" not in raw:
        raise UserError(f"{folder} is no latent data set, its {SETTINGS} is another program's; give another folder")
    if raw["records"] != FORMAT:
        raise UserError(f"{folder} has format {raw['records']}, this version reads {FORMAT}; encode it anew")
    return raw["settings"]


def differences(stored: Mapping, wanted: Mapping) -> list[str]:
    """Of two descriptions: "size [48, 80], not [32, 48]" for everything that differs, names of nested ones dotted."""
    flat_stored, flat_wanted = _flat(stored), _flat(wanted)
    return [
        f"{name} {flat_stored.get(name)}, not {flat_wanted.get(name)}"
        for name in dict.fromkeys([*flat_stored, *flat_wanted])
        if flat_stored.get(name) != flat_wanted.get(name)
    ]


def check_settings(folder: epath.PathLike, wanted: CacheSettings, ignored: tuple[str, ...] = ()) -> None:
    """Raises UserError if the data set was made in another way, naming every difference."""
    stored, described = read_settings(folder), wanted.describe()
    for name in ignored:
        stored, described = ({**settings, name: None} for settings in (stored, described))
    found = differences(stored, described)
    if found:
        raise UserError(
            f"{folder} was made with {'; '.join(found)}; set these in the config, or encode a data set anew"
        )


def is_whole(folder: epath.Path, shard: Shard) -> bool:
    """True if the file is there with the size that it had when it was written."""
    path = folder / shard.file
    return path.exists() and path.stat().length == shard.num_bytes


def in_parallel(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """For questions to a bucket: each takes a tenth of a second, and there may be a hundred thousand."""
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return list(pool.map(function, items))


def _flat(settings: Mapping, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in settings.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def _read_json(path: epath.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); encode the data set anew") from error
