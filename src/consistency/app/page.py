"""The page: one tab a task, shared settings above. Gradio's components check the limits of what they are given."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consistency.api import STROKE, Model, shrink
from consistency.app.pictures import enlarged, painted, picture, read_drawing, read_upload
from consistency.io.safe_load import first_line
from consistency.sampling.operators import enlarge, grey, hidden

log = logging.getLogger(__name__)

AUTO = "auto"  # the label: random by seed for new images, none or guessed for edits
MAX_STEPS, MAX_IMAGES, MAX_SEED, MAX_GUIDANCE = 64, 64, 2**32 - 1, 20.0
CSS = """
.picture img, .board canvas { image-rendering: pixelated; }
.picture img { width: auto !important; max-width: 100%; margin: auto; }
"""
# One request at a time for the model; no other program is invited to call these functions.
_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}

Settings = dict[str, Any]  # keywords that all methods of `Model` share


def build(model: Model) -> Any:
    """The page as Gradio's Blocks; not served yet."""
    import gradio as gr

    channels, _, width = model.image_shape
    factors = [factor for factor in range(2, width // 2 + 1) if width % factor == 0]
    with gr.Blocks(title="consistency", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        weights = f", weights {model.info['weights']}" if model.info.get("weights") else ""
        colours = "colour" if channels == 3 else "grey"
        gr.Markdown(f"### {model.info.get('method') or 'model'}{weights}, {width}x{width}, {colours}")
        shared = _shared_settings(model)
        with gr.Tabs():
            with gr.Tab("Sample"):
                _sample_tab(model, shared)
            with gr.Tab("Inpaint"):
                _edit_tab(model, shared, inpaint, "Fill", "Draw over what the model is to fill.", brush="mask")
            if channels == 3:
                with gr.Tab("Colorize"):
                    _edit_tab(model, shared, colorize, "Colorize", "The model sees the grey of this image only.")
            if factors:
                with gr.Tab("Super-resolve"):
                    words = "The image is shrunk by the factor; the model sees the small one only."
                    factor = gr.Radio(factors, value=factors[0], label="Factor", render=False)
                    _edit_tab(model, shared, superresolve, "Super-resolve", words, factor)
            with gr.Tab("Strokes"):
                words = "Paint, on black or on an image. The more noise, the less of the painting stays."
                first = round(STROKE * width / 256, 2)
                sigma = gr.Slider(0.01, 10, first, step=0.01, label="Noise level", elem_id="level", render=False)
                _edit_tab(model, shared, stroke, "Make real", words, sigma, brush="paint")
            with gr.Tab("Interpolate"):
                _interpolate_tab(model, shared)
    blocks.queue(max_size=16, api_open=False)
    return blocks


def inpaint(model: Model, settings: Settings, image: Tensor | None, drawing: Tensor) -> Tensor:
    """Fill what was drawn over, on an image [1, C, H, W]: the image with the hole in grey, and the result."""
    given, known = _given(image), drawing[3] < 128  # pixels of which at least a half is drawn over
    if bool(known.all()):
        raise ValueError("nothing is drawn on the image; draw over what is to be filled")
    return torch.cat([hidden(given, known), model.inpaint(given, known, **settings)])


def colorize(model: Model, settings: Settings, image: Tensor | None, _: Tensor) -> Tensor:
    """Colours from the grey of an image: the grey, and the result."""
    return torch.cat([grey(_given(image)), model.colorize(image, **settings)])


def superresolve(model: Model, settings: Settings, image: Tensor | None, _: Tensor, factor: int) -> Tensor:
    """An image shrunk by boxes and restored: the small one, the result, the image itself."""
    small = shrink(_given(image), factor)
    return torch.cat([enlarge(small, factor), model.superresolve(small, factor, **settings), _given(image)])


def stroke(model: Model, settings: Settings, image: Tensor | None, drawing: Tensor, sigma: float) -> Tensor:
    """A painting (over an image, or on black) into an image of the model: the painting, and the result."""
    painting = painted(image, drawing, model.image_shape[0])
    return torch.cat([painting, model.stroke(painting, sigma=sigma, **settings)])


def _given(image: Tensor | None) -> Tensor:
    if image is None:
        raise ValueError("there is no image; take a sample or upload one")
    return image


def settings_of(steps: int, label: str, seed: int | None, guidance: float) -> Settings:
    """The keywords that all methods of `Model` share, from what stands on the page."""
    labels = None if label == AUTO else int(label)
    return {"steps": steps, "labels": labels, "seed": checked_seed("seed", seed), "guidance": guidance}


def checked_seed(name: str, seed: int | None) -> int:
    """A seed as it was typed; the other components cannot leave their limits.

    Raises:
        ValueError: if there is none, or it is not one.
    """
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{name} is {seed}; allowed: an integer from 0 to {MAX_SEED}")
    return seed


def answer(model: Model, work: Callable[..., Tensor], *values: Any) -> tuple[Any, str]:
    """What the page shows of a request: images [N, C, H, W] as one picture, or None; and one line."""
    start = time.perf_counter()
    try:
        images = work(*values)
    except ValueError as error:
        return None, first_line(error)
    except Exception as error:  # of the model at work; the page lives on
        log.exception("a request of the page failed")
        return None, f"failed: {first_line(error)}; the terminal has the details"
    milliseconds, calls = 1000 * (time.perf_counter() - start), model.last_evaluations
    evaluations = "1 network evaluation" if calls == 1 else f"{calls} network evaluations"
    return picture(images), f"{milliseconds:.0f} ms, {evaluations}, {model.device}"


def _shared_settings(model: Model) -> list[Any]:
    """Label, seed, guidance, in the order of `settings_of`; what the model lacks is hidden."""
    import gradio as gr

    with gr.Row():
        labels = [AUTO, *map(str, range(model.num_classes))]
        about = "Label (auto: random, or guessed)"
        label = gr.Dropdown(labels, value=AUTO, label=about, visible=len(labels) > 1, elem_id="label")
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        is_guided = model.can_guide
        guidance = gr.Slider(0, MAX_GUIDANCE, 1, step=0.1, label="Guidance", visible=is_guided, elem_id="guidance")
    return [label, seed, guidance]


def _steps(model: Model, name: str, most: int, first: int) -> Any:
    """A slider; diffusion models need more steps for everything."""
    import gradio as gr

    most, first = (most, first) if model.is_consistency else (MAX_STEPS, 18)
    return gr.Slider(1, most, first, step=1, precision=0, label="Steps", elem_id=f"{name}_steps")


def _result(name: str) -> list[Any]:
    """The picture, and the line below it."""
    import gradio as gr

    picture = gr.Image(
        show_label=False, interactive=False, format="png", buttons=["download"],
        elem_id=f"{name}_result", elem_classes="picture",
    )  # fmt: skip
    return [
        picture,
        gr.Textbox(show_label=False, interactive=False, max_lines=1, container=False, elem_id=f"{name}_line"),
    ]


def _on(
    event: Callable[..., Any], model: Model, work: Callable[..., Tensor], inputs: list[Any], result: list[Any]
) -> None:
    """On an event of the page, the picture of what `work` makes of the inputs, and its line."""
    event(lambda *values: answer(model, work, *values), inputs, result, **_QUEUE)


def _sample_tab(model: Model, shared: list[Any]) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column():
            number = gr.Slider(1, MAX_IMAGES, 16, step=1, precision=0, label="Images")
            steps = _steps(model, "sample", 4, 2)
            button = gr.Button("Sample", variant="primary", elem_id="sample_run")
        with gr.Column():
            result = _result("sample")

    def work(number: int, *settings: Any) -> Tensor:
        return model.sample(number, **settings_of(*settings))

    _on(button.click, model, work, [number, steps, *shared], result)


def _interpolate_tab(model: Model, shared: list[Any]) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column():
            second = gr.Number(1, label="Second seed", precision=0, elem_id="second_seed")
            point = gr.Slider(0, 1, 0, step=0.05, label="From the first seed to the second", elem_id="point")
            steps = _steps(model, "interpolate", 4, 2)
            button = gr.Button("Interpolate", variant="primary", elem_id="interpolate_run")
        with gr.Column():
            result = _result("interpolate")

    def work(end: int, place: float, *values: Any) -> Tensor:
        settings = settings_of(*values)
        return model.interpolate(settings.pop("seed"), checked_seed("second seed", end), places=[place], **settings)

    for event in (button.click, point.change):
        _on(event, model, work, [second, point, steps, *shared], result)


def _edit_tab(
    model: Model, shared: list[Any], task: Callable[..., Tensor], verb: str, words: str, *options: Any, brush: str = ""
) -> None:
    """An image to start from (a sample or an upload), options (not rendered yet), a button, the result.

    The image stays on the server as the model's own pixels; the browser draws on an enlarged copy of it.
    """
    import gradio as gr

    image, name = gr.State(None), task.__name__
    with gr.Row():
        with gr.Column():
            gr.Markdown(words)
            board = _board(model, name, brush)
            with gr.Row():
                take = gr.Button("Take a sample", elem_id=f"{name}_take")
                upload = gr.UploadButton("Upload an image", file_types=["image"], elem_id=f"{name}_upload")
            for option in options:
                option.render()
            steps = _steps(model, name, 40, 2 if task is stroke else 39)
            button = gr.Button(verb, variant="primary", elem_id=f"{name}_run")
        with gr.Column():
            result = _result(name)

    def work(image: Tensor | None, drawn: Any, *values: Any) -> Tensor:
        chosen, settings = values[: len(options)], settings_of(*values[len(options) :])
        return task(model, settings, image, read_drawing(drawn, model.image_shape), *chosen)

    def sample(*settings: Any) -> Tensor:
        return model.sample(1, **settings_of(2 if model.is_consistency else 18, *settings))

    def bring(find: Callable[..., Tensor], line: str, *values: Any) -> tuple[Any, ...]:
        try:
            found = find(*values)
        except ValueError as error:
            return gr.skip(), gr.skip(), first_line(error)
        return found, on_board(model, brush, found), line

    def read(path: str) -> Tensor:
        return read_upload(path, model.image_shape)[None]

    outputs = [image, board, result[1]]
    take.click(lambda *values: bring(sample, "a sample", *values), shared, outputs, show_progress="hidden", **_QUEUE)
    upload.upload(lambda path: bring(read, "an upload", path), upload, outputs, show_progress="hidden", **_QUEUE)
    if brush:
        board.clear(lambda image: on_board(model, brush, image), image, board, show_progress="hidden", **_QUEUE)
    _on(button.click, model, work, [image, board, *options, steps, *shared], result)


def on_board(model: Model, brush: str, image: Tensor | None) -> Any:
    """An image [1, C, H, W] as `_board` takes it, without a drawing; black where one paints on nothing."""
    if image is None and brush != "paint":
        return None
    pixels = enlarged(torch.zeros(model.image_shape, dtype=torch.uint8) if image is None else image[0])
    return {"background": pixels, "layers": [], "composite": None} if brush else pixels


def _board(model: Model, name: str, brush: str) -> Any:
    """Gradio's editor for a `mask` or to `paint`; without a brush an image to look at."""
    import gradio as gr

    side = enlarged(torch.zeros(1, *model.image_shape[1:], dtype=torch.uint8)).shape[0]
    if not brush:
        return gr.Image(
            show_label=False,
            interactive=False,
            format="png",
            height=side,
            elem_id=f"{name}_board",
            elem_classes="picture",
        )
    radius = max(side // model.image_shape[2] // 2, side // 32)
    of_strokes = ["#ffffff", "#ff3b30", "#34c759", "#007aff", "#ffcc00", "#000000"]
    colours: list[str | tuple[str, float]] = ["#ff3b30"] if brush == "mask" else [*of_strokes]
    return gr.ImageEditor(
        value=on_board(model, brush, None),
        show_label=False, image_mode="RGBA", format="png", sources=[], transforms=[], layers=False, buttons=[],
        canvas_size=(side, side), fixed_canvas=True, elem_id=f"{name}_board", elem_classes="board",
        brush=gr.Brush(radius, colors=colours, color_mode="fixed" if brush == "mask" else "defaults"),
        eraser=gr.Eraser(radius),
    )  # fmt: skip
