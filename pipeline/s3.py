"""A bucket as a store, by boto3.

Endpoint, region and credentials come from the usual AWS environment (`AWS_ENDPOINT_URL`, `AWS_REGION`,
`AWS_ACCESS_KEY_ID`, profiles, instance roles), exactly as boto3 reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO

import boto3
import urllib3.exceptions
from botocore import exceptions as boto
from botocore.config import Config

from pipeline.errors import Denied, NotFound, StorageError, Unavailable
from pipeline.ranged import open_ranged
from pipeline.storage import ObjectInfo

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
ATTEMPTS = 5
DELETE_AT_ONCE = 1000  # the protocol's limit

_NOT_FOUND = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_DENIED = {
    "401", "403", "AccessDenied", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken",
    "SignatureDoesNotMatch",
}  # fmt: skip
_UNAVAILABLE = {
    "429", "500", "502", "503", "504", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown",
    "Throttling", "ThrottlingException",
}  # fmt: skip


class S3Store:
    """The objects under `s3://bucket/prefix`. Holds no connection, so it travels between processes."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def list(self, *, after: str = "") -> Iterator[ObjectInfo]:
        start: dict[str, str] = {"StartAfter": self._key(after)} if after else {}
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix, **start)
        with _translated(self.url):
            for page in pages:
                for entry in page.get("Contents", ()):
                    name = entry["Key"].removeprefix(self.prefix)
                    if name and not name.endswith("/"):  # consoles make empty objects to show folders
                        yield ObjectInfo(name=name, size=entry["Size"], etag=entry["ETag"].strip('"'))

    def stat(self, name: str) -> ObjectInfo:
        with _translated(self._url(name)):
            head = _client().head_object(Bucket=self.bucket, Key=self._key(name))
        return ObjectInfo(name=name, size=head["ContentLength"], etag=head["ETag"].strip('"'))

    def read(self, name: str) -> bytes:
        for attempt in range(ATTEMPTS):
            try:
                with _translated(self._url(name)):
                    body: bytes = _client().get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()
                    return body
            except Unavailable:
                # botocore tries requests again, but not a body that breaks off
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def open(self, name: str) -> BinaryIO:
        info = self.stat(name)
        return open_ranged(lambda start, stop: self._range(info, start, stop), info.size)

    def write(self, name: str, data: bytes) -> None:
        with _translated(self._url(name)):
            _client().put_object(Bucket=self.bucket, Key=self._key(name), Body=data)

    def delete(self, names: Iterable[str]) -> None:
        remaining = iter(names)
        while keys := [{"Key": self._key(name)} for name in islice(remaining, DELETE_AT_ONCE)]:
            with _translated(self.url):
                answer = _client().delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
            for error in answer.get("Errors", ()):
                raise StorageError(f"s3://{self.bucket}/{error['Key']} is not deleted: {error['Code']}")

    def _range(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises `Unavailable` for a body that is too short, so that it is fetched again."""
        url = self._url(info.name)
        with _translated(url):
            answer = _client().get_object(
                Bucket=self.bucket, Key=self._key(info.name), Range=f"bytes={start}-{stop - 1}"
            )
            body: bytes = answer["Body"].read()
        if answer["ETag"].strip('"') != info.etag:
            raise StorageError(f"{url} was replaced while it was read; start the job again")
        if len(body) != stop - start:
            raise Unavailable(f"{url}: {len(body)} bytes came of {stop - start}")
        return body

    def _key(self, name: str) -> str:
        return self.prefix + name

    def _url(self, name: str) -> str:
        return f"s3://{self.bucket}/{self._key(name)}"


@lru_cache(maxsize=1)
def _client() -> Any:
    """One client a process: clients are thread safe, and each costs some 100 ms to make."""
    # Several S3-compatible stores refuse the checksums that recent clients add unasked. Where the user asks, they go.
    checksums = (
        {}
        if "AWS_REQUEST_CHECKSUM_CALCULATION" in os.environ
        else {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    )
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "max_attempts": ATTEMPTS},
        max_pool_connections=32,
        **checksums,
    )
    return boto3.client("s3", config=config, region_name=_region())


def _region() -> str | None:
    # boto3 reads AWS_DEFAULT_REGION only; AWS_REGION is what containers and Lambda set, and what pyarrow reads.
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except boto.ClientError as error:
        raise _of_client_error(url, error) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise Denied(f"{url}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role") from error
    except (boto.HTTPClientError, boto.ResponseStreamingError, urllib3.exceptions.HTTPError, OSError) as error:
        raise Unavailable(f"{url}: the store does not answer ({_first_line(error)})") from error
    except boto.BotoCoreError as error:
        raise StorageError(f"{url}: {_first_line(error)}") from error


def _of_client_error(url: str, error: boto.ClientError) -> StorageError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    if code == "NoSuchBucket":
        return NotFound(f"{url}: there is no such bucket")
    if {code, status} & _NOT_FOUND:
        return NotFound(f"{url} does not exist")
    if {code, status} & _DENIED:
        return Denied(f"{url}: the store refuses access ({code}); check the credentials and the bucket's policy")
    if {code, status} & _UNAVAILABLE:
        return Unavailable(f"{url}: the store asks to come back later ({code})")
    return StorageError(f"{url}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
