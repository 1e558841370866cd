"""What the tests in a real browser share: starting it, serving a folder, watching a page, and the checks of a page.

A check is a function from an open page to a list of problems, empty if there are none. Each is itself tested on a page that has the
problem (`test_site.py`): a check that finds nothing anywhere would look the same as a good site.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, sync_playwright

ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    # No request gets out. (Playwright could stop them too, but then the browser keeps no cache, and each page takes twice as long.)
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]  # fmt: skip


def need(found: str | None, what: str) -> str:
    "`found`; without it the test is skipped on a reader's machine and fails in CI."
    if found: return found
    message = f"the browser tests need {what}"
    pytest.fail(message) if os.environ.get("CI", "").lower() in {"1", "true"} else pytest.skip(message)
    raise AssertionError("not reached")


def chromium() -> str:
    "The path of an installed Chromium or Chrome."
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome"]
    return need(next((path for name in names if name and (path := shutil.which(name))), None), "Chromium (or CHROMIUM=/path/to/it)")


@contextmanager
def launched() -> Iterator[Browser]:
    "A headless browser of its own."
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGS)
        yield browser
        browser.close()


class QuietHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep connections open: a page asks for thirty files

    def log_message(self, format: str, *args: object) -> None: pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    "Serve the folder as `python -m http.server` does; yields its address, with a slash at the end."
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


class Watched:
    """A browser window that knows where it belongs and notes what goes wrong in it.

    A request that leaves `base` is a problem (and finds nobody: see ARGS); so is an error in the console or in a script, and every request
    that fails. `problems` holds what was seen since the last `open`.
    """

    def __init__(self, browser: Browser, base: str, *, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        self.base, self.problems = base, []
        # Without motion a colour is what it will be at once, not half-way to it.
        self.context: BrowserContext = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
        # The theme's own switch keeps the choice here; a choice that the page has made since is left alone.
        choose = f"if (!localStorage.getItem('mode')) for (const k of ['mode', 'theme']) localStorage.setItem(k, '{theme}')"
        self.context.add_init_script(f"try {{ {choose} }} catch {{}}")
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda m: self._note(f"console {m.type}: {m.text}") if m.type in {"error", "warning"} else None)
        self.page.on("pageerror", lambda e: self._note(f"script error: {e}"))
        self.page.on("request", self._see)
        self.page.on("requestfailed", lambda r: self._note(f"request failed: {r.url} ({r.failure})"))
        self.page.on("response", lambda r: self._note(f"status {r.status}: {r.url}") if r.status >= 400 else None)

    def _note(self, problem: str) -> None: self.problems.append(problem)

    def _see(self, request: Request) -> None:
        at_home = request.url.startswith((self.base, f"blob:{self.base}", "data:", "about:"))
        if not at_home: self._note(f"request leaves the site: {request.url}")

    def open(self, path: str, *, quiet: bool = False) -> Page:
        "Open a page of the site and wait until its formulas are set and its diagrams are drawn; `quiet` also waits for late requests."
        self.problems.clear()
        self.page.goto(self.base + path, wait_until="networkidle" if quiet else "load")
        self.settle()
        return self.page

    def settle(self) -> None:
        "Wait until fonts, formulas and diagrams are there."
        self.page.evaluate("document.fonts.ready.then(() => true)")
        # A page whose script never gets there is judged as it stands: the checks say what is missing.
        done = "(async () => { if (window.MathJax?.startup?.promise) await MathJax.startup.promise; return true; })()"
        self.page.evaluate(f"Promise.race([{done}, new Promise((resolve) => setTimeout(resolve, 15000))])")
        if self.page.locator("script[src*='diagrams.js']").count():
            drawn = "document.documentElement.dataset.diagrams === document.documentElement.dataset.theme"
            self.page.evaluate(f"""new Promise((resolve) => {{
                const end = Date.now() + 15000;
                const look = () => ({drawn}) || Date.now() > end ? resolve() : setTimeout(look, 50);
                look();
            }})""")

    def close(self) -> None: self.context.close()


@contextmanager
def window(browser: Browser, base: str, **options: object) -> Iterator[Watched]:
    "A `Watched` window that is closed at the end."
    watched = Watched(browser, base, **options)  # type: ignore[arg-type]
    try: yield watched
    finally: watched.close()


# --- checks of a page: each returns a list of problems ---------------------------------------------------------------------------


def math_problems(page: Page) -> list[str]:
    "Formulas that were not set, or not understood; TeX left over in the text."
    return page.evaluate(r"""() => {
        const problems = [];
        for (const math of document.querySelectorAll(".math")) {
            const name = math.textContent.trim().slice(0, 60);
            const set = math.querySelector("mjx-container svg");
            if (!set || set.getBoundingClientRect().width === 0) problems.push(`not typeset: ${name}`);
            else if (math.querySelector("mjx-merror, [data-mjx-error], merror")) problems.push(`TeX error: ${name}`);
        }
        const walker = document.createTreeWalker(document.querySelector("article, main, body"), NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const node = walker.currentNode;
            if (node.parentElement.closest("pre, code, script, style, mjx-container, .cell_output, dl.py > dt")) continue;
            if (/\\[(\[]|\$\$|\$[^\s$\d][^$]*\$/.test(node.data)) problems.push(`raw TeX in the text: ${node.data.trim().slice(0, 60)}`);
        }
        return problems;
    }""")


def diagram_problems(page: Page) -> list[str]:
    "Diagrams that are not drawn, or are mermaid's picture of an error."
    return page.evaluate(r"""() => [...document.querySelectorAll("pre.mermaid, .language-mermaid, .highlight-mermaid")].flatMap((block) => {
        const svg = block.querySelector("svg"), name = block.textContent.trim().slice(0, 40);
        if (!svg || svg.getBoundingClientRect().width < 20) return [`diagram not drawn: ${name}`];
        const failed = svg.getAttribute("aria-roledescription") === "error" || svg.querySelector(".error-icon, .error-text");
        return failed ? [`diagram with an error: ${name}`] : [];
    })""")


def figure_problems(page: Page) -> list[str]:
    "Pictures that did not load, or that say nothing to who does not see them."
    return page.evaluate(r"""async () => {
        const problems = [];
        for (const img of document.querySelectorAll("img")) {
            const src = img.getAttribute("src") || "", alt = (img.getAttribute("alt") || "").trim();
            img.loading = "eager";
            await img.decode().catch(() => {});
            if (!img.naturalWidth) problems.push(`picture did not load: ${src}`);
            if (!alt) problems.push(`picture without alt text: ${src}`);
            else if (/\.(png|svg|jpe?g|gif|webp)$|^<Figure/i.test(alt)) problems.push(`alt text is only a name: ${alt}`);
        }
        return problems;
    }""")


def contrast_problems(page: Page) -> list[str]:
    "Visible text whose contrast with what lies behind it is less than 4.5:1 (3:1 if it is large), as WCAG 2 AA asks."
    return page.evaluate(r"""() => {
        // A canvas turns every colour that CSS can write into red, green, blue, alpha.
        const ink = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const parse = (css) => {
            ink.clearRect(0, 0, 1, 1); ink.fillStyle = css; ink.fillRect(0, 0, 1, 1);
            const [r, g, b, a] = ink.getImageData(0, 0, 1, 1).data;
            return [r, g, b, a / 255];
        };
        const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
        const behind = (element) => {
            const layers = [];
            for (let e = element; e; e = e.parentElement) {
                const layer = parse(getComputedStyle(e).backgroundColor);
                if (layer[3] > 0) layers.push(layer);
                if (layer[3] === 1) break;
            }
            return layers.reduceRight((below, top) => over(top, below), [255, 255, 255, 1]);
        };
        const light = ([r, g, b]) => {
            const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * x + 0.7152 * y + 0.0722 * z;
        };
        const found = new Map();
        const no_text = "script, style, noscript, template, svg, mjx-assistive-mml, .headerlink, [aria-hidden=true]";
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
            if (!text || element.closest(no_text)) continue;
            const style = getComputedStyle(element);
            if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || !element.getClientRects().length) continue;
            let opacity = 1;
            for (let e = element; e; e = e.parentElement) opacity *= Number(getComputedStyle(e).opacity);
            const ground = behind(element), colour = parse(style.color);
            colour[3] *= opacity;
            const [a, b] = [light(over(colour, ground)), light(ground)].sort((x, y) => y - x);
            const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
            const ratio = (a + 0.05) / (b + 0.05);
            if (ratio < (large ? 3 : 4.5)) {
                const kind = `${element.tagName.toLowerCase()}.${[...element.classList].join(".")}`;
                found.set(kind, `contrast ${ratio.toFixed(2)}: ${kind} "${text.slice(0, 30)}"`);
            }
        }
        return [...found.values()];
    }""")


def width_problems(page: Page) -> list[str]:
    "What makes the page wider than the screen, or is cut off at its edge. A box that scrolls in itself may hold wide things."
    return page.evaluate(r"""() => {
        const problems = [], screen = document.documentElement.clientWidth;
        if (document.scrollingElement.scrollWidth > screen) problems.push(`the page is ${document.scrollingElement.scrollWidth} px wide`);
        const page = [document.body, document.documentElement];
        const scrolls = (e) => !page.includes(e) && ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
        const out_of_flow = "mjx-assistive-mml, dialog, svg, .visually-hidden, .skip-link, .bd-sidebar";
        for (const e of document.querySelectorAll("main *, article *, body > *")) {
            const box = e.getBoundingClientRect();
            if (!box.width || !box.height || (box.right <= screen + 1 && box.left >= -1)) continue;
            if (!e.checkVisibility({ visibilityProperty: true }) || e.closest(out_of_flow)) continue;
            let inside = false;
            for (let p = e.parentElement; p && !inside; p = p.parentElement) inside = scrolls(p);
            const [left, right] = [box.left, box.right].map(Math.round);
            if (!inside) problems.push(`${e.tagName.toLowerCase()}.${e.className} reaches from ${left} to ${right} px`);
        }
        return problems.slice(0, 8);
    }""")
