"""A refusal of one object is told from a refusal of all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from pipeline import s3
from pipeline.chunks import ChunkLimits, chunks
from pipeline.errors import Denied, NotFound, Refused, StorageError, Unavailable
from pipeline.inputs import Columns, open_reader
from pipeline.local import LocalStore
from pipeline.s3 import S3Store
from pipeline.shards import Format, find_shards
from pipeline.witness import Witnessed, find_witness
from tests.conftest import lead_to_store, new_bucket
from tests.corpora import tar_of


class Closed(LocalStore):
    """A folder that denies some of its files. Modes would not do: tests may run as root, which ignores them."""

    def __init__(self, folder: Path, denied: Iterable[str] = ()) -> None:
        super().__init__(folder)
        self.denied, self.probes = set(denied), 0

    def open(self, name: str, *, etag: str = "") -> Any:
        if name in self.denied:
            raise Denied(f"{name}: permission denied")
        return super().open(name, etag=etag)

    def probe(self, name: str) -> None:
        self.probes += 1
        super().probe(name)


@pytest.fixture
def images(tmp_path: Path) -> Closed:
    store = Closed(tmp_path)
    for name in "abc":
        store.write(f"{name}.png", name.encode())
    return store


def errors_of(store: Any, format: Format | None = None) -> list[str | None]:
    found = []
    for shard in find_shards(store.list(), where="INPUT", format=format):
        for chunk in chunks(open_reader(store, shard, Columns()), shard.name, ChunkLimits()):
            found += chunk.rows["error"].to_pylist()
    return found


def test_one_file_that_is_denied_is_an_error_row(images: Closed) -> None:
    images.denied = {"b.png"}
    first, second, third = errors_of(Witnessed(images, "a.png"))
    assert (first, third) == (None, None)
    assert second == "b.png: permission denied (other objects of INPUT can be read)"


def test_one_archive_that_is_denied_is_an_error_row(tmp_path: Path) -> None:
    store = Closed(tmp_path, ["b.tar"])
    for name in ("a.tar", "b.tar", "c.tar"):
        store.write(name, tar_of({"one.png": b"1"}))
    assert errors_of(Witnessed(store, "a.tar")) == [
        None, "b.tar: permission denied (other objects of INPUT can be read)", None,
    ]  # fmt: skip


def test_where_the_witness_is_denied_too_the_job_stops_with_its_reason(images: Closed) -> None:
    images.denied = {"a.png", "b.png"}
    with pytest.raises(Denied, match=r"^a\.png: permission denied$"):
        errors_of(Witnessed(images, "a.png"))


def test_without_a_witness_a_denial_stops_the_job(images: Closed) -> None:
    images.denied = {"b.png"}
    with pytest.raises(Denied, match=r"b\.png"):
        errors_of(Witnessed(images, ""))


def test_a_witness_that_is_gone_still_shows_that_the_store_answers(images: Closed) -> None:
    images.denied = {"b.png"}
    with pytest.raises(Refused):
        Witnessed(images, "deleted.png").read("b.png")


def test_the_witness_is_asked_after_each_refusal_and_never_before(images: Closed) -> None:
    store = Witnessed(images, "a.png")
    store.read("b.png")
    assert images.probes == 0
    images.denied = {"b.png"}
    with pytest.raises(Refused):
        store.read("b.png")
    images.denied |= {"a.png"}  # the credentials expire
    with pytest.raises(Denied):
        store.read("b.png")


def test_a_witnessed_store_travels_and_reads_as_its_store_does(images: Closed) -> None:
    store = pickle.loads(pickle.dumps(Witnessed(LocalStore(images.root), "a.png")))
    with store.open("c.png") as file:
        assert (file.seek(0, 2), file.seek(0), file.read()) == (1, 0, b"c")
    assert [info.name for info in store.list()] == ["a.png", "b.png", "c.png"]


def test_a_witness_is_the_first_object_that_can_be_read(images: Closed) -> None:
    shards = find_shards(images.list(), where="INPUT").shards
    assert find_witness(images, shards) == "a.png"
    images.denied = {"a.png", "b.png"}
    assert find_witness(images, shards) == "c.png"
    images.denied |= {"c.png"}
    with pytest.raises(Denied, match=r"a\.png"):
        find_witness(images, shards)


@pytest.mark.parametrize(
    ("code", "status", "message", "kind"),
    [
        ("InvalidObjectState", 403, "not valid for the object's storage class", Refused),
        ("KMS.DisabledException", 400, "the key is disabled", Refused),
        ("KMS.NotFoundException", 400, "no such key", Refused),
        ("KMS.KMSInvalidStateException", 400, "pending deletion", Refused),
        ("KMS.ThrottlingException", 400, "too many", Unavailable),
        ("AccessDenied", 403, "User: x is not authorized to perform: kms:Decrypt on the resource", Refused),
        ("AccessDenied", 403, "Access Denied", Denied),
        ("403", 403, "Forbidden", Denied),
        ("ExpiredToken", 400, "the token has expired", Denied),
        ("InvalidAccessKeyId", 403, "no such key", Denied),
        ("InvalidToken", 400, "malformed", Denied),
        ("SignatureDoesNotMatch", 403, "check your key", Denied),
        ("RequestTimeTooSkewed", 403, "the clocks differ", Denied),
        ("AllAccessDisabled", 403, "disabled", Denied),
        ("NoSuchKey", 404, "no such key", NotFound),
    ],
)
def test_an_answer_of_s3_is_of_one_object_or_of_all(
    code: str, status: int, message: str, kind: type[StorageError]
) -> None:
    answer: Any = {
        "Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status},
    }  # fmt: skip
    with pytest.raises(StorageError) as caught, s3._translated("s3://bucket/key"):
        raise ClientError(answer, "GetObject")
    assert type(caught.value) is kind
    assert str(caught.value).startswith("s3://bucket/key")


@pytest.mark.parametrize("storage", ["GLACIER", "DEEP_ARCHIVE"])
def test_an_archived_object_is_an_error_row_that_says_to_restore_it(
    moto_port: int, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    lead_to_store(monkeypatch, moto_port)
    bucket = new_bucket()
    client = boto3.client("s3")
    for name, kind in (("a.png", "STANDARD"), ("b.png", storage)):
        client.put_object(Bucket=bucket, Key=name, Body=b"x", StorageClass=kind)
    first, second = errors_of(S3Store(bucket, ""))
    assert first is None
    assert "b.png: the object is archived" in str(second)
    assert "restore it first" in str(second)
    store = S3Store(bucket, "")
    assert find_witness(store, find_shards(store.list(), where="INPUT").shards) == "a.png"


def test_an_object_that_a_bucket_policy_denies_is_an_error_row(radosgw_bucket: str) -> None:
    store = S3Store(radosgw_bucket, "")
    for name in ("a.png", "b.png", "c.png"):
        store.write(name, b"x")
    statement = {
        "Effect": "Deny", "Principal": "*", "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{radosgw_bucket}/b.png",
    }  # fmt: skip
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    boto3.client("s3").put_bucket_policy(Bucket=radosgw_bucket, Policy=policy)
    first, second, third = errors_of(Witnessed(store, "a.png"))
    assert (first, third) == (None, None)
    assert "b.png: the store refuses access" in str(second)
