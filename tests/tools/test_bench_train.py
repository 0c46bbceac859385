"""The benchmark of a GPU, with tiny shapes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "bench_train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_random_weights_of_given_shapes_are_measured(tmp_path):
    flags = "compile compile-backend=eager recompute=selective no-reshard"
    ran = bench(
        *("--shapes", "tiny", "--capacity", 512, "--steps", 5, "--flags", flags, "--json", tmp_path / "result.json")
    )
    assert ran.returncode == 0, ran.stderr
    (result,) = json.loads((tmp_path / "result.json").read_text()).values()
    assert len(result["losses"]) == 3, "the first two steps are not measured"
    assert result["tokens_per_second_per_device"] > 0
    assert result["flops_per_second_per_device"] > result["tokens_per_second_per_device"]
    assert (result["dtype"], result["flags"]) == ("float32", flags)
    assert result["mfu"] is None, "there is no honest peak of a CPU"


def test_too_few_steps_are_refused():
    ran = bench("--shapes", "tiny", "--steps", 2)
    assert (ran.returncode, "--steps must be at least 3" in ran.stderr) == (2, True)
