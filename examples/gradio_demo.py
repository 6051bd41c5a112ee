#!/usr/bin/env python3
"""A web page to draw with, made with gradio.

    pip install gradio requests
    python gradio_demo.py --server http://localhost:8091 --port 7860

Needs openai_chat_client.py beside it. API_KEY is the key of the server, if it wants one.
"""

import argparse
import io
import os

import gradio as gr
from PIL import Image

from openai_chat_client import GenerationError, generate_images

EXAMPLES = [
    ["mountains in the mist of an early morning, oil on canvas", "", 1024, 1024, 100, 4.0, 42],
    ["a sleepy cat on a window sill, the sun shines in", "", 1024, 1024, 100, 4.0, 123],
    ["a street of neon signs after the rain, in the year 2100", "out of focus", 1024, 768, 100, 4.0, 456],
    ["a hut in a bamboo grove, brush and ink, with a poem in Chinese", "", 768, 1024, 100, 4.0, 789],
]


def create_demo(server_url: str) -> gr.Blocks:
    def generate(prompt, negative_prompt, height, width, steps, cfg_scale, seed):
        try:
            [file] = generate_images(
                prompt,
                server_url=server_url,
                height=int(height),
                width=int(width),
                steps=int(steps),
                true_cfg_scale=cfg_scale,
                seed=int(seed) if seed is not None and seed >= 0 else None,
                negative_prompt=negative_prompt,
                api_key=os.environ.get("API_KEY"),
            )
            return Image.open(io.BytesIO(file))
        except (GenerationError, ValueError, OSError) as error:
            raise gr.Error(f"Generation failed: {error}", print_exception=False) from error

    with gr.Blocks(title="Qwen-Image Demo", analytics_enabled=False) as demo:
        gr.Markdown("# Qwen-Image\nText to image, drawn by the server at " + server_url)
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", lines=3, placeholder="What to draw")
                negative_prompt = gr.Textbox(
                    label="Negative prompt", lines=2, placeholder="What to steer away from"
                )
                with gr.Row():
                    height = gr.Slider(256, 2048, value=1024, step=64, label="Height")
                    width = gr.Slider(256, 2048, value=1024, step=64, label="Width")
                with gr.Row():
                    steps = gr.Slider(10, 100, value=100, step=5, label="Steps")
                    cfg_scale = gr.Slider(1.0, 20.0, value=4.0, step=0.5, label="True CFG scale")
                seed = gr.Number(value=-1, precision=0, label="Seed (-1 for any)")
                button = gr.Button("Generate Image", variant="primary")
            image = gr.Image(label="Image", type="pil", format="png")
        inputs = [prompt, negative_prompt, height, width, steps, cfg_scale, seed]
        gr.Examples(EXAMPLES, inputs)
        button.click(generate, inputs, image, api_name="generate")
    return demo


def main() -> None:
    parser = argparse.ArgumentParser(description="A web page to draw with.")
    parser.add_argument("--server", default="http://localhost:8091", help="URL of the server")
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    parser.add_argument("--share", action="store_true", help="make a public link, through gradio's servers")
    args = parser.parse_args()
    print(f"Connecting to server: {args.server}", flush=True)
    create_demo(args.server).launch(server_port=args.port, share=args.share)


if __name__ == "__main__":
    main()
