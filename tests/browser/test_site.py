"""The site as a reader sees it."""

from html.parser import HTMLParser

import pytest
from tokmerge.io import paths

SITE = paths.root() / "results" / "site"
FOUND = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
EVERY = [name for name in FOUND if not name.startswith("_static")]  # the theme's own are no pages
# Pages of the library are all alike.
PAGES = [name for name in EVERY if not name.startswith(("_modules", "api"))] + ["api/tokmerge.wire.html"]
DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


class Links(HTMLParser):
    """What a page links to and shows, what can be linked to in it, and where it goes on."""

    def __init__(self, name):
        super().__init__()
        self.found, self.ids, self.next = [], set(), None
        self.feed((SITE / name).read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.found += [given[name] for name in ("href", "src") if name in given]
        if tag == "link" and given.get("rel") == "next":
            self.next = given["href"]


@pytest.fixture(scope="module")
def links():
    return {name: Links(name) for name in EVERY}


def go(page, name):
    page.goto((SITE / name).as_uri(), wait_until="load")


def follow(name, link):
    """Where a link on a page leads, from the site's folder."""
    return (SITE / name).parent.joinpath(link).resolve().relative_to(SITE.resolve()).as_posix()


def test_every_link_and_image_leads_somewhere(links):
    for name, page in links.items():
        for link in page.found:
            if not link.startswith(("https://", "data:")):
                file, _, anchor = link.partition("#")
                target = follow(name, file.partition("?")[0]) if file else name
                assert (SITE / target).is_file(), f"{name} links to {link}"
                assert not anchor or target not in links or anchor in links[target].ids, f"{name} links to {link}"


def test_one_page_leads_to_the_next_through_all_that_is_told(links):
    name, visited = "index.html", []
    while name not in visited:
        visited.append(name)
        if links[name].next:
            name = follow(name, links[name].next)
    assert set(visited) == {page for page in EVERY if not page.startswith("_modules")} - {"search.html"}
    assert visited.index("notebooks/00_tour.html") + 1 == visited.index("notebooks/01_train_vit.html")


def test_sphinx_had_nothing_to_complain_about():
    assert (SITE / "warnings.txt").read_text() == ""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("page", [DESK], indirect=True)
def test_page_loads_with_every_image_and_no_error(page, errors, name):
    go(page, name)
    assert page.locator("h1").first.inner_text().strip()
    widths = page.evaluate("Array.from(document.images, image => [image.getAttribute('alt'), image.naturalWidth])")
    assert all(alt and not alt.endswith(".png") and width > 0 for alt, width in widths), widths
    assert errors == [], "an error, or a request to elsewhere"


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_nothing_overflows_on_a_phone(page, name):
    go(page, name)
    wide = page.evaluate("""() => {
        const clipped = element => element
            && (getComputedStyle(element).overflowX !== 'visible' || clipped(element.parentElement));
        return [...document.querySelectorAll('main *')]
            .filter(e => e.checkVisibility({visibilityProperty: true}))
            .filter(e => e.getBoundingClientRect().right > 390.5 && !clipped(e.parentElement))
            .map(e => e.tagName + ' ' + e.className);
    }""")
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("page", [DESK], indirect=True)
def test_figures_are_all_shown_with_their_caption_and_origin(page):
    go(page, "figures/README.html")
    shown = page.evaluate("Array.from(document.querySelectorAll('article section img'), image => image.naturalWidth)")
    assert len(shown) == len(list((SITE / "_downloads").rglob("*.svg"))) > 0
    assert min(shown) > 300
    page.locator("article a", has_text="20_merging").first.click()
    assert page.locator("h1").first.inner_text().startswith("20 · Merging")


@pytest.mark.parametrize("page", [DESK, PHONE], indirect=True, ids=["desk", "phone"])
def test_navigation_and_search_lead_to_a_page(page, errors):
    go(page, "index.html")
    if page.viewport_size["width"] < 500:
        page.locator("button.primary-toggle:visible").click()
    page.locator("nav.bd-links a", has_text="30 · Search").first.click()
    page.wait_for_url("**/notebooks/30_search.html")  # all of it: what is left half loaded counts as an error
    page.goto((SITE / "search.html").as_uri() + "?q=hypervolume")
    page.locator("#search-results a", has_text="36 · Search study").first.click()
    page.wait_for_url("**/notebooks/36_search_study.html*")
    assert page.locator("h1").first.inner_text().startswith("36 · ")
    assert errors == []


@pytest.mark.parametrize(
    ("page", "dark"), [({"color_scheme": "light"}, False), ({"color_scheme": "dark"}, True)], indirect=["page"]
)
def test_colours_follow_the_reader(page, dark):
    go(page, "notebooks/00_tour.html")
    colour = "getComputedStyle(document.body).{}.match(/\\d+/g).map(Number)"
    back, ink = (page.evaluate(colour.format(which)) for which in ("backgroundColor", "color"))
    assert (sum(back) < 200) is dark
    assert abs(sum(back) - sum(ink)) > 450, "readable"
    code = page.evaluate("""() => {
        const spans = [...document.querySelectorAll('.highlight span[class]')];
        return spans.map(span => getComputedStyle(span).color.match(/[0-9]+/g).map(Number));
    }""")
    assert len(code) > 50
    far = [sum(abs(a - b) for a, b in zip(colour, back, strict=False)) for colour in code]
    assert min(far) > 150, "code stands out from its background"
