"""Temporary folders go with their process, also when that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

HOLD = """
import sys
from prep.scratch import ScratchFolder
folder = ScratchFolder()
print(folder.name, flush=True)
sys.stdin.read()
"""


def hold(temporary: Path) -> tuple[subprocess.Popen, Path]:
    """A process with a folder, which ends when its input does."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True, env=environment)
    return process, Path(process.stdout.readline().strip())


def test_the_next_run_clears_what_a_killed_one_left_and_nothing_else(tmp_path):
    (tmp_path / "meshpack-run-file").write_text("no folder")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "meshpack-run-link").symlink_to(tmp_path / "elsewhere")
    live, used = hold(tmp_path)
    killed, left = hold(tmp_path)
    (left / "units").mkdir()
    (left / "units" / "00000.arrow").write_bytes(b"x")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.exists()
    following, third = hold(tmp_path)
    assert not left.exists()
    assert used.is_dir()
    for process, folder in ((live, used), (following, third)):
        process.communicate("")
        assert process.returncode == 0
        assert not folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "meshpack-run-file", "meshpack-run-link"]
