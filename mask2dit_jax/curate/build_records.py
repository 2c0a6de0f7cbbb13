"""Building the latent data set (data/latents.py): shard by shard, by any number of processes, through any kill.

TFDS's own `download_and_prepare` writes into a temporary folder, removes it when anything fails and renames it at the
end. That leaves nothing to resume from and no way to share the work, and nothing can be renamed on gs://. So this
builder tells TFDS what it asks a builder for (features, shards), and writes the shards itself:

* The data file alone decides which clip goes into which shard, so every process finds its own shards at any time.
* A shard appears whole (`atomic_output`), then the report of its contents. A shard without its report is written again.
  So no record is lost or doubled wherever a kill falls, and a process encodes at most one shard twice.
* Records of clips that were encoded before with the same settings, and whose videos have not changed since, are copied;
  a whole shard of them is linked.
* TFDS's metadata and the index come last, made from the reports, when every shard is there.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from mask2dit_jax.curate.known_records import (
    REPORT_FILE,
    SHARD_FILE,
    Known,
    known_records,
    link_shard,
    read_report,
    records_of_data_sets,
    records_of_shard,
)
from mask2dit_jax.data import latents
from mask2dit_jax.data.encode import EncodedClip
from mask2dit_jax.data.latents import (
    SPLIT,
    Index,
    LatentSettings,
    RecordShapes,
    Shard,
    clip_key,
    describe_source,
    is_source,
)
from mask2dit_jax.data.sources import Clip, Scan, Skipped, printable
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output, remove_leftovers

_SHARD_BYTES = 512 << 20  # the work that a kill may cost; larger files would be no faster to read
_LEAST_SHARDS = 64  # as many processes can share the work, if there are as many clips

EncodeClip = Callable[[Clip], EncodedClip]


class SceneLatents(tfds.core.ShardBasedBuilder, skip_registration=True):
    """The builder of one data set, in one folder; `SceneRecords` reads it when it is complete."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        folder: epath.PathLike,
        settings: LatentSettings,
        shapes: RecordShapes,
        scan: Scan,
        encode: EncodeClip,
        skipped: Skipped,
        reuse: Sequence[epath.PathLike] = (),
    ):
        """Claim the folder.

        Args:
            folder: where the data set is, or will be.
            settings: everything that decides the numbers that are stored.
            shapes: shapes of what `encode` returns.
            scan: the data file.
            encode: encodes one clip; raises UserError for a clip that cannot be used.
            skipped: records these clips.
            reuse: folders of other data sets. Those with the same settings lend their records.

        Raises:
            UserError: the folder cannot be written, or holds a data set that was made in another way.
        """
        self._folder, self._settings, self._shapes, self._scan = epath.Path(folder), settings, shapes, scan
        self._encode, self._skipped, self._reuse = encode, skipped, tuple(map(epath.Path, reuse))
        self._claim_folder()
        if not (self._folder / latents.INDEX).exists():  # what a kill may have left half written
            (self._folder / "dataset_info.json").unlink(missing_ok=True)
        super().__init__(data_dir=self._folder, file_format="array_record")

    def _build_data_dir(self, given_data_dir: str) -> tuple[str, str]:
        """The folder itself holds the files, not NAME/VERSION below it: a folder is a data set."""
        return given_data_dir, given_data_dir

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Latents and text embeddings of scenes, for mask2dit_jax.",
            features=self._shapes.features(),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager=None) -> dict[str, list["ShardOfClips"]]:
        parts = _split(self._settings, self._shapes, self._scan)
        return {SPLIT: [ShardOfClips(part, self._settings, self._encode, self._skipped) for part in parts]}

    @functools.cached_property
    def _shards(self) -> list["ShardOfClips"]:
        return self._shard_iterators_per_split()[SPLIT]

    def download_and_prepare(self, *, process_index: int = 0, process_count: int = 1) -> int:
        """Write the shards of this process that are not there yet. `finish` follows when all processes are done.

        Returns:
            Number of shards written.

        Raises:
            UserError: too many clips cannot be used, or a file cannot be written.
        """
        mine = range(process_index, len(self._shards), process_count)
        missing = self._unfinished(mine)
        if missing:
            (self._folder / latents.INDEX).unlink(missing_ok=True)
        total, to_do = (sum(len(self._shards[number].clips) for number in numbers) for numbers in (mine, missing))
        with tqdm(total=total, initial=total - to_do, desc="encoding clips", unit="clip") as progress:
            for number in missing:
                self._write_shard(number, progress)
                progress.set_postfix(skipped=len(self._skipped))
        return len(missing)

    def finish(self) -> Index:
        """Write TFDS's metadata and the index, which completes the data set; nothing is written if it is complete.

        Raises:
            UserError: a shard is not there; too many clips cannot be used, or none can.
        """
        unfinished = self._unfinished(range(len(self._shards)))
        if unfinished:
            raise UserError(
                f"{self._folder}: {len(unfinished)} of {len(self._shards)} shards are not there yet, the first "
                f"{self._path(unfinished[0]).name}; start build_data --encode again when no process is at work"
            )
        index = self._index(latents.in_parallel(self._report, range(len(self._shards))))
        for name, reason in index.skipped.items():
            self._skipped.add(name, reason)
        remove_leftovers(self._folder)
        if not index.clips:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(index.skipped.items())[:3])
            raise UserError(f"none of {self._scan.num_clips} clips can be used ({some})")
        if not (self._folder / latents.INDEX).exists() or Index.read(self._folder) != index:
            self._write_info(index)
            index.write(self._folder)
        return index

    def usable_clips(self) -> tuple[Clip, ...]:
        """Return the clips of a complete data set, in the order of its index."""
        return self._usable(latents.in_parallel(self._report, range(len(self._shards))))

    def _usable(self, reports: Sequence[dict]) -> tuple[Clip, ...]:
        outcomes = [outcome for report in reports for outcome in report["clips"]]
        pairs = zip(self._scan.clips, outcomes, strict=True)
        return tuple(clip for clip, outcome in pairs if "skipped" not in outcome)

    def _index(self, reports: Sequence[dict]) -> Index:
        usable = self._usable(reports)
        found = [outcome for report in reports for outcome in report["clips"] if "skipped" in outcome]
        skipped = {**self._scan.faults, **{outcome["name"]: outcome["skipped"] for outcome in found}}
        numbers = {clip: number for number, clip in enumerate(usable)}
        groups = self._scan.groups and tuple(
            (group.name, tuple(numbers.get(clip) for clip in group.clips)) for group in self._scan.groups
        )
        shards = tuple(self._shard(number, report) for number, report in enumerate(reports))
        return Index(tuple(printable(clip.name) for clip in usable), groups, skipped, shards)

    def _write_info(self, index: Index) -> None:
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=[shard.num_records for shard in index.shards],
            num_bytes=sum(shard.num_bytes for shard in index.shards),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=self._folder, dataset_name=self.name, split=SPLIT, filetype_suffix="array_record"
            ),
        )
        self.info.set_splits(tfds.core.SplitDict([split]))
        try:
            self.info.write_to_directory(self._folder)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self._folder}: {reason}; make room, then start again") from error

    def _claim_folder(self) -> None:
        """Write the settings; the folder is ours from this file on, and another data set in it is refused."""
        path = self._folder / latents.SETTINGS
        claim = describe_data_set(self._settings, self._shapes, self._scan)
        is_used = self._folder.exists() and (
            not self._folder.is_dir() or any(not file.name.startswith(".") for file in self._folder.iterdir())
        )
        if path.exists():
            latents.check_settings(self._folder, self._settings)
            found = latents.differences(json.loads(path.read_text())["data_file"], claim["data_file"])
            if found:
                raise UserError(f"{self._folder} was made of another data file: {'; '.join(found)}; give a new folder")
        elif is_used:
            raise UserError(f"{self._folder} is not empty and no latent data set; give a new folder")
        else:
            with atomic_output(path) as partial:
                partial.write_text(json.dumps(claim, indent=2) + "\n")

    def _path(self, number: int) -> epath.Path:
        return self._folder / SHARD_FILE.format(self._part(number))

    def _part(self, number: int) -> str:
        return f"{number:05d}-of-{len(self._shards):05d}"

    def _shard(self, number: int, report: Mapping) -> Shard:
        return Shard(self._path(number).name, report["bytes"], report["records"])

    def _report_path(self, number: int) -> epath.Path:
        return self._folder / REPORT_FILE.format(self._part(number))

    def _report(self, number: int) -> dict | None:
        return read_report(self._report_path(number))

    def _unfinished(self, numbers: Sequence[int]) -> list[int]:
        finished = latents.in_parallel(self._is_finished, numbers)
        return [number for number, is_finished in zip(numbers, finished, strict=True) if not is_finished]

    def _is_finished(self, number: int) -> bool:
        """Return whether the shard is there as it was written, and none of its videos has changed since."""
        report = self._report(number)
        if report is None or not latents.is_whole(self._folder, self._shard(number, report)):
            return False
        clips = zip(self._shards[number].clips, report["clips"], strict=True)
        return all(is_source(clip, outcome) for clip, outcome in clips)

    def _write_shard(self, number: int, progress: tqdm) -> None:
        path, shard = self._path(number), self._shards[number]
        remove_leftovers(self._folder, path.name)
        known = self._known | records_of_shard(self._report_path(number), self._settings)
        self._report_path(number).unlink(missing_ok=True)  # it describes the file that is replaced now
        with atomic_output(path) as partial:
            num_records = shard.link(partial, progress, known) or self._write_records(partial, shard(progress, known))
            num_bytes = partial.stat().st_size  # what is to arrive, wherever it is uploaded to
        report = {"bytes": num_bytes, "records": num_records, "clips": shard.outcomes}
        with atomic_output(self._report_path(number)) as partial:
            partial.write_text(json.dumps(report))

    def _write_records(self, path: os.PathLike, examples: Iterable[dict | bytes]) -> int:
        features = self.info.features
        serializer = ExampleSerializer(features.get_serialized_info())
        num_records = 0
        try:
            writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
            for example in examples:
                if not isinstance(example, bytes):
                    example = serializer.serialize_example(features.encode_example(example))
                writer.write(example)
                num_records += 1
            writer.close()
        except RuntimeError as error:  # ArrayRecord reports a full disk this way
            raise UserError(f"cannot write {path}: {error}; make room, then start again: it goes on here") from error
        return num_records

    @functools.cached_property
    def _known(self) -> Known:
        return records_of_data_sets(self._reuse, self._settings)


