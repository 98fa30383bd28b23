"""A small client of Chromium's DevTools protocol: opens a page, runs JavaScript in it, presses keys, takes pictures."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

BINARY = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))),
    None,
)


class Chromium:
    """One browser and one tab. ``events`` collects what the page did: dialogs, exceptions, requests, console errors."""

    def __init__(self, *options: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        self.process = subprocess.Popen(
            [
                BINARY,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-port=0",
                "--no-first-run",
                "--disable-extensions",
                f"--user-data-dir={self.folder}",
                "--remote-allow-origins=*",
                "--disable-background-networking",
                "--window-size=1400,900",
                *options,
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        import urllib.request

        import websocket

        place, end = Path(self.folder) / "DevToolsActivePort", time.monotonic() + 30
        while not (place.exists() and "\n" in place.read_text()):
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError("chromium did not start")
            time.sleep(0.05)
        port = place.read_text().split()[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            tabs = [t for t in json.loads(opener.open(f"http://127.0.0.1:{port}/json").read()) if t["type"] == "page"]
            if tabs:
                break
            time.sleep(0.05)
        self.socket = websocket.create_connection(tabs[0]["webSocketDebuggerUrl"], timeout=60)
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._event(message)

    def _event(self, message) -> None:
        name, about = message.get("method"), message.get("params", {})
        if name == "Page.javascriptDialogOpening":
            self.events.append(("dialog", about["message"]))
            self.count += 1
            self.socket.send(
                json.dumps({"id": self.count, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}})
            )
        elif name == "Runtime.exceptionThrown":
            self.events.append(
                ("exception", str(about["exceptionDetails"].get("exception", {}).get("description", about)))
            )
        elif name == "Network.requestWillBeSent":
            self.events.append(("request", about["request"]["url"]))
        elif name == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.events.append(("log", about["entry"]["text"]))
        elif name == "Page.loadEventFired":
            self.events.append(("load", ""))

    def of(self, kind: str) -> list[str]:
        return [text for name, text in self.events if name == kind]

    def open(self, page, ready: str = "Boolean(window.flowroutes && flowroutes.scene)") -> None:
        """Go to a file or an address and wait until ``ready`` (JavaScript) holds."""
        self.events.clear()
        self.call(
            "Page.navigate",
            url=str(page) if "://" in str(page) or str(page).startswith("data:") else Path(page).resolve().as_uri(),
        )
        end = time.monotonic() + 20
        while not self.of("load"):
            self.call("Runtime.evaluate", expression="0")
            if time.monotonic() > end:
                raise TimeoutError("the page did not load")
            time.sleep(0.01)
        self.wait(ready)

    def wait(self, condition: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"never came true: {condition}; {self.events[-5:]}")
            time.sleep(0.02)

    def run(self, expression: str):
        """The value of a JavaScript expression, promises awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", str(found)))
        return found["result"].get("value")

    def key(self, key: str, **more) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    def mouse(self, x: float, y: float, *, click: bool = False) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def dark(self, on: bool) -> None:
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if on else "light"}],
        )

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scripts(self, on: bool) -> None:
        self.call("Emulation.setScriptExecutionDisabled", value=not on)

    def picture(self, path) -> None:
        time.sleep(0.15)
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        if hasattr(self, "socket"):
            self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)
