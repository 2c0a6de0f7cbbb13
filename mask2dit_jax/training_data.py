"""Where a run's batches come from: `config.data.path` is a csv or json of videos, or a folder of latents.

Videos are decoded and encoded inside the job, once, into `config.data.cache`. A latent data set (build_data --encode)
needs neither videos nor the weights of the VAE and the text encoder. Batches are the same from both, for the same seed
and variants; only the text embeddings of a data set are rounded to bf16.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mask2dit_jax.config import TrainConfig
from mask2dit_jax.curate.encode import Encoders, encode_clips
from mask2dit_jax.data import latents
from mask2dit_jax.data.batches import make_batches
from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.data.latent_cache import CacheSettings, LatentCache
from mask2dit_jax.data.latents import RecordShapes
from mask2dit_jax.data.samples import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.data.scene_store import LatentStore
from mask2dit_jax.data.skipped import Skipped
from mask2dit_jax.data.sources import Group, NamedClip, Scan, scan_pretrain_csv, scan_sft_json
from mask2dit_jax.errors import UserError
from mask2dit_jax.models import sizes as scene_sizes
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.models.vae import VAEConfig
from mask2dit_jax.parallel import distributed
from mask2dit_jax.pretrained.encoders import TextEncoder, VideoCodec
from mask2dit_jax.pretrained.pretrained import Pretrained

_ENCODERS = ("vae", "text_encoder", "tokenizer")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Samples to draw, and the store that holds their scenes.

    `skipped` maps the name of everything that cannot be used to the reason. It grows when a scene turns out to be
    unreadable while `batches` is read; each process knows of its own rows (`gather_skipped` knows of all).
    """

    store: LatentStore
    samples: UnrelatedClips | ConsecutiveShots
    skipped: Skipped

    @property
    def num_samples(self) -> int:
        """Of one epoch."""
        return len(self.samples)

    def batches(
        self, start_step: int, rows: Sequence[int], global_batch_size: int, seed: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Endless; see `make_batches`."""
        return make_batches(
            self.store,
            self.samples,
            global_batch_size=global_batch_size,
            seed=seed,
            skipped=self.skipped,
            start_step=start_step,
            rows=rows,
        )

    def gather_skipped(self) -> dict[str, str]:
        """What all processes have skipped: the same on each. All must call it at the same step; it waits for them.

        Raises:
            UserError: on every process, if together it is too much.
        """
        for others in distributed.gather_json(dict(self.skipped)):
            for name, reason in others.items():
                self.skipped.add(name, reason)
        return dict(sorted(self.skipped.items()))


def open_training_data(config: TrainConfig, pretrained: Pretrained, model: TransformerConfig) -> TrainingData:
    """Everything is encoded and checked when this returns.

    Args:
        pretrained: the frozen components.
        model: its text tokens are those that captions are encoded to.

    Raises:
        UserError: the data cannot be read, is another than the config says, or too much of it cannot be used.
    """
    data = config.data
    if not data.path:
        raise UserError(
            "no data: set --config.data.path to the csv (pretrain) or json (sft) of your clips, or to their latents"
        )
    settings = latent_settings(config, pretrained, model.text_tokens)
    if latents.is_data_set(data.path):
        return _open_records(config, settings, pretrained)
    return _encode_online(config, settings, pretrained)


def scan_data_file(kind: str, path) -> Scan:
    """What the data file of a format ("csv", "json") holds, its faulty rows set apart."""
    return {"csv": scan_pretrain_csv, "json": scan_sft_json}[kind](path)


def frame_sampling(config: TrainConfig) -> PretrainSampling | SftSampling:
    """The stage's rule for which frames of a clip are taken."""
    data = config.data
    if data.kind == "csv":
        return PretrainSampling(config.num_frames, stride=data.max_stride)
    return SftSampling(config.num_frames, min_stride=data.min_stride, max_stride=data.max_stride)


def latent_settings(config: TrainConfig, pretrained: Pretrained, text_tokens: int) -> CacheSettings:
    """Everything in the config that decides which numbers are stored for a clip."""
    return CacheSettings(
        sampling=frame_sampling(config),
        size=(config.height, config.width),
        variants=config.data.clip_variants,
        seed=config.seed,
        max_tokens=text_tokens,
        encoders=pretrained.fingerprint(*_ENCODERS),
        compute_dtype=config.compute_dtype,
    )


def record_shapes(config: TrainConfig, model: TransformerConfig, vae: VAEConfig) -> RecordShapes:
    """Of the encoded scenes that a transformer is trained with."""
    layout = scene_sizes.scene_layout(config, model, vae)
    height, width = (side * model.patch_size for side in layout.grid)
    latents = (layout.frames[0], height, width, model.latent_channels)
    return RecordShapes(latents, (model.text_tokens, model.text_embed_dim))


def load_encoders(config: TrainConfig, pretrained: Pretrained, text_tokens: int) -> Encoders:
    """The VAE and the text encoder, on the devices of this process."""
    dtype = jnp.dtype(config.compute_dtype)
    return Encoders(VideoCodec(pretrained, dtype).encode, TextEncoder(pretrained, text_tokens, dtype))


def _open_records(config: TrainConfig, settings: CacheSettings, pretrained: Pretrained) -> TrainingData:
    path = config.data.path
    # Which frames were chosen is the data set's; the seed of a run draws among them.
    ignored = ["seed"]
    if not (pretrained.vae.has_weights and pretrained.text_encoder.has_weights):
        logging.info("%s has no encoder weights: it is not checked that %s was made with them", pretrained, path)
        ignored.append("encoders")
    latents.check_settings(path, settings, tuple(ignored))
    store = latents.SceneRecords(path)
    index = store.index
    skipped = Skipped(len(index.clips) + len(index.skipped), config.data.max_skipped_share)
    for name, reason in index.skipped.items():
        skipped.add(name, reason)
    return TrainingData(store, _samples(config, store.clips, store.groups), skipped)


def _encode_online(config: TrainConfig, settings: CacheSettings, pretrained: Pretrained) -> TrainingData:
    scan = scan_data_file(config.data.kind, config.data.path)
    skipped = Skipped(scan.num_clips, config.data.max_skipped_share)
    for name, reason in scan.faults.items():
        skipped.add(name, reason)
    cache = LatentCache.open(config.data.cache, settings)
    encode = functools.partial(
        encode_clips, cache=cache, encoders=load_encoders(config, pretrained, settings.max_tokens)
    )
    if jax.process_count() > 1:
        # Each its share, on a disk that all can read. What is left after that, each tries alone: so all know the same
        # clips to be unusable, and none stops while others wait for it.
        mine = scan.clips[jax.process_index() :: jax.process_count()]
        encode(mine, skipped=Skipped(scan.num_clips, max_share=1.0))
        multihost_utils.sync_global_devices("encoded")
    usable = encode(scan.clips, skipped=skipped).usable
    return TrainingData(cache, _samples(config, usable, scan.groups or ()), skipped)


def _samples(
    config: TrainConfig, usable: Sequence[NamedClip], groups: Sequence[Group]
) -> UnrelatedClips | ConsecutiveShots:
    if config.data.kind == "csv":
        return UnrelatedClips(usable, config.num_scenes)
    return ConsecutiveShots(groups, config.num_scenes, usable)
