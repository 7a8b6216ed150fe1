"""A local page on which a checkpoint's images change while one drags a slider.

    pip install gradio
    python examples/demo.py --ckpt results/quickstart/checkpoints/0001950.pt

It shows 16 images of a class. Image i comes from the noise cos(a) z_A + sin(a) z_B, which is as
normal as that of image i of both seeds, z_A and z_B; the slider is a / (pi/2). At its ends are the
images of sample.py --classes CLASS --per-class 16 --seed SEED.
"""

import argparse
import base64
import contextlib
import functools
import html
import io
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes during the imports

import torch
from PIL import Image
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataset.classes import class_names  # noqa: E402
from dataset.vae import codec_of  # noqa: E402
from engine.distributed import start_processes  # noqa: E402
from engine.errors import UserError, run_main  # noqa: E402
from engine.options import Parser, int_range  # noqa: E402
from sample import ImageSampler, choose_guidance, open_network  # noqa: E402
from weights.hub import file_or_address  # noqa: E402

ROWS = range(16)  # the images on the page
STEPS = 1, 2, 4
GRADIO = 6, 20  # its version; pages of 6.15 and before load a script from the internet
FONT = "system-ui", "sans-serif"  # Gradio's own would be fetched from the internet
SMALL = 128  # pixels of an image that is enlarged, without smoothing


def parse_args(argv=None):
    parser = Parser("A local page on which a checkpoint's images change while one drags a slider.")
    parser.add_argument("--ckpt", type=file_or_address, required=True, metavar="FILE",
                        help="checkpoint as for sample.py")
    parser.add_argument("--vae", help="decoder: ema, mse, a local folder, or none (default: the "
                                      "checkpoint's)")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen at; 0.0.0.0 lets other machines see the page")
    parser.add_argument("--port", type=int_range(0, 65535), default=7860,
                        help="port to listen at, 0 = any that is free")
    return parser.parse_args(argv)


def main(args):
    with listen(args.host, args.port) as listener, start_processes("tf32") as world:
        gradio = import_gradio()
        net, config, method = open_network(args.ckpt, world)
        codec = codec_of(config, args.vae or config["vae"], world.device, precision=world.precision)
        player = Player(net.to(world.device), codec, config, world, method)
        title = f"{Path(str(args.ckpt)).name}, {config['model']}"
        serve(build_app(gradio, player, title), listener)


def import_gradio():
    """The module, which takes seconds to import. Raises UserError where it is missing or old."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"Gradio must be installed, got none ({error}); pip install gradio") \
            from error
    if tuple(map(int, gradio.__version__.split(".")[:2])) < GRADIO:
        raise UserError("Gradio must be {}.{} or newer, got {}; pip install --upgrade gradio"
                        .format(*GRADIO, gradio.__version__))
    return gradio


def listen(host, port):
    """A socket that listens, so that no other program takes the port. Raises UserError."""
    try:
        listener = socket.create_server((host, port))
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name too long
        raise UserError(f"--port and --host must be free and this machine's, got {host}:{port} "
                        f"({error}); give others, such as --port 0") from error
    # Else each answer waits 40 ms for the acknowledgement of the one before. Connections inherit it
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(app, listener):
    """Print the page's address, and serve it until Ctrl-C."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    print("http://{}:{}/".format(*listener.getsockname()), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


# ---- images between two seeds --------------------------------------------------------------------


class Player:
    """Makes what the page shows, of a network that its method fits; the rest as in ImageSampler."""

    def __init__(self, net, codec, config, world, method):
        self.parts, self.config, self.method = (net, codec, config, world), config, method
        self.noise = functools.lru_cache(maxsize=8)(self._noise)  # NumPy takes 5 ms
        self.lock = threading.Lock()  # the page may be open twice

    def _noise(self, seed, steps):
        """(z1 (16, C, ...), later noise) of sample.py's images of this seed, on the CPU."""
        sampler = ImageSampler(*self.parts, seed=seed, steps=steps)
        return sampler.inputs(ROWS)[0], sampler.later_noise(ROWS)

    def images(self, label, steps, seed_a, seed_b, place, omega=None):
        """Images uint8 (16, 3, H, W) of this class at a place from 0, seed A, to 1, seed B; and the
        seconds that network and decoder took. omega: as --cfg of sample.py."""
        guidance = choose_guidance(argparse.Namespace(cfg=omega, cfg_interval=None), self.config,
                                   self.method)
        noise = tree_map(functools.partial(mix, place=place), self.noise(seed_a, steps),
                         self.noise(seed_b, steps))
        sampler = NoiseSampler(*self.parts, noise=noise, classes=[label], steps=steps,
                               guidance=guidance)
        with self.lock:
            start = time.perf_counter()
            images = sampler.images(ROWS).cpu()
            return images, sampler.seconds, time.perf_counter() - start - sampler.seconds


def mix(a, b, place):
    """The point at this place, from 0 to 1, of the arc from a to b: as standard normal as both."""
    angle = math.pi / 2 * place
    return math.cos(angle) * a + math.sin(angle) * b


class NoiseSampler(ImageSampler):
    """An ImageSampler of given noise, (z1, later noise). seconds: of its network, at the last."""

    def __init__(self, *args, noise, **options):
        super().__init__(*args, **options)
        self.noise = noise

    def inputs(self, rows):
        return self.noise[0], self.classes.expand(len(rows))

    def later_noise(self, rows):
        return self.noise[1]

    def data(self, rows):
        start = time.perf_counter()
        x = super().data(rows)
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - start
        return x


# ---- the page ------------------------------------------------------------------------------------


