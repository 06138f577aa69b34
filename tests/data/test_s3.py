"""S3, as moto's server speaks it: `pip install 's3fs' 'moto[server]'` first."""

import hashlib
import os

import pytest
import torch
import urllib3

import fastrot as fastrot_library
from conftest import metrics
from data.test_tar import shard_folder
from fastrot.data import stage
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.errors import UserError
from fastrot.remote import store
from fastrot.runs import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("narrow"),
    pytest.mark.filterwarnings("ignore"),  # botocore's and werkzeug's own
]


@pytest.fixture
def s3(monkeypatch):
    """fsspec's S3 over a server of moto's, with one bucket `pool`."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(
        port=0, verbose=False
    )
    import fsspec

    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setattr(store, "PAUSES_S", (0.05, 0.05))
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    type(fs).clear_instance_cache()
    fs.mkdir("pool")
    yield fs
    urllib3.request("POST", f"http://{host}:{port}/moto-api/reset")
    server.stop()


def test_s3_is_staged_and_verified_by_its_etags(s3, tmp_path, fastrot):
    content = {"train/a.tar": os.urandom(20_000_000), "train/b c/d.jpg": b"jpeg", "train/b c/e": b""}
    for name, data in content.items():
        s3.pipe_file(f"pool/{name}", data)
    with s3.open("pool/train/many parts", "wb", block_size=5 << 20) as file:
        file.write(bytes(12 << 20))
    done = fastrot("stage", "s3://pool/train", tmp_path / "d", "--json").json
    assert done["verified_by"] == {"md5": 3, "size": 1}  # the ETag of several parts is no MD5
    for name, data in content.items():
        assert (tmp_path / "d" / name.removeprefix("train/")).read_bytes() == data
    assert fastrot("stage", "s3://pool/train", tmp_path / "d", "--json").json["fetched_bytes"] == 0
    assert fastrot("stage", "s3://pool/train/*.tar", tmp_path / "e", "--json").json["files"] == 1


def test_an_etag_that_is_no_md5_of_an_encrypted_object_is_no_lie(s3, tmp_path, monkeypatch):
    from fastrot.remote.anywhere import Anywhere

    s3.pipe_file("pool/k", b"bytes", ServerSideEncryption="aws:kms")
    s3.pipe_file("pool/plain", b"bytes")
    other = hashlib.md5(b"ciphertext").hexdigest()
    monkeypatch.setattr(Anywhere, "_checksum", lambda self, info: ("md5", other))
    assert stage.stage("s3://pool/k", tmp_path / "k")["verified_by"] == {"size": 1}
    with pytest.raises(UserError, match="did not match its checksum"):
        stage.stage("s3://pool/plain", tmp_path / "p")


def test_what_s3_refuses_is_one_line(s3, tmp_path, fastrot, monkeypatch):
    done = fastrot("stage", "s3://pool/nothing", tmp_path / "d")
    assert (done.code, done.errors) == (2, ["fastrot: s3://pool/nothing: no such file or folder"])
    done = fastrot("stage", "s3://no-bucket/x", tmp_path / "d")
    assert done.code == 2 and len(done.errors) == 1
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    type(s3).clear_instance_cache()
    done = fastrot("stage", "s3://pool/nothing", tmp_path / "d")
    assert done.code == 2 and len(done.errors) == 1 and "check the credentials" in done.errors[0], done.err


def test_a_run_is_kept_in_s3_and_goes_on_from_there(s3, tmp_path, fastrot, images):
    words = [
        "model.arch=resnet18", "data.crop=16", "optim.images_per_step=3", "optim.epochs=3", "optim.warmup_epochs=0",
        "run.log_every=1", "run.checkpoint_every=2", "run.tensorboard=false", "engine.kind=plain", f"data.train={images}",
        "run.mirror=s3://pool/runs/one",
    ]  # fmt: skip
    assert fastrot("train", *words, f"run.out={tmp_path / 'a'}", "run.max_steps=5").code == 0
    s3.get("pool/runs/one/checkpoints/step-00000005", str(tmp_path / "got"), recursive=True)
    assert checkpoint.verify(tmp_path / "got") == ""
    done = fastrot("train", *words, f"run.out={tmp_path / 'b'}", "run.max_steps=7")
    assert done.code == 0 and "run.mirror: step-00000005 brought from s3://pool/runs/one" in done.err
    assert len(metrics(tmp_path / "b")) == 7


def test_shards_in_s3_are_read_in_place(s3, tmp_path, images):
    manifest = Manifest.load(index(str(images), tmp_path, 10**8, lambda items, total, title: items))
    shard_folder(manifest, tmp_path)
    for path in tmp_path.glob("*.tar"):
        s3.put_file(str(path), f"pool/{path.name}")
    found = []
    for source in (f"{tmp_path}/s-{{000..002}}.tar", "s3://pool/s-{000..002}.tar", "s3://pool/s-*.tar"):
        with fastrot_library.Loader(fastrot_library.open(source), 5, 32, decode="turbo", device="cpu") as loader:
            found.append(torch.cat([batch.pixels for batch in loader]))
    assert found[0].equal(found[1]) and found[0].equal(found[2])
