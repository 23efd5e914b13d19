"""Whatever the pages show is executed: Python blocks, commands, links, and the regions built from result files.

What a page may say in HTML comments, which readers do not see:
    <!-- setup
    python code      runs before the blocks that follow it, in their namespace; `monkeypatch`, `minilm_folder`
    -->              and `tmp_path` are in it, so that a page can name a model of the Hub and a test needs no network
    <!-- output -->  the block after it is what the Python block before it prints
    <!-- run -->     the craft-peft commands of the block after it are run, not only parsed
    <!-- skip: why -->  the block after it is not executed
"""

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"<!-- setup\n(?P<setup>.*?)-->"
    r"|(?:<!-- (?P<mark>output|run|skip: [^>]+) -->\s*\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page (or its hidden setup), with the mark before it."""

    language: str
    code: str
    mark: str


def blocks(page: str) -> Iterator[Block]:
    for match in FENCE.finditer(page):
        if match["setup"] is not None:
            yield Block("setup", match["setup"], "")
        else:
            yield Block(match["language"], match["code"], match["mark"] or "")


def run_python(page: str, namespace: dict[str, Any]) -> list[str]:
    """Executes a page's Python blocks in one namespace; returns what is wrong with the outputs that it shows."""
    wrong, printed = [], ""
    for block in blocks(page):
        if block.mark == "output" and block.code.strip() != printed.strip():
            wrong.append(f"the page shows\n{block.code}\nbut its block prints\n{printed}")
        if block.language in ("python", "setup") and not block.mark.startswith("skip"):
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(block.code, f"<{block.language} block>", "exec"), namespace)
            printed = stdout.getvalue()
    return wrong


def commands(page: str) -> Iterator[tuple[list[str], str]]:
    """The commands of a page's console blocks as words, each with the mark of its block; output lines are skipped."""
    for block in blocks(page):
        if block.language not in ("console", "bash", "sh") or block.mark.startswith("skip"):
            continue
        lines = block.code.replace("\\\n", " ").splitlines()
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        for line in prompted or lines:
            if words := shlex.split(line, comments=True):
                yield words, block.mark


def command_faults(page: str) -> Iterator[str]:
    """Commands that craft-peft's parser or the Makefile does not know."""
    from craft_peft.cli.main import build_parser

    targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    for words, _ in commands(page):
        if words[0] == "make" and words[1] not in targets:
            yield f"no such make target: {' '.join(words)}"
        if words[0] != "craft-peft":
            continue
        pipe = next((i for i, word in enumerate(words) if word in ("|", ">", "<", "&&")), len(words))
        with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
            try:
                build_parser().parse_args(words[1:pipe])
            except SystemExit as exit_:
                if exit_.code:
                    yield f"{' '.join(words)}: {stderr.getvalue()}"


def broken_links(page: str, folder: Path) -> Iterator[str]:
    for match in LINK.finditer(page):
        target = match[1] or match[2]
        if not re.match(r"[a-z]+:|#", target) and not (folder / target.split("#")[0]).exists():
            yield target


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", PROJECT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()
PAGES: list[Path] = build.pages()


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "__main__", "monkeypatch": monkeypatch, "tmp_path": tmp_path}
    if "minilm_folder" in text:
        namespace["minilm_folder"] = request.getfixturevalue("minilm_folder")
    monkeypatch.chdir(tmp_path)
    assert run_python(text, namespace) == []


def test_commands_parse(page: Path) -> None:
    assert list(command_faults(page.read_text())) == []


def test_marked_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_peft.cli.main import main

    monkeypatch.chdir(tmp_path)
    for words, mark in commands(page.read_text()):
        if mark == "run" and words[0] == "craft-peft":
            assert main(words[1:]) == 0, words


def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page.read_text(), page.parent)) == []


def test_generated_regions_are_current(page: Path) -> None:
    assert build.filled(page.read_text()) == page.read_text(), "run: python docs/build.py"


# The checks themselves, on pages that are wrong.


def test_a_failing_block_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        run_python("<!-- setup\nx = 0\n-->\ntext\n```python\n1 / x\n```\n", {})


def test_a_wrong_output_is_found() -> None:
    page = "```python\nprint(1)\n```\n\n<!-- output -->\n```text\n{}\n```\n"
    assert run_python(page.format(1), {}) == []
    assert len(run_python(page.format(2), {})) == 1


def test_a_skipped_block_is_not_run() -> None:
    assert run_python("<!-- skip: needs a GPU -->\n```python\n1 / 0\n```\n", {}) == []


def test_a_wrong_command_is_found() -> None:
    page = "```console\n$ craft-peft no-such-command\nsome output\n$ make no-such-target\n$ make test\n```\n"
    assert len(list(command_faults(page))) == 2


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    assert list(broken_links("[a](none.md) [b](https://example.org) [c](#part)", tmp_path)) == ["none.md"]


def test_a_stale_region_is_found(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "templates").mkdir(parents=True)
    (tmp_path / "results" / "a.json").write_text('{"score": 2}')
    (tmp_path / "results" / "b.json").write_text('{"score": 4}')
    (tmp_path / "docs" / "templates" / "mid.md.jinja").write_text(
        "{{ results('*.json') | map(attribute='score') | median }}\n"
    )
    page = "Median <!-- generated: mid -->7<!-- end -->."
    assert build.filled(page, tmp_path) == "Median <!-- generated: mid -->3.0<!-- end -->."


def test_a_table_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file matches results/x"):
        build.load_results(tmp_path, "x/*.json")
