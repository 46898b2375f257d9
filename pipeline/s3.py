"""A bucket as a store, by boto3.

Endpoint, region and credentials come from the usual AWS environment (`AWS_ENDPOINT_URL`, `AWS_REGION`,
`AWS_ACCESS_KEY_ID`, profiles, instance roles), exactly as boto3 reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO

import boto3
import urllib3.exceptions
from botocore import exceptions as boto
from botocore.config import Config

from pipeline.errors import Changed, Denied, NotFound, Refused, StorageError, Unavailable
from pipeline.patience import patiently
from pipeline.ranged import open_ranged
from pipeline.storage import ObjectInfo

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
DELETE_AT_ONCE = 1000  # the protocol's limit

_NOT_FOUND = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_EXISTS = {"412", "PreconditionFailed"}
_SHORTER = {"416", "InvalidRange"}
_ARCHIVED = "InvalidObjectState"
_KEY = "KMS."  # begins the codes of a key that is disabled, deleted or out of reach
_KEY_ACTION = " kms:"  # stands in the message where the key's policy denies its use, under the code AccessDenied
_DENIED = {
    "401", "403", "AccessDenied", "AccountProblem", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId",
    "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired",
}  # fmt: skip
_UNAVAILABLE = {
    "409", "429", "500", "502", "503", "504", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown",
    "Throttling", "ThrottlingException", "KMS.ThrottlingException", "KMS.KMSInternalException",
}  # fmt: skip
_NO_CREDENTIALS = (
    boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.NoAuthTokenError,
    boto.TokenRetrievalError, boto.LoginError, boto.SSOError,
)  # fmt: skip
_NO_ANSWER = (
    boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, boto.ChecksumError,
    boto.FlexibleChecksumError, urllib3.exceptions.HTTPError, OSError,
)  # fmt: skip


class S3Store:
    """The objects under `s3://bucket/prefix`. Holds no connection, so it travels between processes."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def list(self, under: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        start: dict[str, str] = {"StartAfter": self._key(after)} if after else {}
        while True:
            page = self._page({"Prefix": self._key(under), **start})
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(self.prefix)
                if name and not name.endswith("/"):  # consoles make empty objects to show folders
                    yield ObjectInfo(name=name, size=entry["Size"], etag=entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            start = {"ContinuationToken": page["NextContinuationToken"]}

    def stat(self, name: str) -> ObjectInfo:
        head = self._call("head_object", name)
        return ObjectInfo(name=name, size=head["ContentLength"], etag=head["ETag"].strip('"'))

    def read(self, name: str, *, etag: str = "") -> bytes:
        return patiently(lambda: self._get(name, etag))

    def open(self, name: str, *, etag: str = "") -> BinaryIO:
        info = self.stat(name)
        self._check_tag(name, info.etag, etag)
        return open_ranged(lambda start, stop: self._range(info, start, stop), info.size)

    def probe(self, name: str) -> None:
        patiently(lambda: self._get(name, "", Range="bytes=0-0"))

    def write(self, name: str, data: bytes) -> None:
        self._call("put_object", name, Body=data)

    def create(self, name: str, data: bytes) -> bool:
        return patiently(lambda: self._create(name, data))

    def age_s(self, name: str) -> float:
        head = self._call("head_object", name)
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - head["LastModified"]).total_seconds())

    def delete(self, names: Iterable[str]) -> None:
        remaining = iter(names)
        while keys := [{"Key": self._key(name)} for name in islice(remaining, DELETE_AT_ONCE)]:
            patiently(lambda keys=keys: self._delete(keys))  # type: ignore[misc]

    def sweep(self) -> None:
        """A bucket shows and keeps only whole objects."""

    def _create(self, name: str, data: bytes) -> bool:
        try:
            with _translated(self._url(name)):
                _client().put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
        except _Exists:
            # it may be our own, of a try whose answer was lost
            return self.read(name) == data
        return True

    def _call(self, operation: str, name: str, **parameters: Any) -> Any:
        def call() -> Any:
            with _translated(self._url(name)):
                return getattr(_client(), operation)(Bucket=self.bucket, Key=self._key(name), **parameters)

        return patiently(call)

    def _page(self, of: dict[str, str]) -> Any:
        def call() -> Any:
            with _translated(self.url):
                return _client().list_objects_v2(Bucket=self.bucket, **of)

        return patiently(call)

    def _delete(self, keys: Sequence[dict[str, str]]) -> None:
        with _translated(self.url):
            answer = _client().delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
        for error in answer.get("Errors", ()):
            raise _of_code(f"s3://{self.bucket}/{error['Key']}", {error["Code"]}, f"not deleted: {error['Code']}")

    def _get(self, name: str, etag: str, **parameters: str) -> bytes:
        """The body, once."""
        with _translated(self._url(name)):
            answer = _client().get_object(Bucket=self.bucket, Key=self._key(name), **parameters)
            self._check_tag(name, answer["ETag"].strip('"'), etag)
            body: bytes = answer["Body"].read()
            return body

    def _range(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes [start, stop), once. Raises `Unavailable` for a body that is too short, so that it is fetched again."""
        body = self._get(info.name, info.etag, Range=f"bytes={start}-{stop - 1}")
        if len(body) != stop - start:
            raise Unavailable(f"{self._url(info.name)}: {len(body)} bytes came of {stop - start}")
        return body

    def _check_tag(self, name: str, found: str, expected: str) -> None:
        if expected and found != expected:
            raise Changed(f"{self._url(name)} was replaced meanwhile")

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
        retries={"mode": "standard", "total_max_attempts": 1},  # the waiting is done here, by `patiently`
        max_pool_connections=32,
        **checksums,
    )
    # A session of its own: threads that make their first call together must not share the default one.
    client = boto3.Session().client("s3", config=config, region_name=_region())
    client.meta.events.register("before-parse.s3", _refuse_cut_bodies)
    return client


def _refuse_cut_bodies(response_dict: dict[str, Any], operation_model: Any, **_: Any) -> None:
    """botocore takes a body that ends early for a whole one, and one of no bytes for a listing of no objects."""
    body, length = response_dict["body"], response_dict["headers"].get("Content-Length")
    if isinstance(body, bytes) and length and operation_model.http["method"] != "HEAD" and len(body) != int(length):
        raise boto.IncompleteReadError(actual_bytes=len(body), expected_bytes=int(length))


def _region() -> str | None:
    # boto3 reads AWS_DEFAULT_REGION only; AWS_REGION is what containers and Lambda set, and what pyarrow reads.
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except boto.ClientError as error:
        raise _of_client_error(url, error) from error
    except _NO_CREDENTIALS as error:
        raise Denied(
            f"{url}: no usable AWS credentials ({_first_line(error)}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
        ) from error
    except _NO_ANSWER as error:
        raise Unavailable(f"{url}: the store does not answer ({_first_line(error)})") from error
    except (boto.BotoCoreError, ValueError) as error:  # boto3 raises ValueError for an endpoint that is no URL
        raise StorageError(f"{url}: {_first_line(error)}") from error


def _of_client_error(url: str, error: boto.ClientError) -> StorageError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    return _of_code(url, {code, status}, _first_line(error))


class _Exists(StorageError):
    """A conditional PUT found the object there."""


def _of_code(url: str, codes: set[str], message: str) -> StorageError:
    if codes & _EXISTS:
        return _Exists(f"{url} exists")
    if "NoSuchBucket" in codes:
        return NotFound(f"{url}: there is no such bucket")
    if codes & _NOT_FOUND:
        return NotFound(f"{url} does not exist")
    if codes & _SHORTER:
        return Changed(f"{url} was replaced meanwhile")
    if _ARCHIVED in codes:
        return Refused(f"{url}: the object is archived ({message}); restore it first (aws s3api restore-object)")
    if codes & _UNAVAILABLE:
        return Unavailable(f"{url}: the store asks to come back later ({message})")
    if any(code.startswith(_KEY) for code in codes) or ("AccessDenied" in codes and _KEY_ACTION in message):
        return Refused(f"{url}: the object's encryption key cannot be used ({message}); check the key and its policy")
    if codes & _DENIED:
        return Denied(f"{url}: the store refuses access ({message}); check the credentials and the bucket's policy")
    return StorageError(f"{url}: {message}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
