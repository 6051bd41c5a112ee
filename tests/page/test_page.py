"""Tests the web page of `kiln serve` with the demo model in headless Chromium.

Usage: python test_page.py path/to/kiln [name of a test ...]

CHROMIUM is the path of the browser, by default /usr/bin/chromium. With KILN_SCREENSHOTS=FOLDER the
screenshots of docs/serving.md are written to the folder instead of testing.
"""

import contextlib
import json
import os
import pathlib
import re
import struct
import sys
import tempfile
import time
import urllib.parse

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from servers import Hub, OtherClient, Server

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
# Milliseconds; a development build may be slow on a busy machine.
TIMEOUT = 30_000
RED, BLUE, YELLOW, PURPLE = (214, 40, 44), (38, 84, 204), (252, 222, 64), (136, 52, 164)
A_STEP = re.compile(r"Step \d+ of 1000")
CIRCLE = "a large red circle on a blue background"
SQUARE = "a small yellow square in the top left corner on a purple background"
# Controls that cannot be touched: outside the window, too small, or covered.
OUT_OF_REACH = """[...document.querySelectorAll('button, a:not(.skip), input, select, textarea, summary')]
    .filter((control) => control.checkVisibility())
    .filter((control) => {
        control.scrollIntoView({ block: 'center', behavior: 'instant' });
        const { left, right, top, bottom } = control.getBoundingClientRect();
        const there = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
        return left < 0 || right > innerWidth || bottom - top < 24 || !(control.contains(there));
    })
    .map((control) => control.outerHTML)"""
SCREENSHOT_PROMPTS = [
    CIRCLE,
    "black background with a tiny orange circle on the right",
    SQUARE,
    "a big white triangle at the bottom on a green background",
]

expect.set_options(timeout=TIMEOUT)


@contextlib.contextmanager
def opened(browser: Browser, server: Server, expected_messages: tuple[str, ...] = (), **options):
    """Opens the page in a new context. Afterwards checks that the console has no messages but those
    that contain a text of `expected_messages`, and that all requests went to the server."""
    options = {"viewport": {"width": 1280, "height": 800}, **options}
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT)
    page = context.new_page()
    messages, hosts = [], set()
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: messages.append(f"exception: {error}"))
    page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url)[:2]))
    page.goto(server.url)
    yield page
    unexpected = [line for line in messages if not any(text in line for text in expected_messages)]
    assert not unexpected, unexpected
    hosts = {host for host in hosts if host[0] != "blob"}
    assert hosts == {("http", f"127.0.0.1:{server.port}")}, hosts
    context.close()


def set_numbers(page: Page, **values: object) -> None:
    """Fills in fields under "More settings"."""
    page.locator("#more").evaluate("details => details.open = true")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))


def draw(page: Page, prompt: str | None = None) -> None:
    """Presses Draw and waits for the picture."""
    if prompt is not None:
        page.fill("#prompt", prompt)
    page.click("#draw")
    wait_for_picture(page)


def wait_for_picture(page: Page) -> None:
    """Waits until a drawn picture is shown."""
    expect(page.locator("#draw")).not_to_have_attribute("aria-disabled", "true")
    expect(page.locator("#stage")).to_have_attribute("data-state", "done")
    page.wait_for_function("document.querySelector('#picture').complete")


def colour(page: Page, x: float, y: float) -> tuple[int, int, int]:
    """The colour of a pixel of the shown picture; x and y are from 0 to 1."""
    return tuple(page.evaluate(
        """([x, y]) => {
            const image = document.querySelector('#picture');
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            return [...context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3);
        }""",
        [x, y],
    ))


def assert_colour(page: Page, x: float, y: float, expected: tuple[int, int, int]) -> None:
    """Waits until a pixel has a colour, as a chosen picture takes time to load."""
    deadline = time.monotonic() + TIMEOUT / 1000
    while True:
        seen = colour(page, x, y)
        if max(abs(a - b) for a, b in zip(seen, expected)) < 48:
            return
        assert time.monotonic() < deadline, f"{seen} at {x}, {y} instead of {expected}"
        page.wait_for_timeout(50)


def expect_pictures(page: Page, count: int) -> None:
    """Waits until the history has `count` pictures."""
    expect(page.locator("#pictures li")).to_have_count(count)


def assert_fits(page: Page) -> None:
    """Checks that the page is not wider than the window."""
    width, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= room, f"the page is {width} pixels wide, the window {room}"


