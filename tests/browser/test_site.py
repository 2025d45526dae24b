"""The report as a reader sees it."""

import pytest
from conftest import SITE

PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
BACKGROUND = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"


def go(page, name):
    page.goto((SITE / name).as_uri(), wait_until="load")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("page", [DESK], indirect=True)
def test_page_loads_with_every_image_and_no_error(page, errors, name):
    go(page, name)
    assert page.locator("h1").first.inner_text().strip()
    widths = page.evaluate("Array.from(document.images, image => [image.getAttribute('alt'), image.naturalWidth])")
    assert all(alt and width > 0 for alt, width in widths), widths
    assert errors == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_nothing_overflows_on_a_phone(page, name):
    go(page, name)
    wide = page.evaluate("""() => {
        const clipped = element => element
            && (getComputedStyle(element).overflowX !== 'visible' || clipped(element.parentElement));
        return [...document.body.querySelectorAll('*')]
            .filter(e => e.getBoundingClientRect().right > 390.5 && !clipped(e.parentElement))
            .map(e => e.tagName + ' ' + e.className);
    }""")
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("page", [DESK], indirect=True)
def test_overview_shows_all_figures(page):
    go(page, "index.html")
    shown = page.evaluate("Array.from(document.querySelectorAll('figure img'), image => image.naturalWidth)")
    assert len(shown) == len(list((SITE / "figures").glob("*.png"))) > 0
    assert min(shown) > 300


@pytest.mark.parametrize("page", [DESK, PHONE], indirect=True, ids=["desk", "phone"])
def test_navigation_leads_through_all_pages(page, errors):
    go(page, "index.html")
    visited = []
    for _ in PAGES:
        visited.append(page.url.split("/report/")[1])
        assert page.locator("nav a[aria-current=page]").count() == 1
        following = page.locator("a[rel=next]")
        if following.count():
            following.click()
    assert sorted(visited) == PAGES, "next, next, next: every page once"
    page.locator("nav a", has_text="30 · Search").first.click()
    assert page.url.endswith("notebooks/30_search.html")
    page.locator("nav a", has_text="Overview").click()
    page.locator("figcaption a", has_text="20_merging").first.click()
    assert page.locator("h1").first.inner_text().startswith("20 · Merging")
    assert errors == []


@pytest.mark.parametrize(
    ("page", "dark"), [({"color_scheme": "light"}, False), ({"color_scheme": "dark"}, True)], indirect=["page"]
)
def test_colours_follow_the_reader(page, dark):
    go(page, "notebooks/00_tour.html")
    back = page.evaluate(BACKGROUND)
    ink = page.evaluate(BACKGROUND.replace("backgroundColor", "color"))
    assert (sum(back) < 200) is dark
    assert abs(sum(back) - sum(ink)) > 450, "readable"
    code = page.evaluate("""() => {
        const spans = [...document.querySelectorAll('.highlight span[class]')];
        return spans.map(span => getComputedStyle(span).color.match(/[0-9]+/g).map(Number));
    }""")
    assert len(code) > 50
    far = [sum(abs(a - b) for a, b in zip(colour, back, strict=False)) for colour in code]
    assert min(far) > 150, "code stands out from its background"
