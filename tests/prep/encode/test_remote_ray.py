"""A Ray cluster of two nodes that share nothing but a bucket; one of them dies."""

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from prep.encode.options import EncodeOptions
from prep.encode.run import write_store
from prep.encode.unit import encode_unit

ray = pytest.importorskip("ray", reason="NOT TESTED, the package ray is absent")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def cluster(s3):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=2)
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    variables = {name: os.environ[name] for name in names}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables["OMP_NUM_THREADS"] = "1"
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": variables})
    yield cluster, node
    ray.shutdown()
    cluster.shutdown()


class Logged:
    """`encode_unit` that takes a moment longer, and leaves a line for every time that it runs."""

    def __init__(self, log):
        self._log = log

    def __call__(self, job, unit):
        with open(self._log, "a") as file:
            file.write(f"{unit.index} {ray.get_runtime_context().get_node_id()}\n")
        time.sleep(0.3)
        return encode_unit(job, unit)


@pytest.mark.slow
def test_a_lost_node_costs_its_units_and_the_store_has_the_same_bytes(cluster, s3, tmp_path, byte_level, monkeypatch):
    cluster, node = cluster
    log, lost = tmp_path / "log", []
    log.touch()

    def runs():
        return [line.split() for line in log.read_text().splitlines()]

    def lose_a_node_that_works(_):
        if not lost and len({place for _, place in runs()}) == 2:
            lost.append(node)
            cluster.remove_node(node, allow_graceful=False)

    lines = "".join(json.dumps({"text": f"hello number {k}"}) + "\n" for k in range(4000))
    (tmp_path / "a.jsonl").write_text(lines)
    s3.create_bucket(Bucket="ray")
    s3.upload_file(str(tmp_path / "a.jsonl"), "ray", "a.jsonl")
    for path in byte_level.iterdir():
        s3.upload_file(str(path), "ray", f"model/{path.name}")
    options = {"unit_bytes": 2000}
    local = write_store([tmp_path / "a.jsonl"], tmp_path / "s", EncodeOptions(str(byte_level), **options))
    monkeypatch.setattr("prep.encode.run.encode_unit", Logged(log))
    there = write_store(
        ["s3://ray/a.jsonl"],
        "s3://ray/store",
        EncodeOptions("s3://ray/model", **options),
        runner="ray",
        progress=lose_a_node_that_works,
    )
    assert there == local
    found = {
        entry["Key"].removeprefix("store/"): s3.get_object(Bucket="ray", Key=entry["Key"])["Body"].read()
        for entry in s3.list_objects_v2(Bucket="ray", Prefix="store/")["Contents"]
    }
    assert found == {str(p.relative_to(tmp_path / "s")): p.read_bytes() for p in (tmp_path / "s").rglob("*.*")}
    assert lost, "both nodes worked"
    again = [unit for unit, times in Counter(unit for unit, _ in runs()).items() if times > 1]
    assert len(again) <= 2, "what the two cores of the lost node were at, and nothing else"
