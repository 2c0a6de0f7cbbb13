"""The latent data set: what the frozen encoders make of each clip, as ArrayRecord files that TFDS and Grain read.

    DIR/settings.json                                    what made it; the first file written
    DIR/scene_latents-train.array_record-00003-of-00064  shards
    DIR/shard-00003-of-00064.json                        report of a shard; without it the shard does not count
    DIR/features.json  DIR/dataset_info.json             for TFDS
    DIR/index.json                                       clips, groups, skipped clips; the last file written

A record holds one variant (choice of frames) of one clip: latents, text embedding, caption and origin. So a scene of a
training sample is one read of just its bytes, however many variants a clip has and however long its group is. Groups
are lists of clips in the index. Every variant repeats the text embedding, which is a sixth of a full-size record.

Records are not compressed, because latents do not shrink and training would unpack them again and again. They are
hashed, so that bytes changed by a disk or a transfer are noticed. DIR may be gs://.
"""

import bisect
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from mask2dit_jax.data.frames import FrameChoices, PretrainSampling, SftSampling
from mask2dit_jax.data.sources import Clip, Group
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output
from mask2dit_jax.io.content import file_hash, file_state
from mask2dit_jax.io.paths import is_remote

FORMAT = 1  # raise it when the meaning of a stored number changes
SPLIT = "train"
DEFAULT_FIT = "crop"
SETTINGS, INDEX = "settings.json", "index.json"
_OTHER_FILES = 512  # that a process may have open besides shards
_T, _R = TypeVar("_T"), TypeVar("_R")


class UnreadableScene(UserError):
    """The scene of clip `name` cannot be read; the rest of the store may be in order."""

    def __init__(self, name: str, message: str):
        """Name the clip, so that it can be counted as skipped."""
        super().__init__(message)
        self.name = name


@dataclasses.dataclass(frozen=True)
class LatentSettings:
    """Everything but the clips themselves that decides which numbers are stored.

    Attributes:
        sampling: rule for which frames are taken, and how many.
        size: height and width in pixels.
        variants: choices of frames stored for each clip; 0 stores the text embedding alone.
        seed: seed of these choices.
        max_tokens: text tokens, padding included.
        encoders: hash of the encoders' weights.
        compute_dtype: precision of the encoders' activations.
        fit: how frames of another shape come to `size`.
    """

    sampling: PretrainSampling | SftSampling
    size: tuple[int, int]
    variants: int
    seed: int
    max_tokens: int
    encoders: str
    compute_dtype: str
    fit: str = DEFAULT_FIT

    def describe(self) -> dict:
        """Return all settings as JSON can hold them.

        The default fit is left out, as in data sets from before there was a choice.
        """
        sampling = {"rule": type(self.sampling).__name__, **dataclasses.asdict(self.sampling)}
        described = {"format": FORMAT, **dataclasses.asdict(self), "size": list(self.size), "sampling": sampling}
        if self.fit == DEFAULT_FIT:
            del described["fit"]
        return described

    def fingerprint(self) -> str:
        """Return a hash of all settings."""
        return json_hash(self.describe())

    def start(self, clip: Clip, variant: int, choices: FrameChoices) -> int:
        """Draw the first frame of a variant: always the same one for the same seed, clip and variant."""
        return choices.draw(np.random.default_rng([self.seed, int(clip_key(clip), 16), variant]))


