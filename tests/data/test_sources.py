import json
import os
import unicodedata

import pytest

from mask2dit_jax.data.sources import (
    Clip,
    Group,
    read_pretrain_csv,
    read_sft_json,
    scan_pretrain_csv,
    scan_sft_json,
    write_pretrain_csv,
    write_sft_json,
)
from mask2dit_jax.errors import UserError

HEADER = "fps,width,height,caption,path,num_frame\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"only its presence counts")
    return tmp_path


def clip(folder, name, caption="a bus, seen from above"):
    return Clip(name, folder / name, caption, 89, 23.976, 640, 272)


def shot(**changes):
    values = {"vid": "a", "width": 640, "height": 272, "duration": 3.712, "fps": 23.976, "url": "a.mp4", "caption": "x"}
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def test_csv_round_trip(folder):
    captions = ["a bus, seen from above", 'he says "no"\nand leaves', "line\u2028separator, 汉字"]
    clips = [clip(folder, "a.mp4", caption) for caption in captions]
    write_pretrain_csv(folder / "pretrain.csv", clips)
    assert (folder / "pretrain.csv").read_text().startswith(HEADER)
    assert read_pretrain_csv(folder / "pretrain.csv") == clips


def test_json_round_trip(folder):
    groups = [Group("one", (clip(folder, "a.mp4"), clip(folder, "b.mp4"))), Group("two", (clip(folder, "b.mp4"),))]
    write_sft_json(folder / "sft.json", groups)
    assert read_sft_json(folder / "sft.json") == groups
    assert set(json.loads((folder / "sft.json").read_text())[0]["values"][0]) == set(shot())


def test_a_spreadsheet_s_csv(folder):
    (folder / "d.csv").write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + b"25.0,640,272,a bus,a.mp4,78.0\r\n")
    assert read_pretrain_csv(folder / "d.csv")[0].num_frames == 78


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column fps, width"),
        ("fps,width,height,path,num_frame\n25,1,1,a.mp4,9\n", "no column caption; the first line must name"),
        (HEADER, "has no rows"),
        (HEADER + "25,640,272,a bus,a.mp4,78\n25,640,272,a bus,c.mp4,78\n", "row 2: no video at .*c.mp4"),
        (HEADER + "25,640,272, ,a.mp4,78\n", r"row 1 \(a.mp4\): the caption is empty"),
        (HEADER + "25,640,272,a bus,,78\n", "row 1: names no video"),
        (HEADER + "25,640,272,a bus, red,a.mp4,78\n", "row 1: has more values than columns"),
        (HEADER + "25,640,272,a bus,a.mp4\n", "row 1: num_frame is None; it must be a positive number"),
        (HEADER + "25,640,272,a bus,a.mp4,many\n", "row 1: num_frame is 'many'"),
        (HEADER + "0,640,272,a bus,a.mp4,78\n", "row 1: fps is '0'"),
        (HEADER + '25,640,272,"a bus,a.mp4,78\n', "no valid csv after line 1"),
    ],
)
def test_faults_in_a_csv(folder, content, message):
    (folder / "data.csv").write_text(content)
    with pytest.raises(UserError, match=f"data.csv.*{message}") as error:
        read_pretrain_csv(folder / "data.csv")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "no valid json"),
        ("{}", "must be a list of at least one"),
        ("[]", "must be a list of at least one"),
        ("[3]", "entry 1: must be"),
        (json.dumps([{"prefix": "one"}]), "entry 1: must be"),
        (
            json.dumps([{"prefix": "one", "values": [shot(caption=None)]}]),
            r"entry 1 \(one\), shot 1: no caption; a shot",
        ),
        (json.dumps([{"prefix": "one", "values": [shot(), 3]}]), r"entry 1 \(one\), shot 2: no vid, width"),
        (json.dumps([{"prefix": "one", "values": [shot(caption="")]}]), r"shot 1 \(a.mp4\): the caption is empty"),
        (json.dumps([{"prefix": "one", "values": [shot(url="c.mp4")]}]), "shot 1: no video at .*c.mp4"),
        (json.dumps([{"prefix": "one", "values": [shot(fps="fast")]}]), "shot 1: fps is 'fast'"),
        (json.dumps([{"prefix": "one", "values": [shot(duration=-1)]}]), "shot 1: duration is -1"),
    ],
)
def test_faults_in_a_json(folder, content, message):
    (folder / "data.json").write_text(content)
    with pytest.raises(UserError, match=f"data.json.*{message}") as error:
        read_sft_json(folder / "data.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("caption", ["nan", "NaN", "None", "null", "N/A", " <NA> "])
def test_what_a_data_frame_writes_for_an_empty_cell_is_an_empty_caption(folder, caption):
    (folder / "data.csv").write_text(f"{HEADER}25,640,272,{caption},a.mp4,78\n25,640,272,Nan bakes bread,b.mp4,78\n")
    scan = scan_pretrain_csv(folder / "data.csv")
    assert [clip.name for clip in scan.clips] == ["b.mp4"]
    assert "the caption is empty" in scan.faults["a.mp4"]
    shots = [shot(caption=caption), shot(caption=float("nan")), shot(caption="one")]
    (folder / "data.json").write_text(json.dumps([{"prefix": "one", "values": shots}]))
    assert [clip.caption for clip in scan_sft_json(folder / "data.json").clips] == ["one"]


@pytest.mark.parametrize("read", [read_pretrain_csv, read_sft_json])
def test_files_that_cannot_be_read(tmp_path, read):
    with pytest.raises(UserError, match="gone: cannot be read"):
        read(tmp_path / "gone")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)


