"""The demo: its text set, its page, and the command from end to end on a tiny encoder."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoder import write_encoder

from craft_peft import CraftError
from craft_peft.cli import demo
from craft_peft.cli.main import main
from craft_peft.glue import machine
from craft_peft.glue.docstrings import (
    MIN_SENTENCES,
    Sentence,
    collect_sentences,
    distinct,
    first_of_all,
    is_prose,
    module_sentences,
    split_sentences,
)


@pytest.fixture(scope="module")
def sentences() -> list[Sentence]:
    """What `craft-peft demo` trains and tests on."""
    return first_of_all(collect_sentences(), demo.SENTENCES)


def test_there_are_enough_sentences_and_topics(sentences: list[Sentence]) -> None:
    counts = Counter(sentence.topic for sentence in sentences)
    assert demo.SENTENCES <= len(sentences) < demo.SENTENCES + 50
    assert len(counts) >= 6
    assert min(counts.values()) >= MIN_SENTENCES
    assert max(counts.values()) == statistics.median(counts.values()), "the topics are cut alike"


def test_other_topics_give_more_where_one_is_lacking() -> None:
    """As on systems that ship Python without tkinter."""
    rest = [sentence for sentence in collect_sentences() if sentence.topic != "graphical interfaces"]
    assert 2000 <= len(first_of_all(rest, 2000)) < 2050
    assert first_of_all(rest, 10**6) == rest


def test_both_sides_have_every_topic_and_nothing_in_common(sentences: list[Sentence]) -> None:
    train, test = split_sentences(sentences)
    assert len(train) + len(test) == len(sentences)
    assert {sentence.topic for sentence in train} == {sentence.topic for sentence in test}
    assert 0.15 < len(test) / len(sentences) < 0.25
    known = [set(re.findall(r"[a-z'-]+", sentence.text.lower())) for sentence in train]
    new = [set(re.findall(r"[a-z'-]+", sentence.text.lower())) for sentence in test]
    # A little above the limit of `distinct`, whose idea of a word is not quite this one.
    assert max(len(a & b) / len(a | b) for a, b in product(known, new)) < 0.7


def test_the_side_of_a_sentence_does_not_depend_on_the_others(sentences: list[Sentence]) -> None:
    test = set(split_sentences(sentences)[1])
    assert set(split_sentences(sentences[::3])[1]) == test & set(sentences[::3])


def test_sentences_read_like_english(sentences: list[Sentence]) -> None:
    for sentence in sentences:
        assert re.match(r"[A-Z].*[.!?]$", sentence.text), sentence
        assert 8 <= len(sentence.text.split()) <= 25, sentence
        assert not re.search(r">>>|->|\n|\(\)", sentence.text), sentence


@pytest.mark.parametrize(
    "text",
    [
        "Return a new path that points to the parent folder.",
        "If 'path' is None, then the search is considered a failure.",
        "Is the other side still there, and will it answer?",
    ],
)
def test_prose_is_kept(text: str) -> None:
    assert is_prose(text)


@pytest.mark.parametrize(
    "text",
    [
        "Return the path of it.",
        "return a new path that points to the parent folder.",
        "Return a new path that points to the parent folder",
        "S.find(sub, start, end) -> int, the lowest index that was found.",
        "Call open() on the file and then read all of its lines.",
        "Set x = 1 and y = 2 and then add the two of them.",
        "Key      If the line is blank, delete it.",
        "Return " + "very " * 30 + "much.",
    ],
)
def test_other_text_is_left_out(text: str) -> None:
    assert not is_prose(text)


def test_doctests_lists_and_signatures_are_left_out() -> None:
    source = '''
"""The module that everybody has to import before they use it.

>>> This line is an example and no sentence at all.

    Indented text is most often code or a list of something.

