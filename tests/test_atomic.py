"""Files that are written whole, whatever stands in their place."""

import os
import stat
import threading

import pytest

from llava_cot.atomic import check_apart, check_output, replacing


def write(path, text):
    with replacing(path) as file:
        file.write(text)


def test_the_old_file_stays_if_the_block_raises(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o640])
def test_the_mode_stays(tmp_path, mode):
    path = tmp_path / "out.json"
    path.write_text("old")
    path.chmod(mode)
    write(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_owner_stays(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    os.chown(path, 1234, 4321)
    write(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


@pytest.mark.parametrize("kind", ["relative", "absolute", "of a link", "to nothing yet"])
def test_a_link_stays_a_link(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "real.json", tmp_path / "link.json"
    if kind != "to nothing yet":
        target.write_text("old")
    if kind == "of a link":
        (tmp_path / "second.json").symlink_to(target)
        link.symlink_to("second.json")
    else:
        link.symlink_to(target if kind == "absolute" else "elsewhere/real.json")
    write(link, "new")
    assert link.is_symlink() and not target.is_symlink() and target.read_text() == "new"
    assert os.listdir(tmp_path / "elsewhere") == ["real.json"]


def test_a_pipe_is_written_and_stays(tmp_path):
    path, found = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: found.append(path.read_text()))
    reader.start()
    write(path, "new")
    reader.join()
    assert found == ["new"] and stat.S_ISFIFO(path.stat().st_mode)


def test_a_device_stays():
    write("/dev/null", "new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_can_not_be_written_is_told_before(tmp_path):
    check_output(tmp_path / "new.json", "trace")
    check_output("/dev/null", "trace")
    for path in (tmp_path, tmp_path / "no" / "out.json", "/dev/null/out.json"):
        with pytest.raises(ValueError, match="trace must be a file in a folder that exists, got"):
            check_output(path, "trace")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="trace must be a file that may be written, got"):
        check_output(tmp_path / "out.json", "trace")
    tmp_path.chmod(0o700)


def test_what_is_read_is_not_written(tmp_path):
    source, folder = tmp_path / "traces.jsonl", tmp_path / "many"
    source.touch()
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "away").symlink_to(folder)
    for path in (source, tmp_path / "link", tmp_path / "many" / ".." / "traces.jsonl"):
        with pytest.raises(ValueError, match=r"out must be another file than traces, got '.*' for both"):
            check_apart(path, "out", source, "traces")
    for path in (folder / "a.jsonl", folder / "deep" / "a.jsonl", tmp_path / "away" / "a.jsonl"):
        with pytest.raises(ValueError, match=r"out must not be in traces, got '.*' in '.*many'"):
            check_apart(path, "out", folder, "traces")
    check_apart(tmp_path / "many.jsonl", "out", folder, "traces")
    check_apart(tmp_path / "other", "out", source, "traces")
