"""The page in headless Chromium, served by a real process on small random models."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from owlfuse.artifacts.load import load_with_processor
from owlfuse.serving.chat import Conversation

REPO = Path(__file__).resolve().parents[3]
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytest.importorskip(
    "gradio", reason="the demo's extra is not installed: pip install 'owlfuse[demo]'"
)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="no Playwright here (165 MB): pip install playwright"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]

# Told to a file: every address beyond this machine that the server asks for or connects to.
WATCH_NETWORK = """
import os, socket
def watched(name, place):
    own = getattr(socket.socket, name)
    def call(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[place]).startswith(("127.", "::1")):
            open(os.environ["ASKED"], "a").write(f"{name} {address}\\n")
        return own(self, address, *rest)
    setattr(socket.socket, name, call)
watched("connect", 0)
watched("connect_ex", 0)
own_look = socket.getaddrinfo
def look(host, *rest, **options):
    if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"):
        open(os.environ["ASKED"], "a").write(f"getaddrinfo {host}\\n")
    return own_look(host, *rest, **options)
socket.getaddrinfo = look
"""
EVIL = "<img src=x onerror=alert(1)>**b**"
TEXT = ".answer .text"


class Demo:
    """`owlfuse demo` in a process of its own."""

    def __init__(self, work, *folders):
        (work / "watch").mkdir(parents=True)
        (work / "watch" / "sitecustomize.py").write_text(WATCH_NETWORK)
        self.temp, self.asked = work / "temp", work / "asked.txt"
        self.temp.mkdir()
        self.asked.touch()
        path = os.pathsep.join(
            [str(work / "watch"), str(REPO / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        env = {
            **os.environ,
            "PYTHONPATH": path,
            "TMPDIR": str(self.temp),
            "ASKED": str(self.asked),
            "OMP_NUM_THREADS": "1",
        }
        self.out, self.err = (work / "out.txt").open("w+"), (work / "err.txt").open("w+")
        command = [sys.executable, "-m", "owlfuse", "demo", *map(str, folders)]
        self.process = subprocess.Popen(
            command, stdout=self.out, stderr=self.err, env=env, cwd=work, start_new_session=True
        )
        self.address = self.wait(r"the demo is at (\S+)")

    def wait(self, pattern, seconds=600):
        """What the terminal shows, as soon as it does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if found := re.search(pattern, self.terminal()):
                return found[1]
            time.sleep(0.1)
        raise AssertionError(f"no {pattern}: {self.terminal()} {self.errors()}")

    def terminal(self):
        return Path(self.out.name).read_text()

    def errors(self):
        return Path(self.err.name).read_text()

    def end(self, number=signal.SIGINT):
        """Exit code, after the signal that Ctrl-C sends to the process."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=120)
        finally:
            if self.process.poll() is None:
                self.process.kill()


@pytest.fixture(scope="module")
def models(exported, tmp_path_factory):
    """Copies whose answers end with the limit alone; `evil` says EVIL and ends."""
    work = tmp_path_factory.mktemp("models")
    for name in ("concat", "hyper"):
        shutil.copytree(exported / name / "out", work / name / "out")
    shutil.copytree(exported / "concat" / "out", work / "evil")
    tokenizer = load_with_processor(work / "evil")[1].tokenizer
    for folder in (work / "concat" / "out", work / "hyper" / "out"):
        change(folder, suppress_tokens=[tokenizer.eos_token_id])
    ids = [*tokenizer.encode(EVIL, add_special_tokens=False), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == EVIL
    change(
        work / "evil",
        sequence_bias=[[ids[: end + 1], 1000.0 * (end + 1)] for end in range(len(ids))],
    )
    return work


def change(folder, **fields):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture(scope="module")
def demo(models, tmp_path_factory):
    started = Demo(
        tmp_path_factory.mktemp("server"), models / "concat" / "out", models / "hyper" / "out"
    )
    yield started
    started.end()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """visit(demo, width) -> a page.

    In the end nothing was asked of another machine, and no script failed.
    """
    contexts, requests, faults = [], [], []

    def make(demo, width=1200):
        context = browser.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: faults.append(message.text) if message.type == "error" else None,
        )
        page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
        page.goto(demo.address)
        page.wait_for_selector("#question textarea:enabled")
        make.address = demo.address
        return page

    make.faults = faults
    yield make
    for context in contexts:
        context.close()
    assert requests
    foreign = [
        url for url in requests if not url.startswith((make.address + "/", "data:", "blob:"))
    ]
    assert foreign == []
    assert faults == []


def attach(page, *files):
    page.set_input_files(
        "#question input[type=file]", [str(f) if isinstance(f, Path) else f for f in files]
    )
    page.wait_for_function(
        f"document.querySelectorAll('#question .thumbnail-item').length >= {len(files)}"
    )


def ask(page, text):
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")


def answered(page, count):
    """Waits for so many finished answers; their texts."""
    page.wait_for_function(
        f"document.querySelectorAll('.answer[aria-busy=false]').length === {count} "
        "&& !document.querySelector('.answer[aria-busy=true]')",
        timeout=120_000,
    )
    page.wait_for_selector("#question .submit-button")
    return page.locator(TEXT).all_inner_texts()


def tokens(page, number):
    """Sets the longest answer."""
    box = page.get_by_role("spinbutton", name="Max tokens")
    box.fill(str(number))
    box.press("Tab")


def uploads(demo):
    return [path for path in demo.temp.rglob("*") if path.is_file()]


def test_upload_ask_and_see_the_streamed_answers_side_by_side(demo, visit, exported, models):
    page = visit(demo)
    assert page.locator(".model h2").all_inner_texts() == ["concat/out", "hyper/out"]
    assert page.locator(".model").nth(1).inner_text().split("\n\n")[1:3] == [
        "fusion: HyperAttention (adaptive)",
        "export of run_hyper",
    ]
    tokens(page, 1200)
    attach(page, exported / "red.png", exported / "blue.png")
    seen = [[], []]
    ask(page, "What is it?")
    page.wait_for_selector(".answer")
    while page.locator(".answer[aria-busy=true]").count():
        for number, text in enumerate(page.locator(TEXT).all_text_contents()[:2]):
            seen[number].append(text)
    texts = answered(page, 2)
    for number, name in enumerate(("concat", "hyper")):
        assert len({len(text) for text in seen[number] if "waiting" not in text}) >= 4, seen[number]
        alone = Conversation(
            *load_with_processor(models / name / "out"), max_new_tokens=1200, do_sample=False
        )
        for color in ("red", "blue"):
            alone.show(str(exported / f"{color}.png"))
        assert " ".join(texts[number].split()) == " ".join(
            alone.ask("What is it?", lambda text: None).split()
        )
    assert any("waiting for its turn" in text for text in seen[1])
    assert re.fullmatch(
        r"1200 tokens in [\d.]+ s \(first [\d.]+ s\) · [\d.]+ tokens/s",
        page.locator(".note").first.inner_text(),
    )
    boxes = [page.locator(".answer").nth(number).bounding_box() for number in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert page.locator(".asked img").count() == 2
    assert uploads(demo) == []  # what was asked about is kept in memory alone


def test_a_conversation_goes_on_stops_and_begins_anew(demo, visit):
    page = visit(demo)
    tokens(page, 8)
    ask(page, "Hello")
    answered(page, 2)
    tokens(page, 2048)
    ask(page, "And now?")
    page.wait_for_function(f"document.querySelectorAll('{TEXT}')[2]?.textContent.length > 20")
    page.click("#question .stop-button")
    answered(page, 4)
    notes = page.locator(".note").all_inner_texts()
    assert notes[2].endswith("stopped")
    assert notes[3].startswith("stopped before its turn came")
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_selector(".welcome")
    assert page.locator(".answer").count() == 0
    tokens(page, 8)
    ask(page, "Hello")
    answered(page, 2)


def test_a_bad_file_gets_a_sentence_and_the_question_stays(demo, visit, exported):
    page = visit(demo)
    svg = (
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><script>alert(2)</script></svg>"
    )
    attach(page, {"name": "drawn.svg", "mimeType": "image/svg+xml", "buffer": svg})
    ask(page, "What is it?")
    alert = page.get_by_role("alert")
    playwright.expect(alert).to_contain_text(
        "drawn.svg cannot be read: its 89 bytes are none of PNG"
    )
    assert str(demo.temp) not in alert.inner_text()
    assert page.input_value("#question textarea") == "What is it?"
    attach(page, exported / "red.png")
    tokens(page, 4)
    page.click("#question .submit-button")
    answered(page, 2)
    playwright.expect(alert).to_have_count(0)
    large = Path(demo.temp).parent / "large.png"
    Image.effect_noise((5200, 5200), 90).save(large, compress_level=0)
    assert large.stat().st_size > 20 * 2**20
    page.set_input_files("#question input[type=file]", str(large))
    playwright.expect(page.locator("body")).to_contain_text(
        re.compile("size|large", re.IGNORECASE), timeout=20_000
    )
    visit.faults.clear()  # the browser notes that the upload was refused
    assert uploads(demo) == []
    assert "Traceback" not in demo.errors()
    ask(page, "Hello")
    answered(page, 4)


def test_where_it_looked_is_shown_when_it_is_asked_for(demo, visit, exported):
    page = visit(demo)
    tokens(page, 8)
    page.get_by_role("checkbox", name="Show where it looked").check()
    attach(page, exported / "red.png", exported / "blue.png")
    ask(page, "What is it?")
    answered(page, 2)
    for number, name in enumerate(("concat/out", "hyper/out")):
        looks = page.locator(".answer").nth(number).locator("img")
        assert looks.evaluate_all("all => all.map(one => one.alt)") == [
            f"where {name} looked in picture {i}, lighter for more" for i in (1, 2)
        ]
        assert looks.evaluate_all("all => all.every(one => one.naturalWidth > 50)")
        shares = [
            int(s)
            for s in re.findall(
                r"picture \d: (\d+)%", page.locator(".answer").nth(number).inner_text()
            )
        ]
        assert sum(shares) in (99, 100, 101)


def test_what_a_model_says_is_text_and_no_markup(models, visit, tmp_path):
    demo = Demo(tmp_path / "server", models / "evil")
    try:
        page = visit(demo)
        ask(page, EVIL)
        assert answered(page, 1) == [EVIL]
        assert EVIL in page.locator(".asked").inner_text()
        assert page.locator(".answer img, .answer strong, .asked img").count() == 0
    finally:
        demo.end()


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_reaches_over_the_side_and_the_question_stays_in_sight(
    demo, visit, exported, width
):
    page = visit(demo, width)
    tokens(page, 350)
    attach(page, exported / "red.png", exported / "blue.png")
    ask(page, "What is it? " + 60 * "verylongword")
    answered(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    over = (
        "all => all.filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one "
        "=> one.outerHTML.slice(0, 80))"
    )
    assert (
        page.locator("#conversation *, #composer *, .model, #settings *").evaluate_all(over) == []
    )
    label, form = (
        page.locator(place).first.bounding_box()
        for place in ("#settings label:has(input[type=checkbox])", "#settings .form")
    )
    assert label["x"] + label["width"] <= form["x"] + form["width"]
    assert label["height"] < 40  # in one line
    first, second = (page.locator(".answer").nth(number).bounding_box() for number in range(2))
    assert (second["y"] >= first["y"] + first["height"]) == (width == 390)
    page.mouse.wheel(0, -100_000)
    page.wait_for_function("document.scrollingElement.scrollTop === 0")
    box = page.locator("#question textarea").bounding_box()
    assert 0 < box["y"] < 800 - box["height"]


def test_the_keyboard_alone_is_enough_and_everything_has_a_name(demo, visit):
    page = visit(demo)
    tokens(page, 4)
    page.locator("#question textarea").focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Ask"
    page.keyboard.press("Enter")
    answered(page, 2)
    page.evaluate("document.activeElement.blur()")
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        named = "e => e.getAttribute('aria-label') || e.innerText || e.labels?.[0]?.innerText"
        names.append(page.evaluate(f"(({named})(document.activeElement) || '').trim()"))
    for name in (
        "New conversation",
        "number input for Temperature",
        "Show where it looked",
        "Add pictures",
        "Your question",
        "Ask",
    ):
        assert name in names, names
    label = "e.getAttribute('aria-label') || e.innerText.trim() || e.labels?.length"
    unnamed = f"all => all.filter(e => e.offsetParent && !({label})).map(e => e.outerHTML)"
    assert page.locator("button, input, textarea").evaluate_all(unnamed) == []


def test_too_many_waiting_questions_are_refused_with_a_sentence(demo, visit):
    pages = [visit(demo) for _ in range(9)]
    for page in pages:
        tokens(page, 2048)
    for page in pages[:8]:
        ask(page, "Hello")
    for page in pages[:8]:
        page.wait_for_selector(".answer")
    ask(pages[8], "Hello")
    playwright.expect(pages[8].get_by_role("alert")).to_have_text(
        "8 questions of others are waiting already; try again in a moment"
    )
    for page in pages[:7]:
        page.close()  # nobody reads these answers, and they end
    pages[7].wait_for_function(
        f"document.querySelector('{TEXT}')?.textContent.length > 40", timeout=60_000
    )
    pages[7].click("#question .stop-button")
    assert answered(pages[7], 2)[0]


def fetch(demo, path, **headers):
    """Status and headers."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(demo.address + path, headers=headers), timeout=20
        ) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def test_files_outside_the_uploads_are_not_served_and_uploads_are_not_active(demo, visit, models):
    for path in (
        "/etc/passwd",
        models / "concat" / "out" / "config.json",
        "../../etc/passwd",
        "http://example.com/",
    ):
        assert fetch(demo, f"/gradio_api/file={path}")[0] in (403, 404)
    assert fetch(demo, "/", Host="evil.example")[0] == 403
    assert fetch(demo, "/", Origin="http://evil.example")[0] == 403
    assert "default-src 'self'" in fetch(demo, "/")[1]["content-security-policy"]
    page = visit(demo)
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(2)</script></svg>"
    attach(page, {"name": "drawn.svg", "mimeType": "image/svg+xml", "buffer": script})
    (stored,) = uploads(demo)
    status, headers = fetch(demo, f"/gradio_api/file={stored}")
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    assert headers["content-disposition"].startswith("attachment")
    assert headers["x-content-type-options"] == "nosniff"
    stored.unlink()


