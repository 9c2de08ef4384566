"""A page in a real browser: Chromium without a window, which is asked through its DevTools protocol."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

import pytest
from websockets.sync.client import ClientConnection, connect

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 30


class Page:
    """A page that is open in the browser.

    Attributes:
        messages: what the browser reported: errors of scripts and of the policy, and what was written to the console.
        requests: addresses that the page asked for, itself included.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.messages: list[str] = []
        self.requests: list[str] = []

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv(timeout=_SECONDS))).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.messages.append(json.dumps(event["params"]))
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            case "Page.loadEventFired":
                self._loaded = True

    def visit(self, place: Path | str, width: int, *, dark: bool = False, media: str = "screen") -> Self:
        """Open a file or a URL in a window of this width, and wait until it is there."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._loaded = False
        self._ask("Page.navigate", url=place.as_uri() if isinstance(place, Path) else place)
        while not self._loaded:
            self._note(json.loads(self._socket.recv(timeout=_SECONDS)))
        return self

    def value(self, script: str) -> Any:
        """The value of an expression on the page."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector: str, number: int = 0) -> None:
        """Click the middle of an element."""
        place = "(e => { e.scrollIntoView(); const r = e.getClientRects()[0];"
        place += " return [r.x + r.width / 2, r.y + r.height / 2] })"
        x, y = self.value(f"{place}(document.querySelectorAll({json.dumps(selector)})[{number}])")
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str, selector: str, number: int = 0) -> None:
        """Type into an empty field."""
        field = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        self.value(f"{field}.focus()")
        self._ask("Input.insertText", text=text)
        end = time.monotonic() + _SECONDS
        while self.value(f"{field}.value") != text:
            assert time.monotonic() < end, "the field did not take the text"
            time.sleep(0.05)

    @property
    def text(self) -> str:
        """The text that a person sees."""
        return str(self.value("document.body.innerText"))

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return int(self.value("document.documentElement.scrollWidth - window.innerWidth"))

    @property
    def outside(self) -> list[str]:
        """Requests to anything but files of this machine."""
        return [url for url in self.requests if not url.startswith(("file:", "data:"))]


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with one page; skips the test where there is none.

    Args:
        folder: an empty folder for the browser's files.
    """
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"no browser on this machine ({', '.join(_NAMES)})")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([program, *options, "about:blank"], **quiet)
    try:
        port = _port(folder / "DevToolsActivePort", process)
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=_SECONDS) as answer:
            [target] = [each for each in json.load(answer) if each["type"] == "page"]
        with connect(target["webSocketDebuggerUrl"], max_size=None, ping_interval=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(_SECONDS)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, "the browser has ended"
        if file.is_file() and "\n" in (text := file.read_text()):
            return int(text.splitlines()[0])
        time.sleep(0.05)
    raise AssertionError("the browser did not start")