- A bullet point is a list as well, and is left out.
"""

raise SystemExit("a module that is run instead of read")

class Shape:
    """A shape that has some corners and some edges. It can be drawn on
    a canvas or on paper."""

    def draw(self):
        """draw(canvas) -> None"""
'''
    assert list(module_sentences(source)) == [
        "The module that everybody has to import before they use it.",
        "A shape that has some corners and some edges.",
        "It can be drawn on a canvas or on paper.",
    ]


def test_near_duplicates_go_and_the_first_stays() -> None:
    texts = ["Return the size of the open file.", "Return the size of an open file.", "Remove the lock of the thread."]
    kept = distinct([Sentence(text, "files", "os") for text in texts])
    assert [sentence.text for sentence in kept] == [texts[0], texts[2]]


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CraftError, match=r"No docstrings under .* Run it with another Python"):
        collect_sentences(library=tmp_path)


def test_a_small_topic_is_left_out(tmp_path: Path) -> None:
    numbers = [f"{a}{b}" for a, b in product("abcdefghij", "klmnopqrst")]
    lines = [f"Return {' '.join(f'{word}{number}' for word in 'stuvwxyz')}." for number in numbers]
    (tmp_path / "json.py").write_text("'''" + "\n\n".join(lines) + "'''")
    (tmp_path / "email.py").write_text("'''Only a single sentence about the letters that are sent.'''")
    assert Counter(sentence.topic for sentence in collect_sentences(library=tmp_path)) == {"data formats": len(lines)}


def test_a_missing_encoder_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert 'pip install "craft-peft[demo]"' in capsys.readouterr().err


def test_the_encoder_is_found(minilm_folder: Path) -> None:
    assert demo.find_encoder() == minilm_folder
    assert (minilm_folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--per-topic", "5"], "--per-topic 5 is too few"), (["--methods", "head,loar"], "Unknown method `loar`")],
)
def test_bad_input_is_refused_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["demo", "--model", str(tmp_path), "--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Finished:
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A demo on a tiny encoder, which replaces an earlier one."""
    folder = tmp_path_factory.mktemp("demo")
    words = ["--model", str(write_encoder(folder / "encoder")), "--output", str(folder / "out"), "--per-topic", "60"]
    assert main(["demo", *words, "--methods", "head", "--epochs", "1"]) == 0
    with redirect_stdout(StringIO()) as printed:
        assert main(["demo", *words, "--methods", "head,craft", "--epochs", "2", "--text", "the film was good"]) == 0
    return Finished(folder / "out", printed.getvalue())


def read_results(finished: Finished) -> dict[str, dict[str, Any]]:
    return {name: json.loads((finished.folder / name / "result.json").read_text()) for name in ("head", "craft")}


def test_all_methods_are_trained_alike_and_compared(finished: Finished) -> None:
    results = read_results(finished)
    for result in results.values():
        assert f"{result['score']['last']:.1%}" in finished.printed
        assert f"{result['parameters']['trainable']:,}" in finished.printed
        assert len(result["curve"]) == 2
    same = ("epochs", "batch_size", "max_length", "head_learning_rate", "warmup_ratio", "head_start")
    for name in same:
        assert results["head"]["config"]["recipe"][name] == results["craft"]["config"]["recipe"][name]


def test_the_page_holds_the_results_and_needs_nothing_else(finished: Finished) -> None:
    page = (finished.folder / demo.PAGE).read_text()
    for result in read_results(finished).values():
        assert f"{result['score']['last']:.1%}" in page
        assert f"{result['parameters']['trainable']:,}" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "http" not in page


def test_text_is_classified(finished: Finished) -> None:
    assert re.search(r"^[a-z ]+ \d+%, [a-z ]+ \d+%, [a-z ]+ \d+%: the film was good$", finished.printed, re.MULTILINE)


@pytest.mark.parametrize("end", ["", EOFError])
def test_typed_sentences_end_at_an_empty_line_or_the_end_of_input(
    end: str | type, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    answers = iter(["one sentence ", "another", end])

    def answer(prompt: str = "") -> str:
        following = next(answers)
        if isinstance(following, str):
            return following
        raise following

    monkeypatch.setattr("builtins.input", answer)
    assert list(demo._typed(Console(quiet=True))) == ["one sentence", "another"]


@pytest.mark.parametrize(
    ("threads", "cores", "busy", "expected"),
    [
        (2, 2, 0.0, 2),
        (2, 2, 8.0, 2),
        (2, 2, 50.0, 1),
        (2, 2, 100.0, 1),
        (1, 64, 0.0, 1),
        (8, 64, 50.0, 8),
        (8, 8, 50.0, 4),
    ],
)
def test_as_many_threads_as_cores_are_idle(
    threads: int, cores: int, busy: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for a busy core take longer than fewer threads do."""
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: cores)
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda seconds: busy)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with machine.free_threads() as found:
            assert found == torch.get_num_threads() == expected
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
