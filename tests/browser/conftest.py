"""A headless Chromium that is there already. What is missing is said at once; nothing is installed, nothing skipped."""

import os
import shutil
from importlib.util import find_spec
from urllib.parse import urlsplit

import pytest
from tokmerge.io import paths

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium():
    """The browser's path: $CHROMIUM, or the first that is installed; None if there is none."""
    given = os.environ.get("CHROMIUM")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, NAMES)), None)


def pytest_sessionstart(session):
    missing = []
    if find_spec("playwright") is None:
        missing.append("the Python package playwright: `make setup`")
    if chromium() is None:
        missing.append(f"a browser (one of {', '.join(NAMES)}, or its path in $CHROMIUM): `apt-get install chromium`")
    if not (paths.root() / "results" / "site" / "index.html").is_file():
        missing.append("the site: `make site`")
    if missing:
        pytest.exit("browser tests need " + "; and ".join(missing), returncode=1)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    # Chromium's own sandbox does not start for root, nor in most containers.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def errors():
    return []


@pytest.fixture
def page(browser, errors, request):
    """A page of the size and colours that a test marks with ``indirect`` parameters; what goes wrong is in `errors`."""
    context = browser.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    outside = lambda url: urlsplit(url).netloc and urlsplit(url).hostname != "127.0.0.1"  # noqa: E731
    page.on("request", lambda request: errors.append(f"outside: {request.url}") if outside(request.url) else None)
    yield page
    context.close()
