"""The page at ``/``: its files, their headers, and the settings that it offers."""

import httpx

from llava_cot.search import POLICIES
from llava_cot.search.plan import PRESETS, settings_of


def test_its_headers_and_its_names(server):
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.headers["cache-control"] == "no-store"
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert not any("unsafe" in sources for sources in policy.values())
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    for name in ("page.js", "trace.js", "trace.css", "searches.json"):
        file = httpx.get(f"{server.url}/page/{name}")
        assert file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff"
        assert file.headers["content-security-policy"] == page.headers["content-security-policy"]
    for name in ("routes.py", "__init__.py", "..%2froutes.py", "%2e%2e/app.py", "page.js%00", "", "nav.js"):
        assert httpx.get(f"{server.url}/page/{name}").status_code == 404


def test_the_settings_that_it_offers_are_those_of_the_searches(server):
    offered = httpx.get(f"{server.url}/page/searches.json").json()
    assert [*offered] == [*POLICIES, *PRESETS]
    for search, settings in offered.items():
        assert {setting["name"] for setting in settings.values()} <= {*settings_of(search)}
    assert offered["swires"]["rounds"] == {"name": "max_rounds", "default": 3} and offered["greedy"] == {}
    assert offered["swires:published"]["candidates"] == {"name": "candidates", "default": None}