def assert_accessible(page: Page, state: str) -> None:
    """Checks the page with axe."""
    found = Axe().run(page).response["violations"]
    found = [(v["id"], v["impact"], [node["html"] for node in v["nodes"]]) for v in found]
    assert not found, f"{state}: {json.dumps(found, indent=1)}"


def test_a_picture_is_drawn_and_can_be_downloaded(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page:
        expect(page.locator("#server")).to_have_text("demo is ready")
        expect(page.locator("#forecast")).to_contain_text("Starts at once")
        page.evaluate(
            """() => {
                window.seen = { texts: [], values: [], previews: 0, said: [] };
                const text = document.querySelector('#progress-text');
                const bar = document.querySelector('#bar');
                const image = document.querySelector('#picture');
                const live = document.querySelector('#live');
                new MutationObserver(() => {
                    seen.texts.push(text.textContent);
                    if (bar.hasAttribute('value')) seen.values.push(bar.value);
                }).observe(text, { childList: true });
                image.addEventListener('load', () => {
                    seen.previews += image.classList.contains('preview') ? 1 : 0;
                });
                new MutationObserver(() => seen.said.push(live.textContent)).observe(live, { childList: true });
            }"""
        )
        set_numbers(page, steps=20, seed=42)
        draw(page, CIRCLE)

        expect(page.locator("#live")).to_have_text("1 picture is drawn.")
        seen = page.evaluate("seen")
        assert seen["values"] == sorted(seen["values"]) and seen["values"][-1] == 1, seen
        assert "Step 1 of 20" in seen["texts"], seen
        assert seen["previews"] >= 1, seen
        assert seen["said"][0] == "Drawing." and seen["said"][-1] == "1 picture is drawn.", seen
        assert_colour(page, 0.5, 0.5, RED)
        for corner in [(0.05, 0.05), (0.95, 0.05), (0.05, 0.95), (0.95, 0.95)]:
            assert_colour(page, *corner, BLUE)
        assert page.get_attribute("#picture", "alt") == CIRCLE
        for fact in ["128 × 128", "20 steps", "guidance 4", "seed 42", "demo"]:
            expect(page.locator("#facts")).to_contain_text(fact)

        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == "a-large-red-circle-on-a-blue-background-42.png"
        file = pathlib.Path(download.value.path()).read_bytes()
        assert struct.unpack(">II", file[16:24]) == (128, 128)
        body = {
            "prompt": CIRCLE, "num_inference_steps": 20, "seed": 42, "negative_prompt": " ",
            "response_format": "file",
        }
        assert file == server.request("/v1/images/generations", body)


def test_several_pictures_of_another_shape(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page:
        page.get_by_role("radio", name="16:9").check()
        shape = page.text_content("#size-text")
        set_numbers(page, steps=4, images=3)
        draw(page, CIRCLE)
        expect_pictures(page, 3)
        expect(page.locator("#facts")).to_contain_text("1 of 3")
        expect(page.locator("#facts")).to_contain_text(shape)
        width, height = (int(side) for side in shape.split(" × "))
        size = page.evaluate("(({ naturalWidth: w, naturalHeight: h }) => [w, h])(picture)")
        assert size == [width, height] and abs(width / height - 16 / 9) < 0.2, size
        first = page.evaluate("picture.src")
        page.get_by_role("button", name="2 of 3").click()
        expect(page.locator("#facts")).to_contain_text("2 of 3")
        assert page.evaluate("picture.src") != first
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename.endswith("-2.png")


def test_a_long_drawing_can_be_cancelled(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page:
        set_numbers(page, steps=1000)
        page.fill("#prompt", CIRCLE)
        page.click("#draw")
        expect(page.locator("#progress-text")).to_contain_text(A_STEP)
        assert server.metric("kiln_requests_running") == 1
        # A second click has no effect while a picture is drawn.
        page.click("#draw", force=True)
        page.click("#cancel")
        server.wait_until("kiln_requests_running", 0)
        server.wait_until('kiln_requests_total{outcome="cancelled"}', 1)
        expect(page.locator("#stage")).to_have_attribute("data-state", "empty")
        expect(page.locator("#draw")).to_be_focused()
        expect(page.locator("#live")).to_have_text("Cancelled.")
        set_numbers(page, steps=2)
        draw(page)
        set_numbers(page, steps=1000)
        page.click("#draw")
        expect(page.locator("#progress-text")).to_contain_text(A_STEP)
    # Closing the window cancels, too.
    server.wait_until("kiln_requests_running", 0)
    server.wait_until('kiln_requests_total{outcome="cancelled"}', 2)


def test_error_messages_of_the_server_are_shown_at_their_field(browser: Browser, server: Server) -> None:
    with opened(browser, server, expected_messages=("status of 400",)) as page:
        page.fill("#prompt", CIRCLE)
        for name, value, body in [
            ("width", "1", {"width": 1, "height": 128}),
            ("height", "100000", {"width": 128, "height": 100000}),
            ("steps", "0", {"num_inference_steps": 0}),
            ("images", "99", {"n": 99}),
            ("scale", "-1", {"true_cfg_scale": -1}),
            ("seed", "many", {"seed": "many"}),
            ("seed", "18446744073709551616", {"seed": 18446744073709551616}),
        ]:
            if name in ("width", "height"):
                page.get_by_role("radio", name="Other").check()
            else:
                page.locator("#more").evaluate("details => details.open = true")
            before = page.input_value(f"#{name}")
            page.fill(f"#{name}", value)
            page.click("#draw")
            answer = json.loads(server.request("/v1/images/generations", {"prompt": CIRCLE, **body}))
            message = answer["error"]["message"]
            expect(page.locator("#error-text")).to_have_text(message)
            field = page.locator(f"#{name}")
            expect(field).to_have_attribute("aria-invalid", "true")
            expect(field).to_be_focused()
            described = field.get_attribute("aria-describedby").split()
            assert any(page.text_content(f"#{id}") == message for id in described), described
            field.fill(before)
            expect(field).not_to_have_attribute("aria-invalid", "true")
        # The largest seed exceeds the integers that JavaScript represents exactly.
        set_numbers(page, steps=1, seed=2**64 - 1)
        draw(page)
        expect(page.locator("#facts")).to_contain_text("seed 18446744073709551615")
        page.fill("#prompt", "  ")
        page.click("#draw")
        expect(page.locator("#prompt-error")).to_contain_text("Say what to draw")
        expect(page.locator("#prompt")).to_be_focused()


def test_a_step_cache_is_a_setting(browser: Browser, server: Server) -> None:
    with opened(browser, server, expected_messages=("status of 400",)) as page:
        set_numbers(page, steps=7, seed=7)
        expect(page.locator("#cache")).to_have_value("off")
        page.select_option("#cache", "fast")
        expect(page.locator("#more-text")).to_contain_text("step cache")
        page.fill("#prompt", CIRCLE)
        page.click("#draw")
        expect(page.locator("#cache-error")).to_contain_text("cache needs at least 8 steps, got 7")
        expect(page.locator("#cache")).to_be_focused()
        set_numbers(page, steps=10)
        draw(page, CIRCLE)
        page.select_option("#cache", "off")
        page.click("#reuse")
        expect(page.locator("#cache")).to_have_value("fast")


def test_settings_come_back_from_the_history(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page:
        page.get_by_role("radio", name="3:4").check()
        set_numbers(page, steps=12, seed=7, scale=3.5, negative="circle")
        draw(page, SQUARE)
        assert_colour(page, 0.27, 0.27, YELLOW)
        tall = page.text_content("#size-text")
        page.get_by_role("radio", name="1:1").check()
        set_numbers(page, steps=3, scale=1, negative="")
        page.click("#random-seed")
        draw(page, CIRCLE)
        expect(page.locator("#facts")).to_contain_text("no guidance")

        page.reload()
        page.get_by_role("button", name=SQUARE).filter(has=page.locator("img")).click()
        assert_colour(page, 0.95, 0.95, PURPLE)
        page.click("#reuse")
        values = {name: page.input_value(f"#{name}") for name in ["prompt", "steps", "seed", "scale", "negative", "images"]}
        assert values == {
            "prompt": SQUARE, "steps": "12", "seed": "7", "scale": "3.5", "negative": "circle", "images": "1",
        }, values
        assert page.text_content("#size-text") == tall
        expect(page.get_by_role("radio", name="3:4")).to_be_checked()
        page.click("#remove")
        expect_pictures(page, 1)
        page.once("dialog", lambda dialog: dialog.accept())
        page.click("#clear")
        expect(page.locator("#history")).to_be_hidden()
        page.reload()
        expect(page.locator("#server")).to_have_text("demo is ready")
        expect_pictures(page, 0)

    # Another session has its own history.
    with opened(browser, server) as page:
        expect(page.locator("#server")).to_have_text("demo is ready")
        expect_pictures(page, 0)


def test_the_history_is_limited(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page:
        page.get_by_role("radio", name="Other").check()
        page.fill("#width", "16")
        page.fill("#height", "16")
        set_numbers(page, steps=1, images=10)
        for seed in range(11):
            set_numbers(page, seed=seed)
            draw(page, CIRCLE)
        expect_pictures(page, 100)
        page.reload()
        expect(page.locator("#facts")).to_contain_text("seed 10")
        expect_pictures(page, 100)
        expect(page.locator("#pictures img[alt$='seed 1']")).to_have_count(10)
        expect(page.locator("#pictures img[alt$='seed 0']")).to_have_count(0)


def write_adapter(path: pathlib.Path, value: float, recipe: dict | None = None) -> None:
    """An adapter of one layer of the demo model, and the recipe beside it."""
    config = json.loads((ROOT / "models/demo/transformer/config.json").read_text())
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.lora_A.weight": [2, dim], f"{layer}.lora_B.weight": [dim, 2]}
    header, data = {}, b""
    for name, shape in tensors.items():
        part = struct.pack("<f", value) * (2 * dim)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    if recipe:
        path.with_suffix(".json").write_text(json.dumps(recipe))


def test_adapters_are_chosen_with_their_weights_and_recipes(browser: Browser, binary: str) -> None:
    quick = {"name": "quick", "steps": 4, "shift": 3, "true_cfg_scale": 1}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_adapter(root / "ink.safetensors", 0.2)
        write_adapter(root / "fast.safetensors", 0.1, quick)
        write_adapter(root / "other.safetensors", 0.1, {**quick, "name": "slow", "steps": 9})
        arguments = ["--lora-dir", folder, "--enable-lora-updates"]
        expected = ("status of 400",)
        with Server(binary, *arguments) as server, opened(browser, server, expected) as page:
            expect(page.locator("#server")).to_have_text("demo is ready")
            page.locator("#more").evaluate("details => details.open = true")
            ink, fast, other = (page.get_by_role("checkbox", name=name) for name in ["ink", "fast", "other"])
            weight = page.get_by_role("slider", name="Weight of ink")
            expect(weight).to_be_hidden()
            assert (page.input_value("#steps"), page.input_value("#scale")) == ("50", "4")

            # Steps and guidance follow the recipe, until they are changed.
            fast.check()
            expect(page.locator("#recipe")).to_have_text("4 steps and no guidance, as quick asks.")
            assert (page.input_value("#steps"), page.input_value("#scale")) == ("4", "1")
            expect(page.locator("#more-text")).to_have_text("4 steps, no guidance")
            fast.uncheck()
            expect(page.locator("#recipe")).to_be_empty()
            assert (page.input_value("#steps"), page.input_value("#scale")) == ("50", "4")
            page.fill("#steps", "5")
            fast.check()
            assert (page.input_value("#steps"), page.input_value("#scale")) == ("5", "1")
            expect(page.locator("#recipe")).to_have_text("No guidance, as quick asks. The recipe quick asks for 4 steps.")

            # Several at once, with a weight.
            ink.check()
            expect(weight).to_have_value("1")
            weight.fill("0.35")
            assert_accessible(page, "adapters")
            with page.expect_request("**/v1/chat/completions") as sent:
                page.fill("#seed", "7")
                draw(page, CIRCLE)
            chosen = [{"name": "fast", "scale": 1}, {"name": "ink", "scale": 0.35}]
            assert sent.value.post_data_json["loras"] == chosen
            for fact in ["fast 1", "ink 0.35", "5 steps", "no guidance"]:
                expect(page.locator("#facts")).to_contain_text(fact)

            # The history has them.
            ink.uncheck()
            fast.uncheck()
            page.reload()
            expect(page.locator("#facts")).to_contain_text("ink 0.35")
            expect(ink).not_to_be_checked()
            page.click("#reuse")
            expect(ink).to_be_checked()
            expect(weight).to_have_value("0.35")
            assert page.input_value("#steps") == "5"

            # Errors are shown at the list.
            other.check()
            page.click("#draw")
            expect(page.locator("#adapters-error")).to_contain_text("different recipes, quick and slow")
            expect(fast).to_be_focused()
            assert_accessible(page, "adapters, error")
            other.uncheck()
            expect(page.locator("#adapters-error")).to_be_empty()

            # A new file.
            write_adapter(root / "late.safetensors", 0.1)
            page.click("#refresh-adapters")
            expect(page.get_by_role("checkbox", name="late")).to_be_visible()
            expect(ink).to_be_checked()
            expect(page.locator("#live")).to_contain_text("adapters can be used.")


def test_adapters_on_a_phone_and_without_updates(browser: Browser, server: Server) -> None:
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    with opened(browser, server, **phone) as page:
        page.get_by_role("checkbox", name="stripes").tap()
        expect(page.get_by_role("slider", name="Weight of stripes")).to_be_visible()
        expect(page.locator("#refresh-adapters")).to_be_hidden()
        assert_fits(page)
        assert page.evaluate(OUT_OF_REACH) == []
        set_numbers(page, steps=2)
        page.fill("#prompt", CIRCLE)
        page.tap("#draw")
        wait_for_picture(page)
        expect(page.locator("#facts")).to_contain_text("stripes 1")


def test_a_server_without_adapters_shows_none(browser: Browser, binary: str) -> None:
    folder = ROOT / "tests/fixtures/checkpoints/base"
    with Server(binary, str(folder)) as server, opened(browser, server) as page:
        expect(page.locator("#fields")).to_be_visible()
        expect(page.locator("#adapters")).to_be_hidden()


def test_the_words_of_the_demo_model(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page:
        guide = json.loads(server.request("/v1/status"))["prompt_guide"]
        for example in guide["examples"]:
            page.get_by_role("button", name=example, exact=True).click()
            assert page.input_value("#prompt") == example
        page.fill("#prompt", "a  on a red background")
        page.locator("#prompt").evaluate("prompt => prompt.setSelectionRange(2, 2)")
        page.get_by_text("All the words it knows").click()
        for word in ["big", "white", "triangle"]:
            page.get_by_role("button", name=word, exact=True).click()
        assert page.input_value("#prompt") == "a big white triangle on a red background"
        shown = page.locator("#words button").all_text_contents()
        assert shown == [word for group in guide["words"] for word in group["words"]]


def test_sizes_and_limits_come_from_the_server(browser: Browser, binary: str) -> None:
    folder = ROOT / "tests/fixtures/checkpoints/base"
    arguments = [str(folder), "--max-steps", "30", "--max-num-images", "2"]
    with Server(binary, *arguments) as server, opened(browser, server) as page:
        status = json.loads(server.request("/v1/status"))
        defaults, limits = status["defaults"], status["limits"]
        assert (limits["max_steps"], limits["max_num_images"]) == (30, 2)
        expect(page.locator("#size-text")).to_have_text(f"{defaults['width']} × {defaults['height']}")
        expect(page.locator("#guide")).to_be_hidden()
        expect(page.locator("#steps")).to_have_attribute("max", "30")
        expect(page.locator("#images")).to_have_attribute("max", "2")
        for name in ["4:3", "3:4", "16:9", "9:16"]:
            page.get_by_role("radio", name=name).check()
            for side in ["width", "height"]:
                value = int(page.input_value(f"#{side}"))
                assert value % limits["side_multiple"] == 0
                assert limits["side_multiple"] <= value <= limits["max_side"]


def test_the_page_works_with_the_keyboard_alone(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page:
        expect(page.locator("#server")).to_have_text("demo is ready")

        def tab_to(id: str, key: str = "Tab") -> None:
            for _ in range(60):
                page.keyboard.press(key)
                if page.evaluate("document.activeElement.id") == id:
                    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                    assert outline != "none", f"#{id} does not show that it has the focus"
                    return
            raise AssertionError(f"#{id} cannot be reached")

        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        tab_to("prompt")
        page.keyboard.type(CIRCLE)
        page.keyboard.press("Tab")
        while page.evaluate("document.activeElement.name") != "ratio":
            page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("radio", name="4:3")).to_be_checked()
        page.keyboard.press("ArrowLeft")
        tab_to("adapter-0")
        page.keyboard.press("Space")
        tab_to("adapter-weight-0")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#adapter-weight-0")).to_have_value("0.95")
        tab_to("adapter-0", "Shift+Tab")
        page.keyboard.press("Space")
        while page.evaluate("document.activeElement.localName") != "summary":
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        tab_to("steps")
        page.keyboard.press("Control+A")
        page.keyboard.type("1000")
        tab_to("draw")
        page.keyboard.press("Enter")
        expect(page.locator("#progress-text")).to_contain_text(A_STEP)
        tab_to("cancel")
        page.keyboard.press("Enter")
        expect(page.locator("#draw")).to_be_focused()
        tab_to("steps", "Shift+Tab")
        page.keyboard.press("Control+A")
        page.keyboard.type("20")
        tab_to("prompt", "Shift+Tab")
        page.keyboard.press("Enter")
        wait_for_picture(page)
        assert page.input_value("#prompt") == CIRCLE
        assert_colour(page, 0.5, 0.5, RED)
        expect(page.locator("#prompt")).to_be_focused()
        tab_to("download")
        with page.expect_download():
            page.keyboard.press("Enter")
        tab_to("reuse")
        page.keyboard.press("Enter")
        expect(page.locator("#draw")).to_be_focused()


def test_the_page_works_on_a_phone(browser: Browser, server: Server) -> None:
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    with opened(browser, server, **phone) as page:
        expect(page.locator("#forecast")).to_contain_text("Starts at once")
        assert_fits(page)
        page.get_by_text("All the words it knows").tap()
        page.get_by_role("radio", name="Other").check()
        set_numbers(page, steps=1000)
        assert_fits(page)
        page.fill("#prompt", SQUARE)
        page.tap("#draw")
        expect(page.locator("#progress-text")).to_contain_text(A_STEP)
        expect(page.locator("#progress-text")).to_be_in_viewport()
        expect(page.locator("#cancel")).to_be_in_viewport()
        assert_fits(page)
        page.tap("#cancel")
        expect(page.locator("#draw")).to_be_enabled()
        set_numbers(page, steps=8)
        page.tap("#draw")
        wait_for_picture(page)
        assert_fits(page)
        expect(page.locator("#picture")).to_be_in_viewport()
        shown = page.locator("#picture").bounding_box()
        assert shown["width"] > 300, shown
        # Every control can be touched and is large enough.
        assert page.evaluate(OUT_OF_REACH) == []


def test_accessible_in_every_state_and_both_schemes(browser: Browser, server: Server) -> None:
    grounds = {}
    for scheme in ["light", "dark"]:
        with opened(browser, server, expected_messages=("status of 400",), color_scheme=scheme) as page:
            expect(page.locator("#server")).to_have_text("demo is ready")
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert_accessible(page, f"{scheme}, empty")
            page.get_by_text("All the words it knows").click()
            page.get_by_role("radio", name="Other").check()
            page.get_by_text("More settings").click()
            assert_accessible(page, f"{scheme}, all open")
            set_numbers(page, steps=2)
            draw(page, CIRCLE)
            assert_accessible(page, f"{scheme}, done")
            set_numbers(page, steps=1000)
            page.click("#draw")
            expect(page.locator("#progress-text")).to_contain_text(A_STEP)
            assert_accessible(page, f"{scheme}, drawing")
            expect(page.locator("#stage")).to_have_attribute("data-state", "drawing")
            page.click("#cancel")
            # The previous picture is shown again.
            expect(page.locator("#stage")).to_have_attribute("data-state", "done")
            page.fill("#width", "1")
            page.click("#draw")
            expect(page.locator("#error")).to_be_visible()
            assert_accessible(page, f"{scheme}, error")
    light, dark = (sum(map(int, grounds[scheme][4:-1].split(","))) for scheme in ["light", "dark"])
    assert light > 600 and dark < 120, grounds


def test_reduced_motion_is_respected(browser: Browser, server: Server) -> None:
    moving = """[...document.querySelectorAll('*')].filter((element) => {
        const { transitionDuration, animationName, scrollBehavior } = getComputedStyle(element);
        return transitionDuration !== '0s' || animationName !== 'none' || scrollBehavior !== 'auto';
    }).length"""
    for motion, expected in [("reduce", False), ("no-preference", True)]:
        with opened(browser, server, reduced_motion=motion) as page:
            expect(page.locator("#server")).to_have_text("demo is ready")
            assert (page.evaluate(moving) > 0) == expected, motion


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, binary: str) -> None:
    with Server(binary, key="right-key") as server:
        with opened(browser, server, expected_messages=("status of 401",)) as page:
            expect(page.locator("#key-card")).to_be_visible()
            expect(page.locator("#server")).to_contain_text("needs a key")
            expect(page.locator("#fields")).to_be_hidden()
            assert_accessible(page, "key")
            page.fill("#key", "wrong-key")
            page.click("#use-key")
            expect(page.locator("#key-error")).to_contain_text("Authorization: Bearer KEY")
            page.fill("#key", "right-key")
            page.keyboard.press("Enter")
            expect(page.locator("#server")).to_have_text("demo is ready")
            expect(page.locator("#key-card")).to_be_hidden()
            set_numbers(page, steps=2)
            draw(page, CIRCLE)
            page.reload()
            expect(page.locator("#server")).to_have_text("demo is ready")
            assert page.evaluate("Object.values(sessionStorage).includes('right-key')")
            assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
            assert "right-key" not in page.content()
            page.click("#forget-key")
            expect(page.locator("#key-card")).to_be_visible()
            assert not page.evaluate("Object.values(sessionStorage).includes('right-key')")


def test_the_wait_is_shown_before_and_while_waiting(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page, OtherClient(server) as other, OtherClient(server) as another:
        server.wait_until("kiln_requests_running", 1)
        server.wait_until("kiln_requests_waiting", 1)
        page.fill("#prompt", CIRCLE)
        set_numbers(page, steps=1000)
        forecast = page.locator("#forecast")
        expect(forecast).to_contain_text("2 pictures come before yours; it starts in")
        expect(forecast).to_contain_text("and takes about")
        # A small request would not wait.
        set_numbers(page, steps=10)
        expect(forecast).to_contain_text("Starts at once")
        set_numbers(page, steps=1000)
        page.click("#draw")
        expect(page.locator("#progress-text")).to_contain_text("2 pictures come before yours")
        other.hang_up()
        expect(page.locator("#progress-text")).to_contain_text("1 picture comes before yours")
        another.hang_up()
        expect(page.locator("#progress-text")).to_contain_text(A_STEP)
        page.click("#cancel")
        server.wait_until("kiln_requests_running", 0)


def test_draw_waits_for_a_full_queue(browser: Browser, binary: str) -> None:
    with Server(binary, "--max-queue", "0") as server, OtherClient(server) as other:
        server.wait_until("kiln_requests_running", 1)
        with opened(browser, server, expected_messages=("status of 429",)) as page:
            set_numbers(page, steps=2)
            expect(page.locator("#forecast")).to_contain_text("The queue is full")
            page.fill("#prompt", CIRCLE)
            page.click("#draw")
            expect(page.locator("#progress-text")).to_contain_text("no more are taken")
            expect(page.locator("#progress-text")).to_contain_text("Trying again within")
            page.click("#cancel")
            expect(page.locator("#stage")).to_have_attribute("data-state", "empty")
            page.click("#draw")
            expect(page.locator("#progress-text")).to_contain_text("Trying again within")
            other.hang_up()
            wait_for_picture(page)


def test_the_page_recovers_when_the_server_restarts(browser: Browser, binary: str) -> None:
    expected = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET")
    with Server(binary) as server, opened(browser, server, expected_messages=expected) as page:
        set_numbers(page, steps=1000)
        page.fill("#prompt", CIRCLE)
        page.click("#draw")
        expect(page.locator("#progress-text")).to_contain_text(A_STEP)
        server.kill()
        expect(page.locator("#error-text")).to_contain_text("ended before the picture was finished")
        expect(page.locator("#server")).to_contain_text("does not answer")
        page.click("#again")
        expect(page.locator("#error-text")).to_contain_text("The server does not answer")
        server.start()
        expect(page.locator("#server")).to_have_text("demo is ready")
        set_numbers(page, steps=2)
        page.click("#again")
        wait_for_picture(page)


def test_the_page_shows_the_start_and_is_usable_after_it(browser: Browser, binary: str) -> None:
    weights = "transformer/diffusion_pytorch_model.safetensors"
    hub = Hub("", weights)
    with tempfile.TemporaryDirectory() as home:
        start = dict(wait=False, HF_ENDPOINT=hub.url, HF_HOME=home, HF_HUB_OFFLINE="0")
        expected = ("status of 503",)
        with Server(binary, "own/tiny", **start) as server, opened(browser, server, expected) as page:
            expect(page.locator("#start-title")).to_have_text("The model is being looked for")
            expect(page.locator("#server")).to_contain_text("is starting")
            expect(page.locator("#fields")).to_be_hidden()
            assert_accessible(page, "start")
            hub.gates[""].set()
            expect(page.locator("#start-title")).to_have_text("The model is being downloaded")
            expect(page.locator("#start-text")).to_contain_text(re.compile(r"\d+ %: [\d.]+ MB of [\d.]+ MB"))
            expect(page.locator("#live")).to_have_text("The model is being downloaded.")
            assert 0 < float(page.locator("#start-bar").get_attribute("value")) < 1
            hub.gates[weights].set()
            expect(page.locator("#server")).to_contain_text("own/tiny is ready")
            expect(page.locator("#start")).to_be_hidden()
            set_numbers(page, steps=2)
            draw(page, CIRCLE)


def test_failures_during_a_stream_are_shown(browser: Browser, server: Server) -> None:
    begin = 'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
    step = 'data: {"choices":[],"progress":{"stage":"step","step":1,"steps":4}}\n\n'
    error = 'data: {"error":{"message":"the log says why","type":"server_error","param":null,"code":500}}\n\n'
    with opened(browser, server) as page:
        for body, expected in [
            (begin + step + error + "data: [DONE]\n\n", "the log says why"),
            (begin + step, "The connection ended before the picture was finished."),
            (begin + step + "data: {", "The connection ended before the picture was finished."),
        ]:
            answer = {"body": body, "content_type": "text/event-stream"}
            page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
            page.fill("#prompt", CIRCLE)
            page.click("#draw")
            expect(page.locator("#error-text")).to_have_text(expected)
            expect(page.locator("#again")).to_be_visible()
            page.unroute("**/v1/chat/completions")


def test_jobs_survive_a_reload(browser: Browser, binary: str) -> None:
    with tempfile.TemporaryDirectory() as folder, Server(binary, "--jobs", folder) as server:
        with opened(browser, server, expected_messages=("status of 400",)) as page:
            expect(page.locator("#jobs")).to_be_hidden()
            page.click("#submit-job")
            expect(page.locator("#prompt-error")).to_contain_text("Say what to draw")
            page.fill("#prompt", CIRCLE)
            set_numbers(page, steps=1000, seed="18446744073709551615")
            page.click("#submit-job")
            items = page.locator("#job-list li")
            expect(items).to_have_count(1)
            expect(items.locator(".name")).to_have_text(CIRCLE)
            expect(items.locator(".state")).to_contain_text("%")
            set_numbers(page, steps=4)
            page.click("#submit-job")
            expect(items.first.locator(".state")).to_have_text(re.compile("Waiting|1 picture comes before yours|%"))
            assert_accessible(page, "jobs")
            assert_fits(page)
            page.reload()
            expect(items).to_have_count(2)
            items.nth(1).get_by_role("button", name="Cancel").click()
            expect(items.nth(1).locator(".state")).to_have_text("Cancelled")
            expect(items.first.locator(".state")).to_have_text("Done, 1 picture")
            items.first.get_by_role("button", name="Open").click()
            expect(page.locator("#stage")).to_have_attribute("data-state", "done")
            assert_colour(page, 0.02, 0.02, BLUE)
            expect(page.locator("#facts")).to_contain_text("4 steps")
            expect(page.locator("#facts")).to_contain_text("seed 18446744073709551615")
            # The same picture is not kept twice.
            items.first.get_by_role("button", name="Open").click()
            expect_pictures(page, 1)
            items.nth(1).get_by_role("button", name="Remove").click()
            expect(items).to_have_count(1)
            page.fill("#prompt", CIRCLE)
            set_numbers(page, seed="x")
            page.click("#submit-job")
            expect(page.locator("#seed-error")).not_to_be_empty()


def test_a_server_without_jobs_offers_none(browser: Browser, server: Server) -> None:
    with opened(browser, server) as page:
        expect(page.locator("#server")).to_contain_text("is ready")
        expect(page.locator("#submit-job")).to_be_hidden()
        expect(page.locator("#jobs")).to_be_hidden()


def make_screenshots(browser: Browser, server: Server) -> None:
    folder = pathlib.Path(os.environ["KILN_SCREENSHOTS"])
    with opened(browser, server, viewport={"width": 1280, "height": 900}, color_scheme="light") as page:
        for seed, prompt in enumerate(SCREENSHOT_PROMPTS, 1):
            set_numbers(page, seed=seed)
            draw(page, prompt)
        page.click("#random-seed")
        page.locator("#more").evaluate("details => details.open = false")
        expect(page.locator("#forecast")).to_contain_text("Starts at once")
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
        page.screenshot(path=folder / "page-desktop.png")
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened(browser, server, color_scheme="dark", **phone) as page:
        set_numbers(page, steps=400, seed=1)
        page.locator("#more").evaluate("details => details.open = false")
        page.fill("#prompt", SQUARE)
        page.tap("#draw")
        expect(page.locator("#progress-text")).to_contain_text(re.compile(r"Step (2[5-9]|3\d)\d of 400"))
        page.locator("#picture.preview").wait_for()
        page.screenshot(path=folder / "page-phone.png")
        page.tap("#cancel")


def main() -> None:
    binary, *names = sys.argv[1:]
    tests = {name[5:]: test for name, test in globals().items() if name.startswith("test_")}
    if "KILN_SCREENSHOTS" in os.environ:
        tests = {"screenshots": make_screenshots}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=FLAGS
        )
        print(f"Chromium {browser.version}")
        for name, test in tests.items():
            if names and name not in names:
                continue
            started = time.monotonic()
            if "server" in test.__annotations__:
                with Server(binary) as server:
                    test(browser, server)
            else:
                test(browser, binary)
            print(f"page: {name.replace('_', ' ')} ok ({time.monotonic() - started:.1f} s)", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
