"""JupyterLab as a reader uses it: run the tour, move a slider; step through notebooks and a study."""

import json
import os
import re
import subprocess
import sys
import time
from urllib.request import Request, urlopen

import pytest
from tokmerge.io import paths, store
from tokmerge.models.saliency import fetched_file

ROOT = paths.root()
TOUR = ROOT / "notebooks" / "00_tour.ipynb"
STARTED = re.compile(r"http://127\.0\.0\.1:(\d+)/lab")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab from the checkout, its settings elsewhere and without autosave, so that nothing is left behind."""
    home = tmp_path_factory.mktemp("lab")
    for plugin, settings in (
        ("docmanager-extension/plugin", {"autosave": False}),
        ("notebook-extension/tracker", {"windowingMode": "none"}),  # every cell is on the page
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        store.save_json(settings, home / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings")
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--port=0", "--ip=127.0.0.1", "--allow-root",
               f"--notebook-dir={ROOT}", "--IdentityProvider.token=", "--ServerApp.password=",
               "--ServerApp.disable_check_xsrf=True"]  # fmt: skip
    log = (home / "log").open("w+")
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not (found := STARTED.search((home / "log").read_text())):
            assert server.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{found.group(1)}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def run_all(lab, page, name, said):
    """Open a notebook in a workspace of its own, run all of its cells, and wait until its takeaway says so."""
    page.set_default_timeout(240_000)
    page.goto(f"{lab}/lab/workspaces/{name}/tree/notebooks/{name}.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # told to run any earlier, it does not
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    page.locator(".jp-OutputArea-output", has_text=re.compile(said)).wait_for()


def end_kernels(lab):
    """A kernel that idles keeps its memory and threads."""
    with urlopen(f"{lab}/api/sessions") as answer:
        sessions = json.load(answer)
    for session in sessions:
        urlopen(Request(f"{lab}/api/sessions/{session['id']}", method="DELETE")).close()


@pytest.fixture(autouse=True)
def no_kernel_left(lab):
    yield
    end_kernels(lab)


# In their order: what one reads, one before it writes.
@pytest.mark.parametrize(
    ("name", "said", "figures"),
    [
        ("10_inputs", r"images of .* reaches top-1 [\d.]+%", 2),
        ("30_search", r"\d+ trials on \d+ search images of .*: hypervolume", 2),
        ("40_images", r"test images of .*, unmerged top-1 [\d.]+%", 1),
        ("60_channel", r"Adaptive tokens over cut-off ones there", 1),
    ],
)
def test_a_reader_steps_through(lab, page, name, said, figures):
    notebook = ROOT / "notebooks" / f"{name}.ipynb"
    before = notebook.read_bytes()
    run_all(lab, page, name, said)
    assert page.locator(".jp-OutputArea-output img").count() == figures
    assert page.locator(".jp-OutputArea-output", has_text="Traceback").count() == 0
    assert notebook.read_bytes() == before, "nothing was saved"


def test_a_study_that_is_done_is_read(lab, page):
    for _ in range(2):
        run_all(lab, page, "35_images_study", r"test images of .* Chosen on \d+ other images")
        assert page.locator(".jp-OutputArea-output", has_text="Traceback").count() == 0
        said = page.locator(".jp-OutputArea-output", has_text="was made with these values, and is read").count()
        assert page.locator(".jp-OutputArea-output", has_text=re.compile("all [\\d,]+ trials")).count() == 1
        end_kernels(lab)
    assert said == 1


@pytest.mark.parametrize("page", [{"viewport": {"width": 1400, "height": 1000}}], indirect=True)
def test_tour_runs_shows_its_figures_and_follows_the_sliders(lab, page):
    before = TOUR.read_bytes()
    run_all(lab, page, "00_tour", r"At threshold [\d.]+ the 3 photos keep")

    images = "document.querySelectorAll('.jp-OutputArea-output > img')"
    widths = page.evaluate(f"Array.from({images}, image => image.naturalWidth)")
    photographs = fetched_file(paths.data()).is_file()
    assert len(widths) == 3 + photographs, "photographs if their model is there, merge maps, slider positions, budget"
    assert min(widths) > 300
    assert page.locator(".jp-OutputArea-output", has_text="Traceback").count() == 0

    picture, line = page.locator("img.widget-image"), page.locator(".widget-label:has-text('tokens left')")
    assert page.locator(".widget-slider").count() == 3
    assert picture.evaluate("image => image.naturalWidth") > 300
    first_line, first_picture = line.inner_text(), picture.get_attribute("src")
    assert re.match(r"\d+, \d+, \d+ of 197 tokens left: \d+% of the MACs, \d+% of the bytes", first_line)
    page.locator(".widget-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("old => document.querySelector('img.widget-image').src !== old", arg=first_picture)
    page.wait_for_function("old => !document.body.innerText.includes(old)", arg=first_line)
    assert picture.evaluate("image => image.naturalWidth") > 300
    assert TOUR.read_bytes() == before, "nothing was saved"
