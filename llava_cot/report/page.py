"""Make a self-contained page: its style, its one script, and a policy that keeps it from loading anything."""

import re
from base64 import b64encode
from hashlib import sha256
from html import escape
from importlib.resources import files

# Characters that HTML forbids, such as control characters. Models and tokenizers do write them.
_INVALID = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")


def page(title: str, body: str, styles: tuple[str, ...], scripts: tuple[str, ...]) -> str:
    """Return the page around ``body``, which is HTML. ``styles`` and ``scripts`` name files of this folder."""
    style, script = ("".join(_read(name) for name in names) for names in (styles, scripts))
    # Even if a model's text ever got through as markup, the browser would neither run nor fetch anything.
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return clean(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body>{body}<script>{script}</script></body></html>\n"
    )


def clean(html: str) -> str:
    """Return ``html`` without the characters that HTML forbids and those that UTF-8 cannot encode."""
    html = _INVALID.sub("\N{REPLACEMENT CHARACTER}", html)
    return html.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates


def _read(name: str) -> str:
    return files("llava_cot.report").joinpath(name).read_text("utf-8")
