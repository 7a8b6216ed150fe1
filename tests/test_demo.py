"""The live page: the images between two seeds, and the page itself in a real browser."""

import io
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from base64 import b64decode
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import (  # soak.py, its import, finds examples/
    ROOT,
    Child,
    call,
    save_random,
    save_small_vae,
)
from demo import Player, add_controls, grid, labelled_names, milliseconds, mix, times
from PIL import Image
from soak import HANG_S

from dataset.pictures import load_pngs
from dataset.vae import codec_of
from engine.distributed import start_processes
from sample import open_network

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
MS = 60_000  # for a wait in the browser; it takes milliseconds

CLASSES = {"num_classes": 3, "classes": ["cat", "radio", "<b>owl</b>"]}
KINDS = {"meanflow": {"model": "DiT-T/4", **CLASSES},
         "soflow": {"model": "DiT-T/4", "method": "soflow", **CLASSES},
         "imf": {"model": "iMF-T/4", "omega_max": 4.0, **CLASSES},
         "latents": {"model": "DiT-T/4", "vae": "vae", "image_size": 64,
                     "latent_shape": [4, 8, 8], "scale": 0.18215, **CLASSES}}


def player_of(path):
    with start_processes("tf32") as world:
        net, config, method = open_network(path, world)
        return Player(net, codec_of(config, config["vae"]), config, world, method)


@pytest.mark.parametrize("place", [0.0, 0.25, 0.5, 1.0])
def test_a_mixture_of_two_normals_is_as_normal(place):
    a, b = mix(1.0, 0.0, place), mix(0.0, 1.0, place)  # the shares of both
    assert a**2 + b**2 == pytest.approx(1, abs=1e-15)  # the variance of the sum
    assert math.atan2(b, a) == pytest.approx(place * math.pi / 2, abs=1e-15)  # at even speed


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_ends_are_the_images_of_sample(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "latents":
        save_small_vae("vae")
    path = save_random("random.pt", **KINDS[kind])
    player, guidance = player_of(path), {"omega": 2.5} if kind == "imf" else {}
    shown = {}
    for seed, place in (5, 0.0), (7, 1.0):
        call("sample", "--ckpt", path, "--classes", "radio", "--per-class", 16, "--seed", seed,
             "--num-sampling-steps", 2, "--sample-dir", f"seed-{seed}",
             *(["--cfg", 2.5] if guidance else []))
        shown[place], network, decoder = player.images(1, 2, 5, 7, place, **guidance)
        files = [f"seed-{seed}/{i:06d}.png" for i in range(16)]
        assert shown[place].equal(load_pngs(files, player.config["image_size"]))
        assert network > 0 and decoder > 0
    between, *_ = player.images(1, 2, 5, 7, 0.5, **guidance)
    assert not between.equal(shown[0.0]) and not between.equal(shown[1.0])
    if guidance:
        assert not player.images(1, 2, 5, 7, 0.5, omega=1.0)[0].equal(between)


@pytest.mark.parametrize("config, count", [
    (KINDS["meanflow"], 4), (KINDS["imf"], 5), (KINDS["imf"] | {"omega_max": 1.0}, 4)])
def test_guidance_can_be_chosen_where_it_has_a_range(config, count, tmp_path):
    player = player_of(save_random(tmp_path / "random.pt", **config))
    assert len(add_controls(MagicMock(), player)) == count


def test_classes_of_one_name_differ():
    assert labelled_names({"num_classes": 3, "classes": ["a", "b", "a"]}) == [
        "a (0)", "b (1)", "a (2)"]
    assert labelled_names({"num_classes": 2}) == ["0", "1"]


def test_milliseconds_have_three_digits():
    assert [milliseconds(value) for value in (1.2345e-4, 0.0123456, 0.51234, 12.3456)] == [
        "0.123", "12.3", "512", "12346"]
    assert "0.250" in times(4e-3) and "31.2" in times(4e-3, 0.5)


def test_pictures_are_whole():
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    assert images_of(grid(images)).equal(images)


def images_of(html):
    """The images uint8 (B, 3, H, W) that a page shows."""
    files = [io.BytesIO(b64decode(part.split('"')[0])) for part in html.split("base64,")[1:]]
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                        .view(image.height, image.width, 3).permute(2, 0, 1)
                        for image in map(Image.open, files)])


@pytest.mark.parametrize("module, remedy", [
    (None, "pip install gradio"), (SimpleNamespace(__version__="5.49.1"), "--upgrade gradio")])
