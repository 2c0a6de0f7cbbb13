"""Building the latent data set (data/records.py): shard by shard, by any number of processes, through any kill.

TFDS's own `download_and_prepare` writes into a temporary folder, removes it when anything fails and renames it at the
end: nothing to go on from, no way to share the work, and a copy of everything on gs://, where nothing can be renamed.
So the builder here says what TFDS asks a builder for (features, shards), and brings shards to disk itself:

* which clip goes into which shard depends on the data file alone, so every process finds its own, whatever came before;
* a shard appears whole (atomic_output), then the report of what is in it; a shard without its report is written again.
  So no record is lost or doubled wherever a kill falls, and at most one shard a process is encoded twice;
* TFDS's metadata and the index come last, from the reports, when every shard is there.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from mask2dit_jax.data import latents
from mask2dit_jax.data.latent_cache import CacheSettings, EncodedClip, source_stamp
from mask2dit_jax.data.latents import SPLIT, Index, RecordShapes, Shard
from mask2dit_jax.data.skipped import Skipped
from mask2dit_jax.data.sources import Clip, Scan, printable
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import atomic_output, remove_leftovers

_SHARD_BYTES = 512 << 20  # what a kill may cost to encode again; larger files would be no faster to read
_LEAST_SHARDS = 64  # so that as many processes can share the work, where there are as many clips

EncodeClip = Callable[[Clip], EncodedClip]


class SceneLatents(tfds.core.ShardBasedBuilder, skip_registration=True):
    """The builder of one data set, in one folder; `as_data_source("train")` reads it when it is done."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        folder: epath.PathLike,
        settings: CacheSettings,
        shapes: RecordShapes,
        scan: Scan,
        encode: EncodeClip,
        skipped: Skipped,
    ):
        """
        Args:
            settings: what decides the numbers that are stored.
            shapes: of what `encode` returns.
            scan: the data file.
            encode: one clip; raises UserError for one that cannot be used.
            skipped: takes these down.

        Raises:
            UserError: the folder cannot be written, or holds a data set that was made in another way.
        """
        self._folder, self._settings, self._shapes, self._scan = epath.Path(folder), settings, shapes, scan
        self._encode, self._skipped = encode, skipped
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
        size = self._clips_per_shard
        starts = range(0, len(self._scan.clips), size)
        clips = [self._scan.clips[start : start + size] for start in starts]
        return {SPLIT: [ShardOfClips(part, self._settings, self._encode, self._skipped) for part in clips]}

    @property
    def _clips_per_shard(self) -> int:
        by_size = _SHARD_BYTES // (self._shapes.num_bytes * self._settings.variants)
        return max(1, min(by_size, math.ceil(len(self._scan.clips) / _LEAST_SHARDS)))

    @functools.cached_property
    def _shards(self) -> list["ShardOfClips"]:
        return self._shard_iterators_per_split()[SPLIT]

    def download_and_prepare(self, *, process_index: int = 0, process_count: int = 1) -> int:
        """Writes the shards of this process that are not there yet; `finish` is to follow when all processes are done.

        Returns:
            How many shards were written.

        Raises:
            UserError: too many clips cannot be used; a file cannot be written.
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
        """Writes TFDS's metadata and the index. The data set is complete with it, and stays so if called again.

        Raises:
            UserError: a shard is not there; too many clips cannot be used, or none can.
        """
        everything = range(len(self._shards))
        unfinished = self._unfinished(everything)
        if unfinished:
            raise UserError(
                f"{self._folder}: {len(unfinished)} of {len(self._shards)} shards are not there yet, the first "
                f"{self._path(unfinished[0]).name}; start build_data --encode again when no process is at work"
            )
        reports = latents.in_parallel(self._report, everything)
        outcomes = [outcome for report in reports for outcome in report["clips"]]
        found = {outcome["name"]: outcome["skipped"] for outcome in outcomes if "skipped" in outcome}
        skipped = {**self._scan.faults, **found}
        for name, reason in skipped.items():
            self._skipped.add(name, reason)
        remove_leftovers(self._folder)
        if (self._folder / latents.INDEX).exists():
            return Index.read(self._folder)
        usable = [clip for clip, outcome in zip(self._scan.clips, outcomes, strict=True) if "skipped" not in outcome]
        if not usable:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
            raise UserError(f"none of {self._scan.num_clips} clips can be used ({some})")
        index = self._index(usable, skipped, reports)
        self._write_info(index)
        index.write(self._folder)
        return index

    def _index(self, usable: Sequence[Clip], skipped: Mapping[str, str], reports: Sequence[dict]) -> Index:
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
            filename_template=self._template,
        )
        self.info.set_splits(tfds.core.SplitDict([split]))
        self.info.write_to_directory(self._folder)

    def _claim_folder(self) -> None:
        """The folder is ours from its first file on; another data set in it is refused."""
        path = self._folder / latents.SETTINGS
        data_file = {**_describe(self._scan), "shards": len(self._shards)}
        claim = {"records": latents.FORMAT, "settings": self._settings.describe(), "data_file": data_file}
        is_used = self._folder.exists() and (
            not self._folder.is_dir() or any(not file.name.startswith(".") for file in self._folder.iterdir())
        )
        if path.exists():
            latents.check_settings(self._folder, self._settings)
            found = latents.differences(json.loads(path.read_text())["data_file"], data_file)
            if found:
                raise UserError(f"{self._folder} was made of another data file: {'; '.join(found)}; give a new folder")
        elif is_used:
            raise UserError(f"{self._folder} is not empty and no latent data set; give a new folder")
        else:
            with atomic_output(path) as partial:
                partial.write_text(json.dumps(claim, indent=2) + "\n")

    @property
    def _template(self) -> tfds.core.ShardedFileTemplate:
        return tfds.core.ShardedFileTemplate(
            data_dir=self._folder, dataset_name=self.name, split=SPLIT, filetype_suffix="array_record"
        )

    def _path(self, number: int) -> epath.Path:
        return self._template.sharded_filepath(shard_index=number, num_shards=len(self._shards))

    def _shard(self, number: int, report: Mapping) -> Shard:
        return Shard(self._path(number).name, report["bytes"], report["records"])

    def _report_path(self, number: int) -> epath.Path:
        return self._folder / f"shard-{number:05d}-of-{len(self._shards):05d}.json"

    def _report(self, number: int) -> dict | None:
        """None if it is not there, or not whole: an upload may have been cut off."""
        path = self._report_path(number)
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError:
            return None

    def _unfinished(self, numbers: Sequence[int]) -> list[int]:
        finished = latents.in_parallel(self._is_finished, numbers)
        return [number for number, is_finished in zip(numbers, finished, strict=True) if not is_finished]

    def _is_finished(self, number: int) -> bool:
        """True if the shard is there as it was written, and none of its videos has been changed since."""
        report = self._report(number)
        if report is None or not latents.is_whole(self._folder, self._shard(number, report)):
            return False
        clips = zip(self._shards[number].clips, report["clips"], strict=True)
        return all(outcome["source"] == source_stamp(clip) for clip, outcome in clips)

    def _write_shard(self, number: int, progress: tqdm) -> None:
        path, shard = self._path(number), self._shards[number]
        remove_leftovers(self._folder, path.name)
        self._report_path(number).unlink(missing_ok=True)  # it speaks of the file that is replaced now
        with atomic_output(path) as partial:
            num_records = self._write_records(partial, shard(progress))
            num_bytes = partial.stat().st_size  # what is to arrive, wherever it is uploaded to
        report = {"bytes": num_bytes, "records": num_records, "clips": shard.outcomes}
        with atomic_output(self._report_path(number)) as partial:
            partial.write_text(json.dumps(report))

    def _write_records(self, path: os.PathLike, examples: Iterator[tuple[str, dict]]) -> int:
        features = self.info.features
        serializer = ExampleSerializer(features.get_serialized_info())
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        num_records = 0
        try:
            for _, example in examples:
                writer.write(serializer.serialize_example(features.encode_example(example)))
                num_records += 1
            writer.close()
        except RuntimeError as error:  # how it reports a full disk
            raise UserError(f"cannot write {path}: {error}; make room, then start again: it goes on here") from error
        return num_records


class ShardOfClips:
    """Generates the records of some clips, and keeps what became of each."""

    def __init__(self, clips: Sequence[Clip], settings: CacheSettings, encode: EncodeClip, skipped: Skipped):
        self.clips, self._settings, self._encode, self._skipped = tuple(clips), settings, encode, skipped
        self.outcomes: list[dict] = []

    def __call__(self, progress: tqdm | None = None) -> Iterator[tuple[str, dict]]:
        self.outcomes = []
        for number, clip in enumerate(self.clips):
            outcome = {"name": printable(clip.name), "source": source_stamp(clip)}
            try:
                encoded = self._encode(clip)
            except UserError as error:
                outcome["skipped"] = printable(str(error))
                self._skipped.add(clip.name, str(error))
            else:
                outcome.update(starts=encoded.starts.tolist(), strides=encoded.strides.tolist())
                for variant, example in enumerate(self._records(clip, encoded, outcome["source"])):
                    yield f"{number}/{variant}", example
            self.outcomes.append(outcome)
            if progress is not None:
                progress.update()

    def _records(self, clip: Clip, encoded: EncodedClip, source: str) -> Iterator[dict]:
        fingerprint, text = self._settings.fingerprint(), encoded.text.astype(ml_dtypes.bfloat16)
        for variant, (start, stride) in enumerate(zip(encoded.starts, encoded.strides, strict=True)):
            yield {
                "mean": encoded.mean[variant],
                "logvar": encoded.logvar[variant],
                "text": text,
                "caption": clip.caption,
                "video": printable(clip.name),
                "source": source,
                "variant": variant,
                "start": start,
                "stride": stride,
                "settings": fingerprint,
            }


def _describe(scan: Scan) -> dict:
    """Of the data file: how many clips, and a hash of which, in which groups."""
    digest = hashlib.sha256()
    for clip in scan.clips:
        digest.update(os.fsencode(f"{clip.name}\0{clip.caption}\0"))
    numbers = {clip: number for number, clip in enumerate(scan.clips)}
    groups = [(group.name, [numbers.get(clip) for clip in group.clips]) for group in scan.groups or ()]
    digest.update(json.dumps(groups).encode())
    return {"clips": len(scan.clips), "groups": len(groups), "content": digest.hexdigest()[:16]}
