"""s3:// addresses against a real S3-speaking server on loopback."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from shard_factory import write_shard

from data.shards import ShardSet
from data.storage import is_remote, local_copy
from training.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "corpora"


@pytest.fixture(scope="module")
def address():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def client(address):
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    return boto3.session.Session(**keys).client("s3", endpoint_url=address)


@pytest.fixture
def s3(client, address, tmp_path, monkeypatch):
    """A client of the server, which holds one empty bucket; the environment leads there, the cache into tmp_path."""
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_MAX_ATTEMPTS": "1",
        "SLOPE_CACHE": str(tmp_path / "cache"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    client.create_bucket(Bucket=BUCKET)
    yield client
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)


def put(client, objects):
    """Store texts by their keys."""
    for key, text in objects.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=text.encode())


def fetched(caplog):
    """Keys that the server was asked to send since the last call, in order."""
    lines = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
    caplog.clear()
    paths = [line.split('"')[1].split()[1] for line in lines if '"GET ' in line]
    return [path.removeprefix(f"/{BUCKET}/") for path in paths if path.startswith(f"/{BUCKET}/") and "?" not in path]


@pytest.fixture
def requests(caplog):
    """Reads the server's own log: see `fetched`."""
    caplog.set_level(logging.INFO, "werkzeug")
    return lambda: fetched(caplog)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_local_paths_are_returned_as_they_are(tmp_path):
    for path in (tmp_path, str(tmp_path / "not there"), "relative/path"):
        assert not is_remote(path)
        assert local_copy(path) == Path(path)
    assert is_remote("s3://bucket/key")


def test_a_folder_is_mirrored_and_its_neighbours_are_not(s3):
    put(s3, {"wiki/a.txt": "one", "wiki/deep/er/b.txt": "two", "wiki2/c.txt": "three", "wiki.txt": "four"})
    s3.put_object(Bucket=BUCKET, Key="wiki/marker/", Body=b"")
    for uri in (f"s3://{BUCKET}/wiki", f"s3://{BUCKET}/wiki/"):
        assert contents(local_copy(uri)) == {"a.txt": "one", "deep/er/b.txt": "two"}
    assert contents(local_copy(f"s3://{BUCKET}"))["wiki2/c.txt"] == "three"


def test_a_file_is_a_file(s3):
    put(s3, {"runs/ckpt.pt": "weights", "runs/ckpt.pt.old": "others"})
    path = local_copy(f"s3://{BUCKET}/runs/ckpt.pt")
    assert path.name == "ckpt.pt" and path.read_text() == "weights"
    assert [other.name for other in path.parent.iterdir()] == ["ckpt.pt"]


def test_a_second_call_downloads_nothing_and_a_changed_object_is_fetched_again(s3, requests):
    put(s3, {"wiki/a.txt": "one", "wiki/b.txt": "two"})
    uri = f"s3://{BUCKET}/wiki"
    folder = local_copy(uri)
    assert sorted(requests()) == ["wiki/a.txt", "wiki/b.txt"]
    assert local_copy(uri) == folder
    assert requests() == []
    put(s3, {"wiki/b.txt": "TWO"})
    requests()
    assert contents(local_copy(uri)) == {"a.txt": "one", "b.txt": "TWO"}
    assert requests() == ["wiki/b.txt"]


def test_a_removed_object_and_an_interrupted_download_are_removed(s3):
    put(s3, {"wiki/a.txt": "one", "wiki/b.txt": "two"})
    uri = f"s3://{BUCKET}/wiki"
    folder = local_copy(uri)
    (folder / ".c.txt.part").write_text("half")
    s3.delete_object(Bucket=BUCKET, Key="wiki/a.txt")
    assert contents(local_copy(uri)) == {"b.txt": "two"}


def test_a_damaged_copy_is_fetched_again(s3, requests):
    put(s3, {"wiki/a.txt": "one", "wiki/b.txt": "two", "wiki/c.txt": "three"})
    folder = local_copy(f"s3://{BUCKET}/wiki")
    requests()
    (folder / "a.txt").write_text("on")
    (folder / "b.txt").unlink()
    assert contents(local_copy(f"s3://{BUCKET}/wiki")) == {"a.txt": "one", "b.txt": "two", "c.txt": "three"}
    assert sorted(requests()) == ["wiki/a.txt", "wiki/b.txt"]


