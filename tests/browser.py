"""A headless Chromium, driven by the DevTools protocol over a pipe: nothing but the browser itself is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

_MIDDLE = """(() => {
    const element = document.querySelector(%s);
    element.scrollIntoView({block: "center", behavior: "instant"});
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
})()"""

KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def installed() -> str | None:
    """Path of the browser (``FXCOMPRESS_BROWSER`` goes first), or ``None`` if there is none."""
    named = os.environ.get("FXCOMPRESS_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in one browser. ``problems`` collects what the console and the page complain about, ``requests`` what
    the page asks for."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def as_3_and_4() -> None:
            spare = os.dup2(to_read, 30), os.dup2(to_write, 31)  # whatever numbers they had, 3 and 4 may be among them
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        words = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        words += ["--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            words, close_fds=False, preexec_fn=as_3_and_4, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number = b"", 0
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._events: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(BrokenPipeError, TimeoutError, EOFError):
            self._send("Browser.close")
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for answer in self._messages(30):
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
        raise TimeoutError(method)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol on the page."""
        return self._send(method, self._session, **parameters)

    def _messages(self, patience: float) -> Iterator[dict[str, Any]]:
        until = time.monotonic() + patience
        while (left := until - time.monotonic()) > 0:
            while b"\0" in self._rest:
                line, _, self._rest = self._rest.partition(b"\0")
                message = json.loads(line)
                self._note(message)
                yield message
            if select.select([self._read], [], [], left)[0]:
                read = os.read(self._read, 2**20)
                if not read:
                    raise EOFError("the browser is gone")
                self._rest += read

    def _note(self, message: dict[str, Any]) -> None:
        method, values = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(values["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.problems.append(str(values["args"]))
        elif method == "Log.entryAdded":
            self.problems.append(f"{values['entry']['source']}: {values['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Page.loadEventFired":
            self._events.append("load")

    def open(self, path: Path) -> None:
        """Load the file and wait until it is there."""
        self._events.clear()
        self.send("Page.navigate", url=path.as_uri())
        if "load" not in self._events:
            for _ in self._messages(30):
                if "load" in self._events:
                    break
        self.settle()

    def settle(self) -> None:
        """Wait until what is due has been drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of the element, as a person does."""
        place = self.run(_MIDDLE % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
        self.settle()

    def press(self, *keys: str) -> None:
        """Press keys one after another."""
        for key in keys:
            code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            text = {"text": "\r"} if key == "Enter" else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", **code, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **code)
        self.settle()

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)
        self.settle()

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.settle()

    def prefer(self, **features: str) -> None:
        """What the system asks for, such as ``prefers_color_scheme="dark"``. It always asks for no smooth scrolling: a
        click would miss what still moves."""
        wishes = {"prefers_reduced_motion": "reduce", **features}
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in wishes.items()]
        self.send("Emulation.setEmulatedMedia", features=listed)
        self.settle()

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Save a picture of the page, or of what is in the window."""
        done = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(done["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"])
