"""Names with accents, which a disk and a file that names them may spell in two ways."""

import unicodedata

import pytest

from mask2dit_jax.io.paths import find_file

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("on_disk", "asked"), [(NFC, NFD), (NFD, NFC), (NFC + NFD, NFD + NFC), (NFC, NFC)])
def test_a_name_finds_its_other_spelling(tmp_path, on_disk, asked):
    """In every folder on the way, and where one name has both spellings in it."""
    (tmp_path / on_disk / "plain").mkdir(parents=True)
    file = tmp_path / on_disk / "plain" / f"{on_disk}.mp4"
    file.touch()
    assert find_file(tmp_path / asked / "plain" / f"{asked}.mp4") == file


def test_a_relative_path_stays_relative(tmp_path, monkeypatch):
    (tmp_path / NFD).touch()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(find_file(NFC)) == NFD
    assert str(find_file(f"other/../{NFC}")) == f"other/../{NFD}"


def test_the_exact_name_comes_first(tmp_path):
    for name in (NFC, NFD):
        (tmp_path / name).touch()
    assert [find_file(tmp_path / name).name for name in (NFC, NFD)] == [NFC, NFD]


@pytest.mark.parametrize("name", [NFC, f"{NFC}/{NFC}", "plain", "\0", "é\0", "\udcff", "é" * 300, "Café", ""])
def test_what_is_not_there_stays_as_it_was_asked_for(tmp_path, name):
    (tmp_path / "plan").touch()
    (tmp_path / "cafe").touch()  # another name, not another spelling
    assert find_file(tmp_path / "none" / name) == tmp_path / "none" / name
    assert find_file(tmp_path / name) == tmp_path / name
