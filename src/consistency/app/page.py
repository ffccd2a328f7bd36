"""The page: one tab a task, shared settings above. Only here, and in `serve`, is Gradio used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consistency.api import STROKE
from consistency.app.pictures import read_board, read_upload, write_board
from consistency.app.studio import AUTO, MAX_GUIDANCE, MAX_IMAGES, MAX_STEPS, Answer, Settings, Studio
from consistency.io.safe_load import first_line

CSS = """
.picture img { image-rendering: pixelated; width: auto !important; max-width: 100%; margin: auto; }
.board canvas { image-rendering: pixelated; border: 1px solid #888; touch-action: none; display: block; }
.board canvas:not([data-mode=view]) { cursor: crosshair; }
.board .tools { display: flex; gap: 1em; align-items: center; margin: .4em 0; }
"""
_BOARD = 320  # width of a board, in screen pixels
_SCRIPT = Path(__file__).with_name("board.js")
_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}


@dataclass(frozen=True)
class _Result:
    picture: Any
    line: Any


def build(studio: Studio) -> Any:
    """The page as Gradio's Blocks; not served yet."""
    import gradio as gr

    with gr.Blocks(title="consistency", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(_headline(studio))
        settings = _settings(studio)
        with gr.Tabs():
            with gr.Tab("Sample"):
                _sample(studio, settings)
            with gr.Tab("Inpaint"):
                _inpaint(studio, settings)
            if studio.channels == 3:
                with gr.Tab("Colorize"):
                    _colorize(studio, settings)
            if studio.factors:
                with gr.Tab("Super-resolve"):
                    _superresolve(studio, settings)
            with gr.Tab("Strokes"):
                _strokes(studio, settings)
            with gr.Tab("Interpolate"):
                _interpolate(studio, settings)
    blocks.queue(max_size=16, api_open=False)
    return blocks


def _headline(studio: Studio) -> str:
    info, size = studio.model.info, f"{studio.width}x{studio.height}"
    weights = f", weights {info['weights']}" if info.get("weights") else ""
    return f"### {info.get('method') or 'model'}{weights}, {size}, {'colour' if studio.channels == 3 else 'grey'}"


def _settings(studio: Studio) -> list[Any]:
    """Label, seed, guidance: the fields of `Settings` after its steps, in order; what the model lacks is hidden."""
    import gradio as gr

    with gr.Row():
        labels = studio.labels()
        label = gr.Dropdown(
            labels or [AUTO],
            value=AUTO,
            label="Label (auto: random, or guessed)",
            visible=bool(labels),
            elem_id="label",
        )
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        can_guide = studio.model.can_guide
        guidance = gr.Slider(0, MAX_GUIDANCE, 1, step=0.1, label="Guidance", visible=can_guide, elem_id="guidance")
    return [label, seed, guidance]


def _steps(studio: Studio, name: str, most: int, first: int) -> Any:
    """A slider; diffusion models need more steps for everything."""
    import gradio as gr

    most, first = (most, first) if studio.model.is_consistency else (MAX_STEPS, 18)
    return gr.Slider(1, most, first, step=1, label="Steps", elem_id=f"{name}_steps")


def _sample(studio: Studio, settings: list[Any]) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column():
            number = gr.Slider(1, MAX_IMAGES, 16, step=1, label="Images")
            steps = _steps(studio, "sample", 4, 2)
            button = gr.Button("Sample", variant="primary", elem_id="sample_run")
        with gr.Column():
            result = _result("sample")
    _on(button.click, lambda number, *rest: studio.sample(number, Settings(*rest)), [number, steps, *settings], result)


def _inpaint(studio: Studio, settings: list[Any]) -> None:
    def answer(board: Any, *rest: Any) -> Answer:
        return studio.inpaint(*read_board(board, studio.shape), Settings(*rest))

    _editor(studio, settings, "inpaint", "Fill", "mask", "Draw over what the model is to fill.", answer)


def _colorize(studio: Studio, settings: list[Any]) -> None:
    def answer(board: Any, *rest: Any) -> Answer:
        return studio.colorize(read_board(board, studio.shape)[0], Settings(*rest))

    _editor(studio, settings, "colorize", "Colorize", "view", "The model sees the grey of this image only.", answer)


def _superresolve(studio: Studio, settings: list[Any]) -> None:
    import gradio as gr

    def answer(board: Any, factor: Any, *rest: Any) -> Answer:
        return studio.superresolve(read_board(board, studio.shape)[0], factor, Settings(*rest))

    factor = gr.Radio(list(map(str, studio.factors)), value=str(studio.factors[0]), label="Factor", render=False)
    words = "The image is shrunk by the factor; the model sees the small one only."
    _editor(studio, settings, "superresolve", "Super-resolve", "view", words, answer, factor)


def _strokes(studio: Studio, settings: list[Any]) -> None:
    import gradio as gr

    def answer(board: Any, sigma: Any, *rest: Any) -> Answer:
        return studio.stroke(*read_board(board, studio.shape), sigma, Settings(*rest))

    words = "The more noise, the less of the painting stays."
    first = round(STROKE * studio.width / 256, 2)
    sigma = gr.Slider(0.01, 10, first, step=0.01, label="Noise level", info=words, elem_id="level", render=False)
    about = "Paint, on black or on an image."
    _editor(studio, settings, "stroke", "Make real", "paint", about, answer, sigma, first_steps=2)


def _interpolate(studio: Studio, settings: list[Any]) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column():
            second = gr.Number(1, label="Second seed", precision=0, elem_id="second_seed")
            point = gr.Slider(0, 1, 0, step=0.05, label="From the first seed to the second", elem_id="point")
            steps = _steps(studio, "interpolate", 4, 2)
            button = gr.Button("Interpolate", variant="primary", elem_id="interpolate_run")
        with gr.Column():
            result = _result("interpolate")

    def answer(second: Any, point: Any, *rest: Any) -> Answer:
        return studio.interpolate(second, point, Settings(*rest))

    for event in (button.click, point.change):
        _on(event, answer, [second, point, steps, *settings], result)


def _editor(
    studio: Studio,
    settings: list[Any],
    name: str,
    verb: str,
    mode: str,
    words: str,
    answer: Callable[..., Answer],
    *options: Any,
    first_steps: int = 39,
) -> None:
    """An image to start from (a sample or an upload) on a board, options (not rendered yet), a button, the result."""
    import gradio as gr

    with gr.Row():
        with gr.Column():
            gr.Markdown(words)
            board = _board(studio, mode, f"{name}_board")
            with gr.Row():
                take = gr.Button("Take a sample", elem_id=f"{name}_take")
                upload = gr.UploadButton("Upload an image", file_types=["image"], elem_id=f"{name}_upload")
            for option in options:
                option.render()
            steps = _steps(studio, name, 40, first_steps)
            run = gr.Button(verb, variant="primary", elem_id=f"{name}_run")
        with gr.Column():
            result = _result(name)

    def sampled(*rest: Any) -> tuple[Any, str]:
        answer = studio.sample(1, Settings(*rest))
        return (gr.skip() if answer.images is None else write_board(answer.images[0])), answer.line

    def uploaded(path: str) -> tuple[Any, str]:
        try:
            return write_board(read_upload(path, studio.shape)), "an upload"
        except ValueError as error:
            return gr.skip(), first_line(error)

    take.click(sampled, [gr.State(2 if studio.model.is_consistency else 18), *settings], [board, result.line], **_QUEUE)
    upload.upload(uploaded, upload, [board, result.line], **_QUEUE)
    _on(run.click, answer, [board, *options, steps, *settings], result)


def _board(studio: Studio, mode: str, name: str) -> Any:
    """A canvas of the model's own pixels (`board.js`); `mode`: mask, paint or view."""
    import gradio as gr

    colour = '<label>Colour <input class="colour" type="color" value="#ffffff"></label>' if mode == "paint" else ""
    tools = f"""<div class="tools">{colour}
        <label>Brush <input class="size" type="range" min="1" max="{max(studio.width // 2, 1)}"
            value="{max(studio.width // 16, 1)}"></label>
        <label><input class="erase" type="checkbox"> Erase</label>
        <button class="clear" type="button">Clear</button></div>"""
    shown = max(_BOARD // studio.width, 1) * studio.width  # whole screen pixels for each of the model's
    canvas = f'<canvas width="{studio.width}" height="{studio.height}" data-mode="{mode}" '
    canvas += f'style="width: {shown}px" aria-label="{name}"></canvas>'
    return gr.HTML(
        value=write_board(None),
        html_template=canvas + (tools if mode != "view" else ""),
        js_on_load=_SCRIPT.read_text(),
        elem_id=name,
        elem_classes="board",
    )


def _result(name: str) -> _Result:
    import gradio as gr

    picture = gr.Image(
        show_label=False, interactive=False, format="png", elem_id=f"{name}_result", elem_classes="picture",
        buttons=["download"],
    )  # fmt: skip
    line = gr.Textbox(show_label=False, interactive=False, max_lines=1, elem_id=f"{name}_line", container=False)
    return _Result(picture, line)


def _on(event: Callable[..., Any], answer: Callable[..., Answer], inputs: list[Any], result: _Result) -> None:
    """On an event of the page, the answer's picture and its line; a refused request leaves no picture behind."""

    def respond(*values: Any) -> tuple[Any, str]:
        try:
            given = answer(*values)
        except ValueError as error:  # of what the browser sent: the studio itself raises nothing
            return None, first_line(error)
        return given.picture(), given.line

    event(respond, inputs, [result.picture, result.line], **_QUEUE)
