"""A headless browser that a test drives, by Chromium's own protocol over a pair of pipes."""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

from helpers.page import BROWSER

DEADLINE = 120  # seconds; nothing takes so long unless it hangs
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe --window-size=1400,1000"
)
# The protocol is spoken at the descriptors 3 and 4, which ``subprocess`` can't give to a child.
LAUNCH = (
    "import os, sys; given = [os.dup(int(fd)) for fd in sys.argv[1:3]]; high = [os.dup2(fd, fd + 64) for fd in given]; "
    "os.dup2(high[0], 3); os.dup2(high[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
)
# What a page must never do is noted before its own scripts run.
WATCH = (
    "window.violations = []; addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective));"
)


def until(is_true, what="what is waited for"):
    """Wait until ``is_true()``."""
    end = time.monotonic() + DEADLINE
    while not is_true():
        assert time.monotonic() < end, f"never true: {what}"
        time.sleep(0.02)


class Tab:
    """A page in the browser."""

    def __init__(self, browser, context, session):
        self.browser, self.context, self.session, self.events = browser, context, session, []

    def send(self, method, **parameters):
        return self.browser.send(method, self.session, **parameters)

    def open(self, url):
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def ask(self, expression):
        """The value of a JavaScript expression, awaited if it is a promise."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression):
        """Wait until the expression is true."""
        until(lambda: self.ask(f"Boolean({expression})"), expression)

    def click(self, selector):
        self.ask(f"document.querySelector({json.dumps(selector)}).click()")

    def write(self, selector, text):
        """Put text into a field, as a person does."""
        self.ask(f"document.querySelector({json.dumps(selector)}).focus(); document.activeElement.select?.()")
        self.send("Input.insertText", text=text)

    def press(self, key, modifiers=0):
        """Press a key. The modifier 2 is Ctrl."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.send(
            "Input.dispatchKeyEvent", type="keyDown", key=key, code=key, modifiers=modifiers, **text, **_code(key)
        )
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, modifiers=modifiers, **_code(key))

    def choose(self, selector, *files):
        """Choose files in a file field."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def download_to(self, folder):
        self.browser.send(
            "Browser.setDownloadBehavior",
            behavior="allow",
            downloadPath=str(folder),
            browserContextId=self.context,
        )

    def screenshot(self, file):
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def of_kind(self, method):
        return [event["params"] for event in self.events if event["method"] == method]

    def assert_clean(self, origin):
        """Nothing was asked of another origin, no policy was violated, and no script failed."""
        urls = [event["request"]["url"] for event in self.of_kind("Network.requestWillBeSent")]
        own = rf"{origin.replace('//', '//([^/]*@)?')}/|data:|blob:{origin}/"
        assert urls and [url for url in urls if not re.match(own, url)] == []
        assert self.ask("violations") == []
        assert self.of_kind("Runtime.exceptionThrown") == []
        problems = [event["entry"] for event in self.of_kind("Log.entryAdded") if event["entry"]["level"] == "error"]
        assert [problem for problem in problems if problem["source"] != "network"] == []  # a 4xx is one of those

    def close(self):
        self.browser.send("Target.disposeBrowserContext", browserContextId=self.context)


class Browser:
    def __init__(self, process, source, sink):
        self.process, self.source, self.sink = process, source, sink
        self.count, self.rest, self.tabs = 0, b"", {}

    def open(self, url):
        """Open a page that shares nothing with others, such as what they have stored."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self.tabs[session] = Tab(self, context, session)
        tab.open(url)
        return tab

    def send(self, method, session=None, **parameters):
        """Send a command and return its result. Events that come before it are kept in their tabs."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        os.write(self.sink, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (reply := self._read()).get("id") != self.count:
            if reply.get("sessionId") in self.tabs:
                self.tabs[reply["sessionId"]].events.append(reply)
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def _read(self):
        end = time.monotonic() + DEADLINE
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.source], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self.source, 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)


def _code(key):
    codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}
    return {"windowsVirtualKeyCode": codes[key]} if key in codes else {}


@contextmanager
def browsing(folder):
    """Start a browser whose profile is in ``folder``, and end it afterwards."""
    (its_source, our_sink), (our_source, its_sink) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", LAUNCH, str(its_source), str(its_sink), shutil.which(BROWSER), *OPTIONS.split()]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder}"], pass_fds=(its_source, its_sink), stderr=subprocess.DEVNULL
    )
    os.close(its_source)
    os.close(its_sink)
    browser = Browser(process, our_source, our_sink)
    try:
        yield browser
        browser.send("Browser.close")
        process.wait(DEADLINE)
    finally:
        process.kill()
        process.wait(DEADLINE)
        os.close(our_sink)
        os.close(our_source)
