"""The story world: what is said and unsaid, and that files keep it."""

import itertools

import numpy as np
import pytest

from experiments.desk import desk_data, world
from mask2dit_jax.data.sources import read_pretrain_csv, read_sft_json
from mask2dit_jax.media.video_reader import read_frames
from mask2dit_jax.pretrained.encoders import VideoCodec
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.pretrained.tokenizer import load_tokenizer, tokenize


def test_captions_say_what_differs_and_nothing_else():
    captions = {said.caption for said in world.ALL_SAID}
    assert len(captions) == len(world.ALL_SAID) == 16
    for unsaid in world.ALL_UNSAID:
        for word in (unsaid.palette, unsaid.pattern):
            assert not any(word in caption for caption in captions)


def test_unsaid_things_are_plain_to_see():
    """Half of the pixels or more change visibly with the palette or the pattern alone, and none with a shuffle."""
    said = world.ALL_SAID[0]
    for one, other in itertools.combinations(world.ALL_UNSAID, 2):
        frames = [world.render(world.WorldScene(unsaid, said)).astype(int) for unsaid in (one, other)]
        changed = (np.abs(frames[0] - frames[1]).max(axis=-1) > 60).mean()
        assert changed > 0.3, (one, other, changed)


def test_the_square_moves_as_the_caption_says():
    for scene in world.ALL_SCENES:
        colour = np.round((np.array(world.COLOURS[scene.said.colour]) + 1) * 127.5)
        before, after = (np.argwhere((frame == colour).all(axis=-1)).mean(axis=0) for frame in world.render(scene))
        moved = after - before
        np.testing.assert_array_equal(np.sign(moved), world.DIRECTIONS[scene.said.direction])


def test_a_story_shares_its_unsaid_things_unless_its_scenes_are_unrelated():
    stories = world.draw_stories(0, 300, num_scenes=3)
    assert all(len({scene.unsaid for scene in story}) == 1 for story in stories)
    assert len({story[0].unsaid for story in stories}) == len(world.ALL_UNSAID)
    mixed = world.draw_stories(0, 1000, num_scenes=3, unrelated=0.5)
    share = np.mean([len({scene.unsaid for scene in story}) > 1 for story in mixed])
    assert share == pytest.approx(0.5 * (1 - 1 / 81), abs=0.05)
    assert stories == world.draw_stories(0, 300, num_scenes=3)
    assert stories != world.draw_stories(1, 300, num_scenes=3)


def test_prompts_of_a_story_can_be_made_to_differ():
    stories = world.draw_stories(0, 200, num_scenes=12, distinct=True)
    assert all(len({scene.said for scene in story}) == 12 for story in stories)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    desk_data.write_world(folder)
    desk_data.write_stories(folder, "stories", world.draw_stories(0, 20))
    return folder


def test_files_hold_every_pixel(folder):
    clips = {clip for group in read_sft_json(folder / "stories.json") for clip in group.clips}
    scenes = {scene.name: scene for scene in world.ALL_SCENES}
    for clip in clips:
        scene = scenes[clip.path.stem]
        np.testing.assert_array_equal(read_frames(clip.path, range(2)), world.render(scene))
        assert clip.caption == scene.said.caption


def test_pretraining_clips_are_the_same_scenes_with_a_last_frame_to_spare(folder):
    clips = read_pretrain_csv(folder / "pretrain.csv")
    assert len(clips) == len(world.ALL_SCENES)
    for clip, scene in zip(clips, world.ALL_SCENES, strict=True):
        np.testing.assert_array_equal(read_frames(clip.path, range(2)), world.render(scene))


def test_the_codec_is_lossless_and_its_latents_have_about_unit_variance(folder):
    codec = VideoCodec(Pretrained.open(folder / "pretrained"), np.float32)
    latents = []
    for scene in world.ALL_SCENES[::7]:
        mean, _ = codec.encode(world.render(scene).astype(np.float32) / 127.5 - 1)
        latents.append(mean * codec.config.scaling_factor)
        np.testing.assert_array_equal(codec.decode(latents[-1]), world.render(scene))
    assert 0.8 < np.std(latents) < 1.2


def test_captions_fit_their_text_tokens(folder):
    tokenizer = load_tokenizer(folder / "pretrained" / "tokenizer")
    ids = tokenize(tokenizer, [said.caption for said in world.ALL_SAID], world.TEXT_TOKENS)
    assert (ids[:, -1] == tokenizer.eos_token_id).all()  # nothing cut, nothing padded
    assert len({tuple(row) for row in ids.tolist()}) == 16
