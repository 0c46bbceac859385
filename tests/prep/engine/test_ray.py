"""The Ray engine on a cluster of this machine: same store, errors as they are, a killed task costs its unit."""

import json
import os
import signal
from pathlib import Path

import pytest
from trained_tokenizers import write_byte_level

from prep.encode.files import absolute
from prep.encode.options import EncodeOptions
from prep.encode.run import encode
from prep.engine.ray import _knock, run_units

ray = pytest.importorskip("ray", reason="NOT TESTED, the package ray is absent")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


def double(unit):
    return 2 * unit


def fail_at_three(unit):
    if unit == 3:
        raise ValueError("unit 3 is bad")
    return unit


class DieOnce:
    """Kills its process at the first try of one unit."""

    def __init__(self, mark):
        self._mark = mark

    def __call__(self, unit):
        if unit == 2 and not self._mark.exists():
            self._mark.write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return unit


def test_results_come_in_the_order_of_the_units():
    done = []
    assert run_units(double, list(range(20)), lambda unit, result: done.append(result)) == [2 * k for k in range(20)]
    assert sorted(done) == [2 * k for k in range(20)]


def test_an_error_comes_back_as_it_is():
    with pytest.raises(ValueError, match=r"^unit 3 is bad$"):
        run_units(fail_at_three, list(range(10)))


def test_an_address_without_a_cluster_is_refused_at_once():
    with pytest.raises(ValueError, match=r"--ray-address 127\.0\.0\.1:9: no Ray cluster answers there"):
        _knock("127.0.0.1:9")
    _knock(None)
    _knock("auto")


def test_a_killed_task_is_run_again(tmp_path):
    assert run_units(DieOnce(tmp_path / "mark"), list(range(5))) == list(range(5))
    assert (tmp_path / "mark").exists()


def test_paths_count_from_where_the_command_is_run(tmp_path, monkeypatch):
    """The processes of a cluster that stands already have another working directory."""
    write_byte_level(tmp_path / "model")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    monkeypatch.chdir(tmp_path)
    options = EncodeOptions("model", chat_template="t.jinja")
    assert len(encode(["a.jsonl"], "s", options, runner="ray")) == 1
    assert absolute("hf:a.jsonl:x#train") == f"hf:{tmp_path}/a.jsonl:x#train"
    assert [absolute(p) for p in ("hf:no/such", "s3://b/c", "/x")] == ["hf:no/such", "s3://b/c", "/x"]


def test_the_store_is_the_same_byte_for_byte(tmp_path):
    folder = write_byte_level(tmp_path / "tokenizer")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"hello number {k}"}) + "\n" for k in range(500)))
    for runner in ("local", "ray"):
        encode([path], tmp_path / runner, EncodeOptions(str(folder), unit_bytes=3000), runner=runner)
    trees = [
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()}
        for d in (tmp_path / "local", tmp_path / "ray")
    ]
    assert trees[0] == trees[1]
    assert len(trees[0]) > 10
