"""The page itself, on a port, in a browser: the way of a person through it."""

import http.client
import io
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from consistency.config import CONF_DIR

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def blocks(studio):
    pytest.importorskip("gradio", reason="the page needs the extra: pip install 'consistency[app]'")
    from consistency.app.serve import serving

    defaults = OmegaConf.load(CONF_DIR / "app.yaml")
    with serving(studio, host=defaults.host, port=defaults.port, max_upload_mb=1) as blocks:
        yield blocks


def send(address, name, body, kind, **headers):
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=600)
    connection.request("POST", f"/gradio_api/{name}", body, {"Content-Type": kind, **headers})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def upload(address, size):
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return send(address, "upload", head + bytes(size) + b"\r\n--b--\r\n", "multipart/form-data; boundary=b")


def test_only_this_machine_can_reach_it_by_default(blocks):
    listening = [server_socket.getsockname()[0] for server in blocks.server.servers for server_socket in server.sockets]
    assert listening == ["127.0.0.1"]
    assert blocks.share_url is None


def test_oversized_uploads_are_refused(blocks):
    assert upload(blocks.local_url, 1000)[0] == 200
    status, words = upload(blocks.local_url, (1 << 20) + 1)
    assert status == 413
    assert "1048576 bytes" in words


def test_oversized_requests_are_refused_before_they_are_read(blocks):
    for name, kind in (("upload", "multipart/form-data; boundary=b"), ("queue/join", "application/json")):
        status, words = send(blocks.local_url, name, None, kind, **{"Content-Length": str(1 << 40)})
        assert status == 413
        assert "the limit of a request" in words


def test_a_body_of_unsaid_length_is_refused(blocks):
    chunks = iter([b"x" * 1000] * 10)
    assert send(blocks.local_url, "queue/join", chunks, "application/json")[0] == 413


def test_nothing_stays_behind(studio, blocks):
    from consistency.app.serve import serving

    with serving(studio, host="127.0.0.1", port=None, max_upload_mb=1) as other:
        assert other.local_url != blocks.local_url
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert upload(other.local_url, 1000)[0] == 200
        assert any(folder.rglob("a.png"))
    assert not folder.exists()


def test_a_taken_port_is_one_line(studio, blocks):
    from consistency.app.serve import serving

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match=r"cannot serve on host=127.0.0.1 port=\d+: .*change port") as refused,
        serving(studio, host="127.0.0.1", port=taken.getsockname()[1], max_upload_mb=1),
    ):
        pass
    assert "\n" not in str(refused.value)
    elsewhere = {"host": "192.0.2.1", "port": None}  # an address of no machine (RFC 5737)
    with (
        pytest.raises(OSError, match=r"cannot serve on host=192.0.2.1: "),
        serving(studio, **elsewhere, max_upload_mb=1),
    ):
        pass


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt install chromium to test the page in a browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def pixels_of(picture):
    """What the image on the page holds: uint8 [H, W, 3]."""
    return np.array(Image.open(io.BytesIO(picture.page.request.get(picture.get_attribute("src")).body())))


def wait_for_line(page, name, words):
    page.wait_for_function(f"document.querySelector('#{name}_line input').value.includes({words!r})")


def test_a_walk_through_the_page(blocks, studio, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(120_000)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(blocks.local_url)

    page.locator("#seed input").fill("7")
    page.locator("#sample_run").click()
    picture = page.locator("#sample_result img")
    picture.wait_for()
    wait_for_line(page, "sample", "2 network evaluations")
    from consistency.app.studio import Settings

    expected = studio.sample(16, Settings(steps=2, seed=7)).picture()
    assert np.array_equal(pixels_of(picture), expected)

    page.locator("#seed input").fill("-1")
    page.locator("#sample_run").click()
    wait_for_line(page, "sample", "seed is -1; allowed")
    page.locator("#seed input").fill("7")

    inpaint(page)
    uploads(page, tmp_path)
    interpolate(page)
    page.screenshot(path=tmp_path / "page.png")
    assert len(set(Image.open(tmp_path / "page.png").convert("L").tobytes())) > 20
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {blocks.local_url.split("/")[2]}
    assert not errors


def inpaint(page):
    """A sample on the board, a stroke of the mouse over its second row of pixels, filled: the rest stays."""
    page.get_by_role("tab", name="Inpaint").click()
    page.locator("#inpaint_take").click()
    wait_for_line(page, "inpaint", "2 network evaluations")
    page.locator("#inpaint_run").click()
    wait_for_line(page, "inpaint", "nothing is drawn")
    box = page.locator("#inpaint_board canvas").bounding_box()
    cell = box["width"] / 8
    page.mouse.move(box["x"] + cell / 2, box["y"] + 1.5 * cell)
    page.mouse.down()
    page.mouse.move(box["x"] + 7.5 * cell, box["y"] + 1.5 * cell, steps=3)
    page.mouse.up()
    page.locator("#inpaint_run").click()
    picture = page.locator("#inpaint_result img")
    picture.wait_for()
    shown = pixels_of(picture)[..., 0]  # two of 240 x 240 in frames of 2
    before, after = (shown[2 + 15 : 242 : 30, left + 15 : left + 240 : 30].astype(int) for left in (2, 244))
    assert (before[1] == 128).all()
    assert (after[1] != 128).any()
    assert np.array_equal(np.delete(before, 1, 0), np.delete(after, 1, 0))


def uploads(page, folder):
    """A text with the name of a picture, then a picture."""
    (folder / "text.png").write_text("no picture")
    Image.new("L", (20, 20), 200).save(folder / "grey.png")
    chooser = page.locator("#inpaint_upload input[type=file]")
    chooser = chooser if chooser.count() else page.locator("input[type=file]").nth(0)
    chooser.set_input_files(folder / "text.png")
    wait_for_line(page, "inpaint", "not a readable image")
    chooser.set_input_files(folder / "grey.png")
    wait_for_line(page, "inpaint", "an upload")
    page.wait_for_function(
        "document.querySelector('#inpaint_board canvas').getContext('2d').getImageData(3, 3, 1, 1).data[0] == 200"
    )


def interpolate(page):
    """The button draws one end, the slider another image."""
    page.get_by_role("tab", name="Interpolate").click()
    page.locator("#interpolate_run").click()
    picture = page.locator("#interpolate_result img")
    picture.wait_for()
    first = picture.get_attribute("src")
    page.locator("#point input[type=range]").focus()
    page.keyboard.press("End")
    page.wait_for_function(f"document.querySelector('#interpolate_result img').src != {first!r}")