def test_a_scan_goes_on_after_a_faulty_row(folder):
    rows = [
        "25,640,272,a bus,a.mp4,78",
        "25,640,272, ,b.mp4,78",
        "25,640,272,a bus,c.mp4,78",
        "25,640,272,x,y,a.mp4,78",
    ]
    rows += ["many,1,1,a bus,b.mp4,9", "25,640,272,another bus,b.mp4,78", "25,640,272,a bus,a.mp4,78"]
    (folder / "data.csv").write_text(HEADER + "\n".join(rows))
    scan = scan_pretrain_csv(folder / "data.csv")
    assert [(clip.name, clip.caption) for clip in scan.clips] == [("a.mp4", "a bus"), ("b.mp4", "another bus")]
    told = {"b.mp4": "caption is empty", "c.mp4": "no video at", "row 4": "more values", "b.mp4 again": "fps is 'many'"}
    assert list(scan.faults) == list(told)
    assert all(words in scan.faults[name] for name, words in told.items())
    assert (scan.groups, scan.num_clips) == (None, 6)


def test_a_faulty_shot_keeps_its_place(folder):
    shots = [shot(), shot(url="c.mp4"), 3, shot(url="b.mp4", caption="y"), shot()]
    (folder / "data.json").write_text(json.dumps([{"prefix": "one", "values": shots}, {"prefix": "two"}]))
    scan = scan_sft_json(folder / "data.json")
    (group,) = scan.groups
    assert [clip and clip.name for clip in group.clips] == ["a.mp4", None, None, "b.mp4", "a.mp4"]
    assert [clip.name for clip in scan.clips] == ["a.mp4", "b.mp4"]
    assert list(scan.faults) == ["c.mp4", "one, shot 3", "entry 2"]


@pytest.mark.parametrize("content", ["", HEADER, "fps,width\n1,2\n", HEADER + '25,640,272,"a bus,a.mp4,78\n'])
def test_a_broken_csv_is_no_faulty_row(folder, content):
    (folder / "data.csv").write_text(content)
    with pytest.raises(UserError, match=r"data.csv"):
        scan_pretrain_csv(folder / "data.csv")


def test_names_may_be_other_bytes_than_utf_8_captions_may_not(folder):
    name = os.fsdecode(b"caf\xe9.mp4")
    (folder / name).write_bytes(b"video")
    clips = [clip(folder, name, "un caf\u00e9")]
    write_pretrain_csv(folder / "data.csv", clips)
    write_sft_json(folder / "data.json", [Group("g", tuple(clips))])
    assert read_pretrain_csv(folder / "data.csv") == clips
    assert read_sft_json(folder / "data.json") == [Group("g", tuple(clips))]
    (folder / "latin.csv").write_bytes(HEADER.encode() + b"25,640,272,un caf\xe9,a.mp4,78\n")
    assert "a.mp4): the caption is not UTF-8 text" in scan_pretrain_csv(folder / "latin.csv").faults["a.mp4"]
    half = json.dumps([{"prefix": "g", "values": [shot(url="\ud800.mp4")]}])  # no file can be called so
    (folder / "half.json").write_text(half)
    assert list(scan_sft_json(folder / "half.json").faults) == ["\\ud800.mp4"]


def test_a_caption_in_the_wrong_column(folder):
    (folder / "data.csv").write_text(HEADER + f"25,640,272,a.mp4,{'a bus ' * 1000},78\n")
    (reason,) = scan_pretrain_csv(folder / "data.csv").faults.values()
    assert "row 1: no video at" in reason


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_file", ["NFC", "NFD"])
def test_a_name_finds_its_video_however_its_accents_are_spelt(tmp_path, on_disk, in_file):
    stored, named = (unicodedata.normalize(form, "café/été.mp4") for form in (on_disk, in_file))
    (tmp_path / stored).parent.mkdir()
    (tmp_path / stored).touch()
    (tmp_path / "pretrain.csv").write_text(f"{HEADER}25,64,48,x,{named},40\n")
    (tmp_path / "sft.json").write_text(json.dumps([{"prefix": "a", "values": [shot(url=named)]}]))
    (one,) = read_pretrain_csv(tmp_path / "pretrain.csv")
    ((other,),) = (group.clips for group in read_sft_json(tmp_path / "sft.json"))
    assert one.path == other.path == tmp_path / stored
    assert one.name == other.name == named  # which latents of an earlier run go by


def test_a_data_file_is_found_by_either_spelling(folder):
    (folder / unicodedata.normalize("NFD", "données.csv")).write_text(f"{HEADER}25,64,48,x,a.mp4,40\n")
    assert len(read_pretrain_csv(folder / unicodedata.normalize("NFC", "données.csv"))) == 1
