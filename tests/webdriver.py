"""Just enough of the W3C WebDriver protocol to drive Debian's Chromium: JSON over HTTP, no package needed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing() -> str:
    """Why there is no browser to drive, or ""."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed (on Debian: apt-get install chromium chromium-driver)"
    return ""


class Browser:
    """One session with one window."""

    def __init__(
        self,
        driver: str,
        profile: Path,
        size: tuple[int, int],
        *,
        dark: bool = False,
        network: bool = False,
        more: tuple[str, ...] = (),
    ) -> None:
        self._driver = driver
        arguments = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", *more,
        ]  # fmt: skip
        if dark:
            arguments.append("--force-dark-mode")
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", **({"performance": "ALL"} if network else {})},
        }
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._driver + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def _do(self, method: str, path: str, body: Any = None) -> Any:
        return self._call(method, self._session + path, body)

    def open(self, url: str) -> None:
        """Load a page."""
        self._do("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript, with its value."""
        return self._do("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def resize(self, width: int, height: int) -> None:
        """Give the page (not the window) a size, as a phone has it."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of Chrome's own protocol."""
        return self._do("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def choose(self, selector: str, *files: Path) -> None:
        """Choose files, as a person does in the file dialogue."""
        found = self._do("POST", "/element", {"using": "css selector", "value": selector})
        self._do("POST", f"/element/{found[ELEMENT]}/value", {"text": "\n".join(map(str, files))})

    def press(self, key: str) -> None:
        """Press and release a key on what has the focus."""
        steps = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._do("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point of the window, go through the others, and let go at the last."""
        moves = [
            {"type": "pointerMove", "duration": 20, "x": round(x), "y": round(y), "origin": "viewport"}
            for x, y in points
        ]
        steps = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self._do("POST", "/actions", {"actions": [mouse]})

    def tap(self, element: str) -> None:
        """Touch the middle of the element that a JavaScript expression gives, with a finger."""
        x, y = self.run(
            f"const found = {element}; found.scrollIntoView({{block: 'center'}});"
            "const box = found.getBoundingClientRect();"
            "return [box.left + box.width / 2, box.top + box.height / 2]"
        )
        self.devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def drop(self, place: tuple[float, float], *paths: Path) -> None:
        """Drag files or folders onto a place of the window, and let go."""
        data = {"items": [], "files": list(map(str, paths)), "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.devtools("Input.dispatchDragEvent", type=kind, x=place[0], y=place[1], data=data)

    def wait(self, condition: str, seconds: float = 60.0) -> Any:
        """Wait until a JavaScript expression is true, and give its value."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            value = self.run(f"return {condition}")
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"never true: {condition}\n{self.run('return document.body.innerText')}\n{self.log()}")

    def screenshot(self, path: Path) -> Path:
        """The window as a PNG file."""
        path.write_bytes(base64.b64decode(self._do("GET", "/screenshot")))
        return path

    def log(self) -> list[str]:
        """What the page complained about in the console."""
        return [line["message"] for line in self._do("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """What was fetched since the last time, but for what a page has in itself; of a browser with ``network``."""
        lines = [
            json.loads(line["message"])["message"] for line in self._do("POST", "/se/log", {"type": "performance"})
        ]
        kinds = ("Network.requestWillBeSent", "Network.webSocketCreated", "Network.webTransportCreated")
        sent = [line["params"] for line in lines if line["method"] in kinds]
        urls = [each["request"]["url"] if "request" in each else each["url"] for each in sent]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def close(self) -> None:
        """End the browser."""
        self._call("DELETE", self._session)


@contextmanager
def driver(folder: Path) -> Iterator[str]:
    """A chromedriver of our own, at a URL."""
    output = folder / "chromedriver.log"
    with output.open("wb") as sink:
        environment = {**os.environ, "HOME": str(folder)}
        process = subprocess.Popen(["chromedriver", "--port=0"], stdout=sink, stderr=sink, env=environment)
    try:
        until = time.monotonic() + 60
        while not (found := re.search(r"started successfully on port (\d+)", output.read_text())):
            assert process.poll() is None and time.monotonic() < until, output.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        process.terminate()
        process.wait(timeout=30)
