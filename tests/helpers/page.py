"""A page to look at in a test: parsed, and in a browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

VOID = {"meta", "img", "br", "input"}
BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium (on Debian: apt-get install chromium)")


class Page(HTMLParser):
    """Elements by name with their attributes, the text of each card, and all text outside script and style."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.cards, self.text, self.scripts, self.open, self._card = [], {}, "", [], [], None
        self.feed(page)
        self.close()

    @property
    def names(self):
        return [tag for tag, _ in self.elements]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self._card = dict(attributes)["id"]
            self.cards[self._card] = ""

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "article":
            self._card = None

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data
            if self._card:
                self.cards[self._card] += data


def browse(file, *options):
    """The elements of the page, which is opened from disk, once a browser has run it."""
    always = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --window-size=1400,1000 --dump-dom"
    )
    profile = f"--user-data-dir={file.parent / 'profile'}"
    command = [BROWSER, *always.split(), profile, *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(file, probe, *options):
    """What the body of a function returns, in a copy of the page that lets a script run which is not its own."""
    page = file.read_text("utf-8").replace('http-equiv="Content-Security-Policy"', 'name="none"')
    copy = file.with_name(f"probed-{file.name}")
    script = f"<script>document.title = JSON.stringify((() => {{ {probe} }})());</script></body>"
    copy.write_text(page.replace("</body>", script), encoding="utf-8")
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", browse(copy, *options), re.DOTALL).group(1)))
