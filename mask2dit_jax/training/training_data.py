"""Where a run's batches come from: `config.data.path` is a csv or json of videos, or a folder of latents.

The clips of a csv or json are encoded inside the job, once, into a data set under `config.data.cache`. A data set that
`build_data --encode` wrote needs neither videos nor the weights of the VAE and the text encoder. Both are the same
records, so batches are the same for the same seed and variants.

With `config.data.frames` "fresh" only the text embeddings are stored. Every visit of a clip draws its frames anew and
encodes them inside the training loop.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mask2dit_jax.config import FRAMES, TrainConfig
from mask2dit_jax.curate.build_records import SceneLatents, describe_data_set
from mask2dit_jax.data import latents
from mask2dit_jax.data.batches import drawn_samples, make_batches
from mask2dit_jax.data.encode import Encoders, FreshScenes, encode_clip
from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.data.latents import LatentSettings, RecordShapes, SceneRecords
from mask2dit_jax.data.samples import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.data.sources import Scan, Skipped, scan_data_file
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import FileLock
from mask2dit_jax.io.paths import is_remote
from mask2dit_jax.media.transforms import say_cropped
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.models.registry import CodecConfig
from mask2dit_jax.models.sizes import scene_layout
from mask2dit_jax.parallel import distributed
from mask2dit_jax.pretrained.encoders import TextEncoder, VideoCodec
from mask2dit_jax.pretrained.former_fingerprint import former_fingerprint
from mask2dit_jax.pretrained.pretrained import Pretrained

STORED, FRESH = FRAMES
_ENCODERS = ("vae", "text_encoder", "tokenizer")
_VISIBLE_S = 90  # a network disk shows what another machine has written after so many seconds at most


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The samples of a run and the store that holds their scenes.

    Attributes:
        store: reads scenes.
        samples: draws the scenes of a sample.
        skipped: reason of everything that cannot be used, by name. It grows when a scene turns out to be unreadable
            while `batches` is read. Each process knows its own rows; `gather_skipped` joins them.
    """

    store: SceneRecords | FreshScenes
    samples: UnrelatedClips | ConsecutiveShots
    skipped: Skipped

    def batches(
        self, start_sample: int, rows: Sequence[int], global_batch_size: int, seed: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches for ever; see `make_batches`. Fresh frames are encoded in the thread that asks for a batch."""
        return make_batches(
            self.store,
            self.samples,
            global_batch_size=global_batch_size,
            seed=seed,
            skipped=self.skipped,
            start_sample=start_sample,
            rows=rows,
        )

    def captions(self, seed: int) -> list[str]:
        """Return the captions of the first sample of step 0, the one that storyboards draw."""
        scenes = drawn_samples(self.store, self.samples, seed=seed, skipped=self.skipped)[0]
        return [scene["caption"].decode() for scene in scenes]

    def gather_skipped(self) -> dict[str, str]:
        """Return what all processes have skipped, the same on each; all must call it at the same step.

        Raises:
            UserError: on every process, if together it is too much.
        """
        for others in distributed.gather_json(dict(self.skipped)):
            for name, reason in others.items():
                self.skipped.add(name, reason)
        return dict(sorted(self.skipped.items()))


def open_training_data(config: TrainConfig, pretrained: Pretrained, model: TransformerConfig) -> TrainingData:
    """Open the data of a run; everything that is stored is encoded and checked when this returns.

    Args:
        config: the run.
        pretrained: the frozen components.
        model: the transformer, whose text tokens and latents are stored.

    Raises:
        UserError: the data cannot be read, is not what the config says, or too much of it cannot be used.
    """
    data = config.data
    if not data.path:
        raise UserError("no data: set --config.data.path to the csv or json of your clips, or to their latents")
    if latents.is_data_set(data.path):
        if config.data.frames == FRESH:
            raise UserError(
                f"data.frames=fresh encodes videos, and {data.path} holds latents; set data.path to a csv or json, or "
                "data.frames=stored"
            )
        store, skipped = _open_records(config, pretrained, model)
    else:
        store, skipped = _open_videos(config, pretrained, model)
    if config.data.kind == "csv":
        return TrainingData(store, UnrelatedClips(store.clips, config.num_scenes), skipped)
    return TrainingData(store, ConsecutiveShots(store.groups, config.num_scenes, store.clips), skipped)


def frame_sampling(config: TrainConfig) -> PretrainSampling | SftSampling:
    """Return the authors' rule for which frames are taken: that of pretraining for a csv, that of SFT for a json."""
    data = config.data
    if config.data.kind == "csv":
        return PretrainSampling(config.num_frames, stride=data.max_stride)
    return SftSampling(config.num_frames, min_stride=data.min_stride, max_stride=data.max_stride)


def latent_settings(config: TrainConfig, pretrained: Pretrained, text_tokens: int) -> LatentSettings:
    """Return everything in the config that decides which numbers are stored for a clip."""
    return LatentSettings(
        sampling=frame_sampling(config),
        size=(config.height, config.width),
        variants=config.data.clip_variants if config.data.frames == STORED else 0,
        seed=config.seed if config.data.frames == STORED else 0,  # of stored choices
        max_tokens=text_tokens,
        encoders=pretrained.fingerprint(*_ENCODERS),
        compute_dtype=config.compute_dtype,
        fit=config.data.fit,
    )


def settings_as_stored(settings: LatentSettings, pretrained: Pretrained, folder: epath.PathLike) -> LatentSettings:
    """Return the settings with the encoders' hash of older versions if the data set in `folder` has that one."""
    if not latents.is_data_set(folder):
        return settings
    former = former_fingerprint(pretrained.folder, _ENCODERS)
    if former != latents.read_settings(folder).get("encoders"):
        return settings
    logging.info("%s is of an older version, which compared the sizes and ends of the encoders' files", folder)
    return dataclasses.replace(settings, encoders=former)


def log_cropped(config: TrainConfig, scan: Scan) -> None:
    """Log how many clips lose much of their picture, by the sizes that the data file gives."""
    said = say_cropped(((clip.height, clip.width) for clip in scan.clips), (config.height, config.width))
    if said and config.data.fit == latents.DEFAULT_FIT:
        logging.warning("by the sizes in the data file, %s", said)


def record_shapes(config: TrainConfig, model: TransformerConfig, vae: CodecConfig) -> RecordShapes:
    """Return the shapes of the scenes that `model` is trained on."""
    layout = scene_layout(config, model, vae)
    height, width = (side * model.patch_size for side in layout.grid)
    latent_shape = (layout.frames[0], height, width, model.latent_channels)
    return RecordShapes(
        latent_shape if config.data.frames == STORED else None, (model.text_tokens, model.text_embed_dim)
    )


def load_encoders(config: TrainConfig, pretrained: Pretrained, text_tokens: int) -> Encoders:
    """Return the VAE and the text encoder, on the devices of this process; each is loaded when it is first called."""
    dtype = jnp.dtype(config.compute_dtype)
    return Encoders(VideoCodec(pretrained, dtype).encode, TextEncoder(pretrained, text_tokens, dtype))


def build_together(builder: SceneLatents) -> None:
    """Build a data set with all processes of this job, each its share; it is complete when this returns.

    Raises:
        UserError: this process cannot write, or too many of its clips cannot be used; or, on every process alike, the
            data set cannot be completed.
    """
    number, count = jax.process_index(), jax.process_count()
    builder.download_and_prepare(process_index=number, process_count=count)
    failure = ""
    if count > 1:
        multihost_utils.sync_global_devices("encoded")
    if number == 0:
        try:
            if count > 1:  # a network disk may not show everything yet; what seems to be missing is written again
                builder.download_and_prepare()
            builder.finish()
        except UserError as error:
            failure = str(error)
    if count > 1:
        failure = distributed.gather_json(failure)[0]
    if failure:
        raise UserError(failure)


def _open_records(
    config: TrainConfig, pretrained: Pretrained, model: TransformerConfig
) -> tuple[SceneRecords, Skipped]:
    path = config.data.path
    # The data set has chosen the frames; the seed of a run draws among them.
    ignored = ["seed"]
    if not (pretrained.vae.has_weights and pretrained.text_encoder.has_weights):
        logging.info("%s has no encoder weights: it is not checked that %s was made with them", pretrained, path)
        ignored.append("encoders")
    settings = settings_as_stored(latent_settings(config, pretrained, model.text_tokens), pretrained, path)
    latents.check_settings(path, settings, tuple(ignored))
    store = SceneRecords(path)
    index = store.index
    skipped = Skipped(len(index.clips) + len(index.skipped), config.data.max_skipped_share)
    _add_all(skipped, index.skipped)
    return store, skipped


def _open_videos(
    config: TrainConfig, pretrained: Pretrained, model: TransformerConfig
) -> tuple[SceneRecords | FreshScenes, Skipped]:
    """Build, or complete, the data set of this data file under `data.cache`, with all processes."""
    scan = scan_data_file(config.data.kind, config.data.path)
    skipped = Skipped(scan.num_clips, config.data.max_skipped_share)
    _add_all(skipped, scan.faults)
    log_cropped(config, scan)
    settings = latent_settings(config, pretrained, model.text_tokens)
    shapes = record_shapes(config, model, pretrained.vae.config)
    former = dataclasses.replace(settings, encoders=former_fingerprint(pretrained.folder, _ENCODERS))
    if latents.is_data_set(_data_set_path(config.data.cache, former, shapes, scan)):
        settings = former
    encoders = functools.cache(lambda: load_encoders(config, pretrained, model.text_tokens))
    # With several processes none may stop while the others wait for it, so what is too much is found after they meet.
    alone = jax.process_count() == 1
    with _data_set_folder(config.data.cache, settings, shapes, scan) as folder:
        builder = SceneLatents(
            folder,
            settings,
            shapes,
            scan,
            lambda clip: encode_clip(clip, settings, encoders()),
            skipped if alone else Skipped(scan.num_clips, max_share=1.0),
            reuse=[path.parent for path in folder.parent.glob(f"*/{latents.SETTINGS}") if path.parent != folder],
        )
        build_together(builder)
        _wait_for(folder / latents.INDEX)
        store = SceneRecords(folder)
        usable = builder.usable_clips()
    _add_all(skipped, store.index.skipped)
    if config.data.frames == FRESH:
        store = FreshScenes(store, usable, dataclasses.replace(settings, seed=config.seed), encoders().video)
    return store, skipped


@contextlib.contextmanager
def _data_set_folder(cache: str, settings: LatentSettings, shapes: RecordShapes, scan: Scan) -> Iterator[epath.Path]:
    """Give the folder of a data set to this job alone; other jobs that want the same one wait until it is complete.

    The folder's name is a hash of settings and data file, so other settings or captions never meet these latents.
    """
    folder = _data_set_path(cache, settings, shapes, scan)
    lock = FileLock(f"{folder}.lock")
    try:
        is_waiting = False
        while not distributed.gather_json(jax.process_index() == 0 and lock.acquire())[0]:
            if not is_waiting:
                logging.info("%s: %s is encoding these clips; waiting for it", folder, lock.holder())
            is_waiting = True
            time.sleep(1)
        yield folder
    finally:
        lock.release()


def _data_set_path(cache: str, settings: LatentSettings, shapes: RecordShapes, scan: Scan) -> epath.Path:
    if is_remote(cache):
        raise UserError(f"data.cache={cache} is no folder on a disk; for a bucket, use build_data --encode")
    return epath.Path(cache) / latents.json_hash(describe_data_set(settings, shapes, scan))


def _wait_for(path: epath.Path) -> None:
    end = time.monotonic() + _VISIBLE_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(1)


def _add_all(skipped: Skipped, reasons: Mapping[str, str]) -> None:
    for name, reason in reasons.items():
        skipped.add(name, reason)