def test_an_interrupted_copy_goes_on_with_the_object_it_stopped_at(s3, requests, monkeypatch):
    put(s3, {"wiki/a.txt": "one", "wiki/b.txt": "two", "wiki/c.txt": "three"})
    replace = os.replace

    def interrupted(old, new):
        if new.name == "b.txt":
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("data.storage.os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            local_copy(f"s3://{BUCKET}/wiki")
    assert requests() == ["wiki/a.txt", "wiki/b.txt"]
    assert contents(local_copy(f"s3://{BUCKET}/wiki")) == {"a.txt": "one", "b.txt": "two", "c.txt": "three"}
    assert requests() == ["wiki/b.txt", "wiki/c.txt"]


def test_a_large_object_arrives_whole(s3):
    # Above boto3's threshold of 8 MiB: fetched in several parts.
    content = bytes(range(256)) * 40000
    s3.put_object(Bucket=BUCKET, Key="large.bin", Body=content)
    assert local_copy(f"s3://{BUCKET}/large.bin").read_bytes() == content


def test_two_processes_at_once_make_one_download(s3, requests):
    keys = [f"wiki/{number}.txt" for number in range(20)]
    put(s3, {key: key for key in keys})
    requests()
    source = (
        f"import sys\nfrom data.storage import local_copy\nsys.stdin.read()\nprint(local_copy('s3://{BUCKET}/wiki'))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.close()
        process.stdin = None
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert sorted(requests()) == sorted(keys)
    (folder,) = folders
    assert contents(Path(folder)) == {key.removeprefix("wiki/"): key for key in keys}


def test_progress_is_shown_while_downloading_only(s3, capsys):
    put(s3, {"wiki/a.txt": "one"})
    local_copy(f"s3://{BUCKET}/wiki", show_progress=False)
    assert capsys.readouterr().err == ""
    put(s3, {"wiki/a.txt": "ONE"})
    local_copy(f"s3://{BUCKET}/wiki")
    assert f"s3://{BUCKET}" in capsys.readouterr().err
    local_copy(f"s3://{BUCKET}/wiki")
    assert capsys.readouterr().err == ""


def test_shards_are_read_from_a_bucket(s3, tmp_path):
    write_shard(tmp_path / "shard_00000.hdf5")
    s3.upload_file(str(tmp_path / "shard_00000.hdf5"), BUCKET, "phase1/train/shard_00000.hdf5")
    assert ShardSet(local_copy(f"s3://{BUCKET}/phase1/train")).total == 8


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("uri", "environment", "says"),
    [
        ("s3://", {}, "names no bucket"),
        ("s3:///key", {}, "names no bucket"),
        ("s3://no-such-bucket/key", {}, "no such bucket"),
        ("s3://not a bucket/key", {}, "check the address"),
        (f"s3://{BUCKET}/nothing", {}, "nothing at this address"),
        (f"s3://{BUCKET}/wik", {}, "nothing at this address"),
        (f"s3://{BUCKET}/wiki/a.txt/", {}, "nothing at this address"),
        (f"s3://{BUCKET}/bad", {}, "rename the object"),
        (f"s3://{BUCKET}/wiki", {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "AWS_ACCESS_KEY_ID"),
        (f"s3://{BUCKET}/wiki", {"AWS_SECRET_ACCESS_KEY": None}, "AWS_SECRET_ACCESS_KEY"),
        (f"s3://{BUCKET}/wiki", {"AWS_PROFILE": "missing"}, "missing"),
        (f"s3://{BUCKET}/wiki", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{closed_port()}"}, "AWS_ENDPOINT_URL"),
        (f"s3://{BUCKET}/wiki", {"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "AWS_ENDPOINT_URL"),
        (f"s3://{BUCKET}/wiki", {"SLOPE_CACHE": "/dev/null/cache"}, "SLOPE_CACHE"),
    ],
)
def test_what_cannot_be_copied_is_named(s3, monkeypatch, uri, environment, says):
    put(s3, {"wiki/a.txt": "one", "bad/../../../b.txt": "outside"})
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as error:
        local_copy(uri)
    line = str(error.value)
    assert line.startswith(uri) and says in line and "\n" not in line


@pytest.fixture
def strict(s3, address):
    """Makes the server check credentials from now on, which it does not by itself."""

    def set_unchecked_calls(count):
        body, kind = str(count).encode(), {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{address}/moto-api/reset-auth", body, kind, method="POST")
        urllib.request.urlopen(request, timeout=10).close()

    set_unchecked_calls(0)
    yield
    set_unchecked_calls("inf")


def test_a_refusal_by_the_server_is_named(strict):
    with pytest.raises(UsageError) as error:
        local_copy(f"s3://{BUCKET}/wiki")
    line = str(error.value)
    assert line.startswith(f"s3://{BUCKET}/wiki") and "the access key is unknown there" in line
