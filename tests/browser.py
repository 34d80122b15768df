"""A real browser without a screen, driven through its debugging pipe: no driver and no library needed.

The protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")
NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_SECONDS = 60.0
_PROBLEMS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    """Returns the path of a browser of the Chromium family."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page at a time."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, events
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def show(self, page: Path, *, width: int, theme: Theme, height: int = 900) -> None:
        """Loads a file into a window of that width in CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 640
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self._call("Page.navigate", url=page.absolute().as_uri())
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.protocol") != "file:":
            assert time.monotonic() < deadline, "the page does not load"

    def evaluate(self, script: str) -> Any:  # JSON
        """Runs an expression in the page and returns what it gives."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def take_picture(self, target: Path, *, clip: dict[str, float] | None = None) -> None:
        """Writes the whole page, or a part of it, as PNG."""
        area = clip or {"x": 0, "y": 0} | self.evaluate(
            "({width: document.documentElement.clientWidth, height: document.documentElement.scrollHeight})"
        )
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip=area | {"scale": 1})
        target.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:  # JSON
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in _PROBLEMS:
                self.problems.append(json.dumps(answer["params"])[:500])

    def _receive(self) -> Any:  # JSON
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._events], [], [], _PATIENCE_SECONDS)
            assert ready, "the browser does not answer"
            piece = os.read(self._events, 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Starts a browser; it has ended when the block does."""
    program = find_browser()
    assert program is not None, "there is no browser: apt-get install chromium"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (read_commands, commands), (events, write_events) = os.pipe(), os.pipe()
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # the browser wants its pipe as descriptors 3 and 4
        shell = ["bash", "-c", script, "-", str(read_commands), str(write_events)]
        process = subprocess.Popen(
            [*shell, program, *_OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(read_commands, write_events),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_commands)
        os.close(write_events)
        try:
            yield Browser(commands, events)
        finally:
            os.close(commands)
            os.killpg(process.pid, signal.SIGKILL)  # its many processes too
            process.wait()
            os.close(events)