class ShardOfClips:
    """Generates the records of some clips, and keeps what became of each."""

    def __init__(self, clips: Sequence[Clip], settings: LatentSettings, encode: EncodeClip, skipped: Skipped):
        """See `SceneLatents` for the arguments."""
        self.clips, self._settings, self._encode, self._skipped = tuple(clips), settings, encode, skipped
        self.outcomes: list[dict] = []

    def link(self, path: os.PathLike, progress: tqdm, known: Known) -> int:
        """Share the file of another data set if one holds just these clips; return its number of records, or 0."""
        stored = [known_records(known, *described) for described in zip(self.clips, self._sources, strict=True)]
        if not link_shard(path, stored):
            return 0
        self.outcomes = [
            {**records.outcome, "state": source["state"]} for records, source in zip(stored, self._sources, strict=True)
        ]
        progress.update(len(self.clips))
        return sum(len(records.numbers) for records in stored)

    def __call__(self, progress: tqdm, known: Known) -> Iterator[dict | bytes]:
        """Yield the records: as bytes those that are `known`, as what TFDS encodes those that are new."""
        self.outcomes = []
        for clip, source in zip(self.clips, self._sources, strict=True):
            outcome = {"name": printable(clip.name), "key": clip_key(clip), **source}
            stored = known_records(known, clip, source)
            records = stored and stored.read()
            if records:
                outcome.update(stored.outcome, state=source["state"])
                yield from records
            else:
                try:
                    encoded = self._encode(clip)
                except UserError as error:
                    outcome["skipped"] = printable(str(error))
                    self._skipped.add(clip.name, str(error))
                else:
                    outcome.update(starts=encoded.starts.tolist(), strides=encoded.strides.tolist())
                    yield from self._records(clip, encoded, outcome["source"])
            self.outcomes.append(outcome)
            progress.update()

    @functools.cached_property
    def _sources(self) -> list[dict[str, str]]:
        return [describe_source(clip) for clip in self.clips]

    def _records(self, clip: Clip, encoded: EncodedClip, source: str) -> Iterator[dict]:
        common = {
            "text": encoded.text.astype(ml_dtypes.bfloat16),
            "caption": clip.caption,
            "video": printable(clip.name),
            "source": source,
            "settings": self._settings.fingerprint(),
        }
        if encoded.mean is None:
            yield {**common, "variant": 0, "start": 0, "stride": 0}
            return
        for variant, (start, stride) in enumerate(zip(encoded.starts, encoded.strides, strict=True)):
            moments = {"mean": encoded.mean[variant], "logvar": encoded.logvar[variant]}
            yield {**common, **moments, "variant": variant, "start": start, "stride": stride}


def describe_data_set(settings: LatentSettings, shapes: RecordShapes, scan: Scan) -> dict:
    """Return everything that decides a data set but the videos: what its settings.json holds."""
    digest = hashlib.sha256()
    for clip in scan.clips:
        digest.update(os.fsencode(f"{clip.name}\0{clip.caption}\0"))
    numbers = {clip: number for number, clip in enumerate(scan.clips)}
    groups = [(group.name, [numbers.get(clip) for clip in group.clips]) for group in scan.groups or ()]
    digest.update(json.dumps(groups).encode())
    data_file = {
        "clips": len(scan.clips),
        "groups": len(groups),
        "content": digest.hexdigest()[:16],
        "shards": len(_split(settings, shapes, scan)),
    }
    return {"records": latents.FORMAT, "settings": settings.describe(), "data_file": data_file}


def _split(settings: LatentSettings, shapes: RecordShapes, scan: Scan) -> list[tuple[Clip, ...]]:
    """Return the clips of each shard."""
    fitting = _SHARD_BYTES // (shapes.num_bytes * max(1, settings.variants))
    size = max(1, min(fitting, math.ceil(len(scan.clips) / _LEAST_SHARDS)))
    return [scan.clips[start : start + size] for start in range(0, len(scan.clips), size)]
