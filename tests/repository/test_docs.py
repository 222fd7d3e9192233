# SPDX-License-Identifier: Apache-2.0
"""README and docs: links lead somewhere, Python blocks compile and run, commands and recipes exist."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from paths import ROOT

from modelopt_dms.cli import app
from modelopt_dms.config.bundled import embedded_model_dir, list_recipes, modelopt_recipes_dir

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A Python block behind this line runs here.
RUNS = "<!-- runs -->"
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
RECIPES = list_recipes()
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda x: x.stem)


def blocks(page: Path, *languages: str) -> list[tuple[bool, str]]:
    """The fenced blocks in a language: whether it is marked to run, and its text."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: found.start()].rstrip().endswith(RUNS), found[2])
        for found in BLOCK.finditer(text)
        if found[1] in languages
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks; the changelog's page is the changelog."""
    text = page.read_text(encoding="utf-8")
    for included in re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE):
        text += (ROOT / included).read_text(encoding="utf-8")
    return BLOCK.sub("", text)


def anchors(page: Path) -> set[str]:
    """What GitHub and the site call the headings of a page, those that the site generates included."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", x.lower())).strip("-") for x in titles}


@every_page
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [x for y in (part.values() if isinstance(part, dict) else part) for x in pages(y)]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages(config["nav"])) == sorted(x.name for x in PAGES[1:])


@every_page
def test_python_blocks_compile(page: Path) -> None:
    for _, code in blocks(page, "python"):
        compile(code, str(page), "exec")


def command_lines(page: Path) -> list[list[str]]:
    """The words behind `modelopt-dms` of every command in a block."""
    found = []
    for _, text in blocks(page, "", "bash", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            start = re.match(r"\s*(\S+/)?modelopt-dms |.* -m modelopt_dms\.cli ", line)
            if start:
                words = shlex.split(line[start.end() :], comments=True)
                end = next((i for i, x in enumerate(words) if x in (">", "|", "&&")), None)
                found.append(words[:end])
    return found


@every_page
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in command_lines(page):
        command, rest = typer.main.get_command(app), words
        while rest and getattr(command, "commands", {}):
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        if command.context_settings.get("ignore_unknown_options"):
            continue
        # Missing arguments and unknown options and choices raise; nothing runs.
        command.make_context("modelopt-dms", list(rest))


@every_page
def test_recipes_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z0-9_-]*_cr\d[\w-]*|[\w-]*tiny_cpu)`", text))
    names |= {
        word
        for words in command_lines(page)
        for option, word in zip(words, words[1:], strict=False)
        if option in ("--recipe", "-r") and not word.endswith(".yaml")
    }
    for name in names:
        file = modelopt_recipes_dir() / f"{name}.yaml"
        assert name in RECIPES or file.is_file(), name


def test_recipes_in_blocks_load_and_keys_beside_an_import_win(tmp_path: Path) -> None:
    from modelopt_dms.config.recipe import load_recipe

    steps = []
    for _, text in blocks(ROOT / "docs/recipes.md", "yaml"):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        recipe = load_recipe(tmp_path / "mine.yaml")
        steps.append(recipe.retrofit and recipe.retrofit.steps)
    assert steps == [400, None]


def test_generated_parts_have_every_key_recipe_command_and_public_name() -> None:
    import modelopt_dms
    from modelopt_dms.config.recipe import Recipe
    from tools.docs_hooks import MARKER, PARTS

    asked = [x for page in PAGES for x in MARKER.findall(page.read_text(encoding="utf-8"))]
    assert sorted(asked) == sorted(PARTS)
    keys = PARTS["recipe keys"]()
    assert all(f"### {section}" in keys for section in Recipe.model_fields)
    assert keys.count("| `window` |") == 1
    recipes = PARTS["recipes"]()
    assert all(f"`{name}`" in recipes for name in RECIPES)
    commands = PARTS["commands"]()
    assert all(f"## modelopt-dms {x}\n" in commands for x in typer.main.get_command(app).commands)
    names = re.findall(r"^::: \S+\.(\w+)$", PARTS["public names"](), re.MULTILINE)
    assert sorted(names) == sorted(modelopt_dms.__all__)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a compressed model and data, and the names that blocks may use without defining them."""
    import modelopt_dms as dms

    folder = tmp_path_factory.mktemp("docs")
    name = str(embedded_model_dir())
    source = (ROOT / "modelopt_dms/config/recipe.py").read_text(encoding="utf-8")
    texts = [source[i : i + 900] for i in range(0, 3600, 900)]
    for file, documents in (("traces", texts), ("held_out", [source[:4000]])):
        lines = [json.dumps({"text": x}) for x in documents]
        (folder / f"{file}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    few = {"calibrate.curve": [2, 4], "dms.window": 32}
    base, tokenizer = dms.load_base(name)
    model = dms.compress(base, "calibrated_cr4-1k", tokenizer=tokenizer, data=texts, overrides=few)
    model.save_pretrained(folder / "model-cr4")
    tokenizer.save_pretrained(folder / "model-cr4")
    names = {
        "name": name,
        "tokenizer": tokenizer,
        "texts": texts,
        "prompts": ["def add(a, b):"],
        "inputs": tokenizer(texts[0], return_tensors="pt"),
        "calibration_batches": [tokenizer(texts[0], return_tensors="pt")],
    }
    return folder, names


# README's recipe reads 64 samples.
RUNNING = [
    pytest.param(x, marks=pytest.mark.slow if x.stem == "README" else ())
    for x in PAGES
    if any(marked for marked, _ in blocks(x, "python"))
]


@pytest.mark.parametrize("page", RUNNING, ids=lambda x: x.stem)
def test_python_blocks_that_are_marked_run(
    page: Path, given: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import modelopt_dms as dms

    folder, names = given
    monkeypatch.chdir(folder)
    code = [x for marked, x in blocks(page, "python") if marked]
    # Pages that compress start from a plain model, others from a compressed one.
    plain = "dms.compress(" in code[0]
    model = dms.load_base(names["name"])[0] if plain else dms.load("model-cr4")
    scope = {**names, "model": model}
    for text in code:
        exec(compile(text, str(page), "exec"), scope)
