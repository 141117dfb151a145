"""An object store that speaks S3 over HTTP on this machine: moto's server in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import boto3
import s3fs


@dataclass(frozen=True)
class FakeStore:
    """The server, and what a client needs to find it."""

    address: str
    environment: dict[str, str] = field(default_factory=dict)

    def client(self) -> "boto3.client":
        """A client that is not s3fs."""
        return boto3.client("s3", endpoint_url=self.address, region_name="us-east-1", **_KEYS)

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def contents(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Every file below a prefix."""
        client = self.client()
        names = self.names(bucket, prefix)
        return {name: client.get_object(Bucket=bucket, Key=prefix + name)["Body"].read() for name in names}

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        listed = self.client().list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return [found["Key"].removeprefix(prefix) for found in listed]


_KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}


@contextmanager
def served() -> Iterator[FakeStore]:
    """The server, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    code = f"import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield FakeStore(address, environment)
    finally:
        server.kill()
        server.wait()
        s3fs.S3FileSystem.clear_instance_cache()