def test_without_a_new_gradio_one_line_says_how_to_install_it(module, remedy, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", module)
    refusal("demo", ["--ckpt", "any.pt", "--port", 0], remedy)


def test_a_port_in_use_is_refused(refusal):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert str(port) in refusal("demo", ["--ckpt", "any.pt", "--port", port], "--port")
    for host in "192.0.2.1", "x" * 300:  # of another machine, and too long for a name
        refusal("demo", ["--ckpt", "any.pt", "--host", host, "--port", 0], "--host")


# ---- the page ------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """The demo of an iMF model, which has every control, in a process of its own; and a player of
    the same checkpoint."""
    path = save_random(tmp_path / "random.pt", **KINDS["imf"])
    child = Child(ROOT / "examples" / "demo.py", "--ckpt", path, "--port", 0,
                  output=tmp_path / "output.txt")
    child.wait_for("/\n")
    url = child.output.read_text().strip()
    yield SimpleNamespace(child=child, url=url, player=player_of(path))
    child.process.kill()


@pytest.fixture
def page(server):
    """The page in Chromium; page.messages are those of its console, page.asked all addresses."""
    if not BROWSER:
        pytest.skip("needs a browser: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS, timeout=MS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(MS)
        page.messages, page.asked = [], []
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(server.url)
        page.wait_for_selector("#picture img")
        yield page
        browser.close()


@pytest.mark.slow
def test_every_control_changes_the_picture(page, server):
    wait_for_images(page, server, 0, 1, 0, 1, 0.0, 1.0)
    drag_the_slider(page, server)
    page.click("#class input")
    page.get_by_role("option", name="radio (1)").click()
    wait_for_images(page, server, 1, 1, 0, 1, 1.0, 1.0)
    page.locator("#steps").get_by_text("4", exact=True).click()
    wait_for_images(page, server, 1, 4, 0, 1, 1.0, 1.0)
    page.fill("#seed-B input", "")  # while one types
    page.fill("#seed-B input", "12")
    wait_for_images(page, server, 1, 4, 0, 12, 1.0, 1.0)
    page.fill("#omega input[type=number]", "3.5")
    page.press("#omega input[type=number]", "Enter")
    wait_for_images(page, server, 1, 4, 0, 12, 1.0, 3.5)
    assert page.eval_on_selector_all("#picture img", """images => images.every(
        image => image.naturalWidth == 8 && image.width > 100)"""), "shown, and enlarged"
    assert page.inner_text("#times").count(" ms ") == 2
    assert all(url.startswith((server.url, "data:")) for url in page.asked)
    assert page.messages == []
    end(server)  # while the page is open


def drag_the_slider(page, server):
    """From one end to the other. The images follow before the mouse button is released."""
    box = page.locator("#place input").bounding_box()
    x, y = box["x"] + 9, box["y"] + box["height"] / 2  # the middle of the handle at the left end
    page.mouse.move(x, y)
    page.mouse.down()
    for part in 0.3, 0.6, 1.1:
        page.mouse.move(x + part * (box["width"] - 18), y, steps=5)
        place = float(page.input_value("#place input"))
        assert place == pytest.approx(min(part, 1), abs=0.05)
        wait_for_images(page, server, 0, 1, 0, 1, place, 1.0)
    page.mouse.up()


def wait_for_images(page, server, *values):
    """Wait until the page shows the images of these values of Player.images."""
    images, *_ = server.player.images(*values)
    deadline = time.monotonic() + HANG_S
    while not images_of(page.inner_html("#picture")).equal(images):
        assert time.monotonic() < deadline, (values, page.messages)
        time.sleep(0.01)


def end(server):
    """Ctrl-C ends the server, which has printed its address alone."""
    os.kill(server.child.pid, signal.SIGINT)
    assert server.child.wait() == (0, f"{server.url}\n")


@pytest.mark.slow
def test_the_server_answers_and_ends_without_a_browser(server):
    address = f"{server.url}images?label=2&steps=2&seed_a=3&seed_b=4&place=0.5&omega=2"
    with urllib.request.urlopen(address, timeout=HANG_S) as answer:
        shown = json.load(answer)
    for right, wrong in ("label=2", "label=99"), ("steps=2", "steps=9999999"), ("ga=2", "ga=.5"):
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(address.replace(right, wrong), timeout=HANG_S)
    images, *_ = server.player.images(2, 2, 3, 4, 0.5, 2.0)
    assert images_of(shown["picture"]).equal(images) and "network" in shown["times"]
    end(server)
