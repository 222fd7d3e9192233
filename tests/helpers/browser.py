# SPDX-License-Identifier: Apache-2.0
"""Looks at a report in headless Chromium: what is drawn, said and asked for, as JSON. Imports nothing of ours.

python tests/helpers/browser.py PAGE.html [FOLDER for screenshots]
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

DRAWN = ".trace, .hm image"
COUNT = f"[...document.querySelectorAll('.plot')].map(x => [x.id, x.querySelectorAll('{DRAWN}').length])"
TOKEN = 40


def look(browser: Browser, page_file: Path, width: int, scheme: Any, folder: Path | None) -> Any:
    """One width and colour scheme."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda x: messages.append(x.text))
    page.on("pageerror", lambda x: messages.append(str(x)))
    page.on(
        "request", lambda x: x.url.startswith(("file:", "data:", "blob:")) or requests.append(x.url)
    )
    page.goto(page_file.resolve().as_uri())
    page.wait_for_selector("html[data-drawn=yes]", timeout=60_000)
    token = page.locator("#tokens .t").nth(TOKEN)
    token.hover()
    found = {
        "width": width,
        "scheme": scheme,
        "hovered": page.inner_text("#detail .what"),
        "held_cells": page.locator("#detail .grid .held").count(),
        "plots": dict(page.evaluate(COUNT)),
        "scroll_width": page.evaluate("document.documentElement.scrollWidth"),
        "ground": page.evaluate("getComputedStyle(document.body).backgroundColor"),
    }
    page.locator("#plot-heads").scroll_into_view_if_needed()
    box = page.locator("#plot-heads .hm image").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.move(box["x"] + box["width"] / 4 + 1, box["y"] + box["height"] / 4 + 1)
    page.wait_for_selector("#plot-heads .hoverlayer text")
    found["heat_map_hover"] = page.locator("#plot-heads .hoverlayer").text_content()
    page.check("#numbers")
    counted = "getComputedStyle(document.querySelectorAll('#tokens .t')[%d], '::after').content"
    found["counted"] = json.loads(page.evaluate(counted % TOKEN))
    page.uncheck("#numbers")
    if folder is not None:
        page.mouse.move(0, 0)
        page.screenshot(path=folder / f"{width}-{scheme}.png", full_page=True)
    page.close()
    return found | {"messages": messages, "requests": requests}


def main() -> None:
    """All widths and schemes."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    with sync_playwright() as play:
        # Without an installed one, playwright's own.
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        seen = [
            look(browser, Path(sys.argv[1]), width, scheme, folder)
            for width in (1280, 390)
            for scheme in ("light", "dark")
        ]
        browser.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
