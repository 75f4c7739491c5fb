"""Chromium without a window, through its DevTools protocol over a pipe: no driver, and no network."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "google-chrome")
OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--no-sandbox",  # it refuses to run as root with one, and the pages are ours
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's is small
    "--hide-scrollbars",
    "--no-first-run",
)


def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page at a time, ``width`` pixels wide."""

    def __init__(self, profile: Path, width: int) -> None:
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()

        def connect() -> None:  # the browser reads its file 3 and writes to its file 4
            first, second = os.dup(from_us), os.dup(to_us)  # else one of them may itself be 3 or 4
            os.dup2(first, 3)
            os.dup2(second, 4)

        command = [executable(), *OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},1000", "about:blank"]
        log = (profile.parent / "chromium.log").open("w")
        self.process = subprocess.Popen(command, close_fds=False, preexec_fn=connect, stdout=log, stderr=log)
        os.close(from_us)
        os.close(to_us)
        self.commands, self.answers = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self.numbers, self.pending = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []
        """What the page has reported since ``open``."""
        self.session: str | None = None
        pages = self("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            some = os.read(self.answers.fileno(), 1 << 16)
            if not some:
                raise EOFError("Chromium has ended")
            self.pending += some
        message, _, self.pending = self.pending.partition(b"\0")
        return json.loads(message)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            command["sessionId"] = self.session
        self.commands.write(json.dumps(command).encode() + b"\0")
        self.commands.flush()
        while (message := self._message()).get("id") != number:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def open(self, page: Path) -> None:
        """Returns when the page and what it loads are there."""
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, in the page."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """All of the page, from top to bottom."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        image = self("Page.captureScreenshot", clip=clip, captureBeyondViewport=True, optimizeForSpeed=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        self("Browser.close")
        self.process.wait(10)
        self.commands.close()
        self.answers.close()