def build_app(gradio, player, title):
    """A FastAPI application: the page, whose pictures are at /images. title: of the checkpoint."""
    from fastapi import FastAPI, HTTPException, Query

    app, count = FastAPI(), player.config["num_classes"]

    @app.get("/images")
    def images(label: Annotated[int, Query(ge=0, lt=count)],
               steps: Annotated[int, Query(ge=1, le=max(STEPS))], seed_a: int, seed_b: int,
               place: Annotated[float, Query(ge=0, le=1)], omega: float | None = None):
        try:
            images, network, decoder = player.images(label, steps, seed_a, seed_b, place, omega)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        return {"picture": grid(images),
                "times": times(network, decoder if player.config["vae"] != "none" else None)}

    return gradio.mount_gradio_app(
        app, build_page(gradio, player, title), "/", footer_links=[], ssr_mode=False, css=CSS,
        head=f"<script>{SCRIPT}</script>", theme=gradio.themes.Base(font=FONT, font_mono=FONT))


def build_page(gradio, player, title):
    """The page, a gradio.Blocks, which SCRIPT fills with pictures."""
    with gradio.Blocks(title="MeanFlow", analytics_enabled=False, fill_width=True) as page, \
            gradio.Row(elem_id="page"):
        with gradio.Column(elem_id="controls"):
            gradio.HTML(f"<h1>From noise to image</h1><p>{html.escape(title)}</p>")
            controls = add_controls(gradio, player)
            gradio.HTML(SLIDER)
            gradio.HTML('<div id="times"></div>')
        gradio.HTML('<div id="picture"></div>', elem_id="right")
        gradio.on([page.load, *(control.input for control in controls)], None, controls, None,
                  js="(...values) => draw(values)")
    return page


def add_controls(gradio, player):
    """The inputs of the images but the slider, in the order of names in SCRIPT."""
    choices = [(name, label) for label, name in enumerate(labelled_names(player.config))]
    controls = [gradio.Dropdown(choices, value=0, label="Class", elem_id="class"),
                gradio.Radio(STEPS, value=STEPS[0], label="Steps", elem_id="steps")]
    with gradio.Row():
        controls += [gradio.Number(seed, label=f"Seed {name}", precision=0, min_width=80,
                                   elem_id=f"seed-{name}") for seed, name in enumerate("AB")]
    guidance = player.method.guidance(player.config)
    largest = max(player.config.get("omega_max") or 8, guidance.get("omega", 1))
    if "omega" in guidance and largest > 1:
        controls += [gradio.Slider(1, largest, guidance["omega"], step=0.1, buttons=[],
                                   label="Guidance omega", elem_id="omega")]
    return controls


def labelled_names(config):
    """The name of each class with its label: ImageNet has two cranes, and Gradio translates names
    such as radio, which are words of its own."""
    names = class_names(config, range(config["num_classes"]))
    return [name if name == str(label) else f"{name} ({label})" for label, name in enumerate(names)]


def grid(images):
    """HTML of uint8 images (B, 3, H, W)."""
    kind = "small" if images.shape[3] < SMALL else "large"
    tags = [f'<img alt="image {i}" decoding="sync" src="data:image/png;base64,{png(image)}">'
            for i, image in enumerate(images)]
    return f'<div class="grid {kind}">{"".join(tags)}</div>'


def png(image):
    """A uint8 image (3, H, W) as a PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def times(network, decoder=None):
    """HTML of the seconds of network and, unless it is None, decoder for all images."""
    parts = {"network": network} | ({} if decoder is None else {"VAE decoder": decoder})
    return "".join(
        f"<div><b>{milliseconds(seconds / len(ROWS))}</b> ms a picture<br>"
        f"{name}: {milliseconds(seconds)} ms for all {len(ROWS)}</div>"
        for name, seconds in parts.items())


def milliseconds(seconds):
    """Milliseconds with three digits, or all before the point."""
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


SLIDER = """<label id="place">Drag from seed A to seed B
<input type="range" min="0" max="1" step="0.005" value="0" oninput="draw()"></label>"""

# Gradio's own way of showing a result took 100 ms and more for each move of the slider
SCRIPT = """
const names = ["label", "steps", "seed_a", "seed_b", "omega"];
let current = [], busy = false, again = false;

async function draw(values = current) {
  if (!values.every(Number.isFinite)) return;  // an empty seed is null
  current = values;
  again = true;
  if (busy) return;
  busy = true;
  try {
    while (again) {
      again = false;
      const query = new URLSearchParams(current.map((value, i) => [names[i], value]));
      query.set("place", document.querySelector("#place input").value);
      const answer = await fetch("images?" + query);
      for (const [id, html] of Object.entries(await answer.json()))
        document.getElementById(id).innerHTML = html;
    }
  } finally {
    busy = false;
  }
}
"""

CSS = """
#page { max-width: 1180px; margin: 0 auto; gap: 40px; flex-wrap: nowrap; align-items: flex-start; }
#controls { flex: 0 0 320px; gap: 14px; }
#controls h1 { font-size: 24px; margin: 0; }
#place input { width: 100%; height: 32px; cursor: grab; }
#right { flex: 1 1 auto; max-width: calc(100vh - 48px); }
.grid { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
.grid img { width: 100%; aspect-ratio: 1; border-radius: 6px; display: block; }
.grid.small img { image-rendering: pixelated; }
#times { color: var(--body-text-color-subdued); }
#times b { font-size: 40px; color: var(--body-text-color); font-variant-numeric: tabular-nums; }
"""


if __name__ == "__main__":
    run_main(main, parse_args)