@dataclasses.dataclass(frozen=True)
class RecordShapes:
    """Shapes of what a record stores.

    Attributes:
        latents: (f h w c) of a scene; None stores the text embedding alone.
        text: (t x) of a caption.
    """

    latents: tuple[int, int, int, int] | None
    text: tuple[int, int]

    def features(self) -> tfds.features.FeaturesDict:
        """Return the fields of a record; `video` is the path in the data file, with bytes other than UTF-8 escaped."""
        feature = tfds.features
        raw = feature.Encoding.BYTES
        moments = {
            name: feature.Tensor(shape=self.latents, dtype=np.float32, encoding=raw)
            for name in ("mean", "logvar")
            if self.latents
        }
        return feature.FeaturesDict(
            {
                **moments,
                "text": feature.Tensor(shape=self.text, dtype=ml_dtypes.bfloat16, encoding=raw),
                "caption": feature.Text(),
                "video": feature.Text(),
                "source": feature.Text(),  # SHA-256 of the video file; older records have its size and time
                "variant": feature.Scalar(np.int32),
                "start": feature.Scalar(np.int32),
                "stride": feature.Scalar(np.int32),
                "settings": feature.Text(),  # fingerprint of the LatentSettings
            }
        )

    @property
    def num_bytes(self) -> int:
        """Size of a record, without its few short texts."""
        latents = 2 * 4 * int(np.prod(self.latents)) if self.latents else 0
        return latents + 2 * int(np.prod(self.text))


@dataclasses.dataclass(frozen=True)
class StoredClip:
    """A clip of a data set; `number` is its place among the usable clips."""

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
    """The table of contents of a data set.

    Attributes:
        clips: names of the usable clips, in the order of the data file.
        groups: names, and the numbers in `clips` of their shots (None: not usable); None without groups.
        skipped: name -> reason of every other clip.
        shards: files of records, in order; record numbers run on from one to the next.
    """

    clips: tuple[str, ...]
    groups: tuple[tuple[str, tuple[int | None, ...]], ...] | None
    skipped: Mapping[str, str]
    shards: tuple[Shard, ...]

    def write(self, folder: epath.Path) -> None:
        """Write it to `folder`, in one move."""
        with atomic_output(folder / INDEX) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: epath.Path) -> "Index":
        """Read what `write` wrote."""
        raw = _read_json(folder / INDEX)
        groups = raw["groups"] and tuple((name, tuple(shots)) for name, shots in raw["groups"])
        shards = tuple(Shard(**shard) for shard in raw["shards"])
        return cls(tuple(raw["clips"]), groups, raw["skipped"], shards)


class SceneRecords:
    """A complete data set, opened for reading; threads may share it."""

    def __init__(self, folder: epath.PathLike):
        """Open the data set.

        Raises:
            UserError: it is not complete, or a shard is missing or has another size than when it was written.
        """
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
        if not is_remote(folder):
            _allow_open_files(len(self.index.shards))
        self._source = tfds.builder_from_directory(self.folder).as_data_source(SPLIT)

    @property
    def clips(self) -> tuple[StoredClip, ...]:
        """The usable clips, in the order of the data file."""
        return tuple(StoredClip(name, number) for number, name in enumerate(self.index.clips))

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of shots; none if the data file lists single clips."""
        clips = self.clips
        return tuple(
            Group(name, tuple(None if shot is None else clips[shot] for shot in shots))
            for name, shots in self.index.groups or ()
        )

    def read(self, clip: StoredClip, variant: int) -> dict[str, np.ndarray]:
        """Read one record and nothing else.

        Returns:
            `mean` and `logvar` (f h w c), unless the data set stores no frames, `text` (t x) in bf16, and `caption`,
            bytes in UTF-8.

        Raises:
            UnreadableScene: the record's bytes have changed or cannot be read, or it is another clip's, because the
                data set was built again in the meantime.
        """
        number = clip.number * max(1, self.variants) + variant
        try:
            record = self._source[number]
            if record["video"].decode() != clip.name:
                raise ValueError(f"it holds {record['video'].decode()}, not {clip.name}")
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            reason = " ".join(str(error).split())
            message = (
                f"{self.folder}: record {number} (variant {variant}) cannot be read ({reason}); delete "
                f"{self._shard_of(number)} and start its build_data --encode, or the run that made it, again"
            )
            raise UnreadableScene(clip.name, message) from error
        return {name: record[name] for name in ("mean", "logvar", "text", "caption") if name in record}

    def _shard_of(self, record: int) -> str:
        ends = list(itertools.accumulate(shard.num_records for shard in self.index.shards))
        return self.index.shards[bisect.bisect_right(ends, record)].file


def is_data_set(path: epath.PathLike) -> bool:
    """Return whether `path` is the folder of a data set, complete or not."""
    return (epath.Path(path) / SETTINGS).exists()


def read_settings(folder: epath.PathLike) -> dict:
    """Return the settings that made the data set, as `LatentSettings.describe` gives them.

    Raises:
        UserError: the folder is no data set, or one of another version of this format.
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
    """Return "size [48, 80], not [32, 48]" for each value that differs; names of nested values are dotted."""
    flat_stored, flat_wanted = _flat(stored), _flat(wanted)
    return [
        f"{name} {flat_stored.get(name)}, not {flat_wanted.get(name)}"
        for name in dict.fromkeys([*flat_stored, *flat_wanted])
        if flat_stored.get(name) != flat_wanted.get(name)
    ]


