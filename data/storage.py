"""Addresses of data: local paths, and s3:// addresses that are copied into a local cache."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from training.errors import UsageError

SCHEME = "s3://"
CACHE_VARIABLE = "SLOPE_CACHE"
DEFAULT_CACHE = "~/.cache/slope-bert"

# What would be right, by the error code of an S3 server.
_ADVICE = {
    "NoSuchBucket": "there is no such bucket; check its name, the region and AWS_ENDPOINT_URL",
    "AccessDenied": "access denied; give credentials that may list and read it",
    "403": "access denied; give credentials that may list and read it",
    "InvalidAccessKeyId": "the access key is unknown there; check the credentials and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong; check the credentials",
    "ExpiredToken": "the credentials have expired; renew them",
    "InvalidBucketName": "no valid bucket name; give s3://BUCKET/PREFIX",
}


@dataclass(frozen=True)
class _Object:
    """One stored object as the bucket lists it."""

    key: str
    size: int
    etag: str


def is_remote(uri: str | Path) -> bool:
    """Whether `uri` is an s3:// address."""
    return str(uri).startswith(SCHEME)


def local_copy(uri: str | Path, show_progress: bool = True) -> Path:
    """Where the data of `uri` lies on this machine.

    A local path is returned as it is. Of s3://BUCKET/KEY the object is downloaded, of s3://BUCKET/PREFIX the folder,
    through boto3 with the credentials, region and endpoint that it finds. The copy lies in $SLOPE_CACHE (else
    ~/.cache/slope-bert) below BUCKET/KEY and mirrors the bucket: an object whose size or ETag has changed is fetched
    again, a removed one is removed, the others stay. Every process of a node may call this at the same time; one
    downloads, object by object, and whatever was complete when it was interrupted is kept.

    Args:
        uri: a path or an s3:// address.
        show_progress: a progress bar on stderr while something is downloaded.

    Raises:
        UsageError: the address does not exist, cannot be reached or may not be read, or the cache cannot be written.
    """
    if not is_remote(uri):
        return Path(uri)
    bucket, _, key = str(uri).removeprefix(SCHEME).partition("/")
    if not bucket:
        raise UsageError(f"{uri}: names no bucket; give s3://BUCKET/PREFIX")
    cache = Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()
    try:
        import boto3
    except ModuleNotFoundError as error:
        raise UsageError(f"{uri}: s3:// addresses need boto3; pip install -r requirements.txt") from error
    with _reported(str(uri), cache):
        client = boto3.session.Session().client("s3")
        # A lock per bucket: folders may lie within one another.
        with _locked(cache / "locks" / f"{bucket}.lock"):
            found, is_folder = _list(client, bucket, key)
            if not found:
                raise UsageError(f"{uri}: there is nothing at this address; give an existing object or folder")
            mirror = _Mirror(cache, bucket)
            mirror.update(client, found, show_progress)
            if is_folder:
                mirror.keep_only(key, found)
            return mirror.path(key)


def _list(client, bucket: str, key: str) -> tuple[list[_Object], bool]:
    """The objects at `key`: the one of just this name, else all below it as a folder; and whether it is a folder."""
    if key and not key.endswith("/"):
        # Keys are listed in order, and no other key that starts with `key` comes before itself.
        first = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
        if first and first[0]["Key"] == key:
            return [_listed(bucket, first[0])], False
    prefix = f"{key.rstrip('/')}/" if key else ""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    contents = (entry for page in pages for entry in page.get("Contents", []))
    # Some tools store an empty object to mark a folder.
    return [_listed(bucket, entry) for entry in contents if not entry["Key"].endswith("/")], True


def _listed(bucket: str, entry: dict) -> _Object:
    key = entry["Key"]
    if not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise UsageError(f"{SCHEME}{bucket}/{key}: no file can have this name; rename the object")
    return _Object(key, entry["Size"], entry["ETag"].strip('"'))


class _Mirror:
    """The local copy of one bucket: objects below `objects/BUCKET`, what they were below `etags/BUCKET`."""

    def __init__(self, cache: Path, bucket: str):
        self.bucket = bucket
        self.objects = cache / "objects" / bucket
        self.etags = cache / "etags" / bucket

    def path(self, key: str) -> Path:
        return self.objects / PurePosixPath(key)

    def _etag_path(self, key: str) -> Path:
        return self.etags / f"{key}.json"

    def _is_fresh(self, wanted: _Object) -> bool:
        path, etag_path = self.path(wanted.key), self._etag_path(wanted.key)
        if not path.is_file() or path.stat().st_size != wanted.size or not etag_path.is_file():
            return False
        return json.loads(etag_path.read_text()) == {"etag": wanted.etag, "size": wanted.size}

    def update(self, client, found: list[_Object], show_progress: bool) -> None:
        """Download the objects that are missing or have changed."""
        missing = [wanted for wanted in found if not self._is_fresh(wanted)]
        if not missing:
            return
        total = sum(wanted.size for wanted in missing)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"{SCHEME}{self.bucket}", disable=not show_progress)
        with bar:
            for wanted in missing:
                self._download(client, wanted, bar)

    def _download(self, client, wanted: _Object, bar: tqdm) -> None:
        path, etag_path = self.path(wanted.key), self._etag_path(wanted.key)
        for folder in (path.parent, etag_path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        etag_path.unlink(missing_ok=True)
        part = path.with_name(f".{path.name}.part")
        client.download_file(self.bucket, wanted.key, str(part), Callback=bar.update)
        if part.stat().st_size != wanted.size:
            raise UsageError(f"{SCHEME}{self.bucket}/{wanted.key} changed while it was downloaded; try again")
        os.replace(part, path)
        etag_part = etag_path.with_name(f".{etag_path.name}.part")
        etag_part.write_text(json.dumps({"etag": wanted.etag, "size": wanted.size}))
        os.replace(etag_part, etag_path)

    def keep_only(self, key: str, found: list[_Object]) -> None:
        """Remove the files below the folder `key` that are not in `found`: gone objects, interrupted downloads."""
        kept = {self.path(wanted.key) for wanted in found}
        for path in self.path(key).rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the operating system lets go of it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _reported(uri: str, cache: Path) -> Iterator[None]:
    """Turn boto3's errors, and the file system's, into one line that names the address."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as aws

    # In this order: some of botocore's errors are operating system errors as well.
    advice = (
        (
            (aws.NoCredentialsError, aws.PartialCredentialsError),
            "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        ),
        (
            (aws.ConnectionError, aws.HTTPClientError),
            "no connection ({reason}); check the network and AWS_ENDPOINT_URL",
        ),
        (aws.ClientError, "{answer}"),
        ((aws.BotoCoreError, Boto3Error), "cannot be fetched ({reason}); check the address and the AWS settings"),
        (OSError, f"cannot write its copy to {{cache}} ({{reason}}); set {CACHE_VARIABLE} to a folder with room"),
        (ValueError, "{reason}; check AWS_ENDPOINT_URL"),
    )
    try:
        yield
    except UsageError:
        raise
    except (aws.ClientError, aws.BotoCoreError, Boto3Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        code = getattr(error, "response", {}).get("Error", {}).get("Code")
        answer = _ADVICE.get(code, f"the server refuses ({reason}); check the address and the AWS settings")
        text = next(text for types, text in advice if isinstance(error, types))
        raise UsageError(f"{uri}: {text.format(reason=reason, answer=answer, cache=cache)}") from error