SEND = """async ([path, name]) => {
    const config = window.gradio_config;
    const box = config.components.find((one) => one.props.elem_id === "question").id;
    const event = config.dependencies.find((one) => one.targets.some(([id, kind]) => id === box && kind === "submit"));
    const file = { path, meta: { _type: "gradio.FileData" } };
    const data = { begin: [{ text: "What is it?", files: [file] }], slider: [file, 8, false] }[name];
    const index = name === "begin" ? event.id : config.dependencies.find((one) => one.inputs.length === 3).id;
    const body = JSON.stringify({ data, fn_index: index, session_hash: "probe" });
    const headers = { "content-type": "application/json" };
    const answer = await fetch("gradio_api/run/predict", { method: "POST", headers, body });
    return [answer.status, await answer.text()];
}"""


def test_a_file_of_the_server_cannot_be_named_as_a_picture(demo, visit, exported):
    page = visit(demo)
    (demo.temp / "secret.png").write_bytes((exported / "red.png").read_bytes())
    before = set(demo.temp.rglob("*"))
    for path in (
        str(demo.temp / "secret.png"),
        str(exported / "red.png"),
        "/etc/passwd",
        "http://example.com/a.png",
    ):
        for name in ("begin", "slider"):
            status, text = page.evaluate(SEND, [path, name])
            assert status >= 400, text
            assert "asked" not in text
    assert set(demo.temp.rglob("*")) == before
    (demo.temp / "secret.png").unlink()
    visit.faults.clear()  # the browser notes each refusal


def test_the_server_asked_nothing_of_another_machine_and_showed_no_stack(demo):
    assert demo.asked.read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_while_an_answer_is_made(models, visit, tmp_path, number):
    demo = Demo(tmp_path / "server", models / "concat" / "out")
    page = visit(demo)
    tokens(page, 2048)
    ask(page, "Hello")
    page.wait_for_function(f"document.querySelector('{TEXT}')?.textContent.length > 20")
    assert demo.end(number) == 0
    assert demo.terminal().endswith("the demo has ended\n")
    assert "Traceback" not in demo.errors() + demo.terminal()
    assert list(demo.temp.glob("owlfuse-demo-*")) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(demo.process.pid, 0)
    page.close()
    visit.faults.clear()  # the page lost its server
