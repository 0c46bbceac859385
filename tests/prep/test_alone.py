"""Two runs into one folder: the second is told so at once, and changes nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from packing_runs import packed, run, tree

import prep.convert.run
import prep.pipeline
from prep.alone import alone

ROOT = Path(__file__).parents[2]


def options(tokenizer):
    return ["--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--no-page", "--quiet"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_second_run_into_the_folder_of_one_at_work_is_refused(source, tokenizer, tmp_path, monkeypatch, linked):
    """The second run begins while the first writes its shards, with and without --resume, and through a link."""
    whole = packed(source, tmp_path / "whole", tokenizer)
    out = tmp_path / "out"
    link = tmp_path / "link"
    link.symlink_to(out)
    materialize, refused = prep.pipeline.materialize, []

    def meanwhile(*arguments, **more):
        for extra in ([], ["--resume"], ["--algo", "greedy"]):
            before = tree(tmp_path)
            result = run("pack", source, "--out", link if linked else out, *options(tokenizer), *extra)
            assert result.exit_code == 1
            assert tree(tmp_path) == before
            refused.append(result.output)
        return materialize(*arguments, **more)

    monkeypatch.setattr(prep.pipeline, "materialize", meanwhile)
    packed(source, out, tokenizer)
    named = link if linked else out
    sentence = f"Error: --out {named}: another prep is writing there; wait for it, or name another folder\n"
    assert refused == [sentence] * 3
    assert tree(out) == tree(whole)


def test_a_second_conversion_into_the_folder_of_one_at_work_is_refused(source, tokenizer, tmp_path, monkeypatch):
    folder = packed(source, tmp_path / "packed", tokenizer)
    write, refused = prep.convert.run.write_native, []
    arguments = ["convert", folder, "--to", "seqid", "--out", tmp_path / "out", "--workers", 1]

    def meanwhile(*given):
        write(*given)
        refused.append(run(*arguments).output)

    monkeypatch.setattr(prep.convert.run, "write_native", meanwhile)
    assert run(*arguments).exit_code == 0
    assert refused == [
        f"Error: --out {tmp_path / 'out'}: another prep is writing there; wait for it, or name another folder\n"
    ]
    assert run("verify", tmp_path / "out").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "packed.store", "out"}


def test_the_lock_goes_with_its_process(tmp_path):
    code = "import sys, time; from pathlib import Path; from prep.alone import alone\n"
    code += "with alone(Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another prep is writing there"), alone(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_dir(), "whoever is refused takes nothing away"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with alone(tmp_path / "out"):
        pass


def test_what_was_made_for_nothing_is_taken_away(tmp_path):
    for fails in (False, True):
        try:
            with alone(tmp_path / "deep" / "er" / "out"):
                assert (tmp_path / "deep" / "er" / "out").is_dir()
                if fails:
                    raise ValueError
        except ValueError:
            pass
        assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with alone(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
    with alone(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "file").touch()
    assert (tmp_path / "new" / "out" / "file").exists()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="leads nowhere"), alone(tmp_path / "dangling"):
        pass


def test_a_folder_that_is_taken_away_between_its_opening_and_its_lock_is_made_again(tmp_path, monkeypatch):
    """Another process may end without having written anything at that very moment."""
    import fcntl

    flock, done = fcntl.flock, []

    def late(descriptor, operation):
        if not done:
            done.append(os.fstat(descriptor).st_ino)
            (tmp_path / "out").rmdir()
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone(tmp_path / "out"):
        assert done
        with pytest.raises(ValueError, match="another prep"), alone(tmp_path / "out"):
            pass


def test_a_folder_that_no_file_system_makes_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out, why in ((Path("/proc/none/x"), "cannot be made"), (tmp_path / "file" / "x", "made: Not a directory")):
        with pytest.raises(ValueError, match=f"--out {out} .*{why}; name another folder"), alone(out):
            pass
