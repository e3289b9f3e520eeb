"""An object on S3, written in parts while it grows; it appears when it is closed, or not at all."""

from __future__ import annotations

import io
from typing import Any

from burnish._optional import require
from burnish.errors import BurnishError, ConfigError

FIRST_PART_BYTES = 8 << 20
# S3 takes 10,000 parts: they grow, so that an object may reach its 5 TiB.
_PARTS_OF_A_SIZE = 1000


def parse_s3(url: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URL.

    Raises:
        ConfigError: it names none.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket or not key or key.endswith("/"):
        raise ConfigError("--out is malformed", got=url, expected="s3://BUCKET/KEY")
    return bucket, key


class S3Writer(io.RawIOBase):
    """A binary file to write to, by S3's multipart upload; credentials and endpoint are boto3's (AWS_ENDPOINT_URL).

    Call `finish`, or `abort` to leave nothing behind.

    Raises:
        MissingExtraError: boto3 is not installed.
        BurnishError: the bucket is not there, or refuses us.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        boto3 = require("boto3", extra="queue")
        exceptions = require("botocore.exceptions", extra="queue")
        self._url = url
        self._bucket, self._key = parse_s3(url)
        self._errors = (exceptions.BotoCoreError, exceptions.ClientError, ValueError)  # the last of a wrong endpoint
        self._parts: list[dict[str, Any]] = []
        self._buffer = bytearray()
        self._written = 0
        self._client = self._tell(lambda: boto3.client("s3"))
        made = self._tell(lambda: self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key))
        self._upload = {"Bucket": self._bucket, "Key": self._key, "UploadId": made["UploadId"]}

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        """Take bytes; a part goes out when it is full."""
        view = memoryview(data).cast("B")
        self._buffer += view
        self._written += len(view)
        size = FIRST_PART_BYTES << (len(self._parts) // _PARTS_OF_A_SIZE)
        while len(self._buffer) >= size:
            self._send(bytes(self._buffer[:size]))
            del self._buffer[:size]
        return len(view)

    def finish(self) -> None:
        """Make the object appear."""
        if self._buffer or not self._parts:
            self._send(bytes(self._buffer))
        parts = {"Parts": self._parts}
        self._tell(lambda: self._client.complete_multipart_upload(**self._upload, MultipartUpload=parts))
        self._release()

    def abort(self) -> None:
        """Leave nothing behind; nothing happens after `finish`."""
        if self.closed:
            return
        try:
            self._tell(lambda: self._client.abort_multipart_upload(**self._upload))
        finally:
            self._release()

    def _send(self, data: bytes) -> None:
        number = len(self._parts) + 1
        sent = self._tell(lambda: self._client.upload_part(**self._upload, PartNumber=number, Body=data))
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})

    def _release(self) -> None:
        self._client.close()
        self.close()

    def _tell(self, call: Any) -> Any:
        try:
            return call()
        except self._errors as error:
            raise BurnishError(f"{self._url} cannot be written to", got=error) from error