def check_settings(folder: epath.PathLike, wanted: LatentSettings, ignored: tuple[str, ...] = ()) -> None:
    """Check that the data set was made with the settings `wanted`, up to the names in `ignored`.

    Raises:
        UserError: it was not; the message names every difference.
    """
    stored, described = ({"fit": DEFAULT_FIT, **settings} for settings in (read_settings(folder), wanted.describe()))
    for name in ignored:
        stored, described = ({**settings, name: None} for settings in (stored, described))
    found = differences(stored, described)
    if found:
        remedy = "set these in the config"
        if stored.get("encoders") != described["encoders"]:
            remedy += " (encoders: set pretrained to the directory that the data set was encoded with)"
        raise UserError(f"{folder} was made with {'; '.join(found)}; {remedy}, or encode a data set anew")


def is_whole(folder: epath.Path, shard: Shard) -> bool:
    """Return whether the file is there with the size that it had when it was written."""
    path = folder / shard.file
    return path.exists() and path.stat().length == shard.num_bytes


def in_parallel(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Map `function` over `items` in threads: a request to a bucket takes 0.1 s, and there may be 100,000 of them."""
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return list(pool.map(function, items))


def clip_key(clip: Clip) -> str:
    """Return a hash that names a clip on every machine: of its path in the data file and its caption."""
    return hashlib.sha256(os.fsencode(f"{clip.name}\0{clip.caption}")).hexdigest()[:16]


def describe_source(clip: Clip) -> dict[str, str]:
    """Return what identifies the video file: `source`, the hash of its content, and `state`, its size and times."""
    try:
        return {"state": file_state(clip.path), "source": file_hash(clip.path)}
    except OSError:
        return {"state": "", "source": "missing"}


def is_source(clip: Clip, described: Mapping[str, str]) -> bool:
    """Return whether the video file has the content that `describe_source` found.

    Reads the file only if its state has changed: it has been copied or touched, or replaced.
    """
    source = described["source"]
    try:
        state = file_state(clip.path)
        return described.get("state") == state or source == dated_stamp(state) or source == file_hash(clip.path)
    except OSError:
        return source == "missing"


def dated_stamp(state: str) -> str:
    """Return size and time of a video file in this `state`, by which older versions knew it."""
    size, _, modified, _ = state.split()
    return f"{size} bytes, modified {modified}"


def json_hash(description: object) -> str:
    """Return a hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _allow_open_files(num_shards: int) -> None:
    """Raise this process's limit of open files, because TFDS keeps every shard open that it has read from.

    Raises:
        UserError: the system does not allow so many.
    """
    wanted = num_shards + _OTHER_FILES
    soft, hard = (limit if limit >= 0 else wanted for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if hard < wanted:
        raise UserError(
            f"{num_shards} shards need {wanted} open files, {hard} are allowed; start with ulimit -n {wanted}"
        )
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
