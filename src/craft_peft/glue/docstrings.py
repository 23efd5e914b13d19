"""A real text set without a download: which topic of Python's standard library is this sentence about?

The sentences are those of the library's own docstrings, read from its source files with `ast`: nothing of it is
imported or run. The label is the topic of the module, after the table `TOPICS`. Needs the standard library alone.
"""

import ast
import hashlib
import inspect
import math
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import CraftError

# Topic -> top-level modules and packages, of Python 3.10 to 3.14: those that an interpreter lacks are passed over.
TOPICS = {
    "concurrency": "asyncio threading multiprocessing concurrent queue subprocess sched _threading_local contextvars",
    "data formats": "xml json csv configparser plistlib pickle pickletools wave aifc sunau chunk xdrlib tomllib base64"
    " uuid copyreg shelve dbm sqlite3 quopri binhex uu",
    "email": "email mailbox smtplib smtpd imaplib poplib nntplib mimetypes mailcap",
    "files": "os pathlib shutil tempfile glob fnmatch zipfile tarfile fileinput _pyio gzip bz2 lzma _compression"
    " filecmp ntpath posixpath genericpath stat linecache zipapp",
    "graphical interfaces": "tkinter turtle curses",
    "language": "ast typing importlib pkgutil zipimport runpy dis tokenize symtable enum dataclasses functools abc"
    " types code codeop pyclbr inspect operator _collections_abc collections weakref copy keyword py_compile",
    "networking": "http urllib socketserver ftplib ssl socket telnetlib xmlrpc wsgiref ipaddress webbrowser selectors"
    " asyncore asynchat cgi",
    "numbers": "_pydecimal decimal statistics fractions random numbers _pylong colorsys heapq bisect secrets datetime"
    " _pydatetime calendar zoneinfo _strptime",
    "testing": "unittest doctest pdb bdb traceback trace timeit profile cProfile pstats tracemalloc warnings logging",
    "text": "difflib textwrap re string html codecs encodings locale gettext argparse optparse getopt cmd shlex pprint"
    " reprlib stringprep _markupbase rlcompleter",
}

MIN_WORDS, MAX_WORDS = 8, 25  # shorter ones often fit any topic
NEAR_DUPLICATE = 0.6  # two sentences that share this much of their words (Jaccard) count as one
MIN_SENTENCES = 60  # a topic with fewer is left out: some systems ship Python without tkinter

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
NOT_PROSE = re.compile(r"\s{3}|>>>|\.\.\. |->|=|\(\)|__|::|https?:|[|{}<>\\@*]|\b\w+\.\w+\(|\w\(\w*,")
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a docstring, the topic that is its label, and the module that it comes from."""

    text: str
    topic: str
    module: str


def paragraphs(docstring: str) -> Iterator[str]:
    r"""The paragraphs of running text in a docstring, each on one line; examples, lists and signatures are left out.

    Example:
        >>> list(paragraphs("Add two numbers.\n\n>>> add(1, 2)\n3\n\nBoth have to be\nintegers.\n\n    x = 1"))
        ['Add two numbers.', 'Both have to be integers.']
    """
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = block.split("\n")
        if any(line.startswith((" ", "-", "*", "+", ">>>", ":", "#", "..")) for line in lines):
            continue
        yield " ".join(line.strip() for line in lines)


def is_prose(text: str) -> bool:
    """Whether a text is an English sentence: a capital, a full stop, 8 to 25 words, hardly anything but words.

    Example:
        >>> is_prose("Return the number of bytes that were written to it.")
        True
        >>> is_prose("Return self+value.") or is_prose("B.index(sub, start) -> int, like find but raises an error.")
        False
    """
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or not text[0].isupper() or text[-1] not in ".!?":
        return False
    plain = sum(WORD.fullmatch(word.strip(".,;:!?\"'`()")) is not None for word in words)
    return plain >= 0.85 * len(words) and NOT_PROSE.search(text) is None


def module_sentences(source: str) -> Iterator[str]:
    r"""The sentences in the docstrings of a module's source, of its classes and of its functions.

    Example:
        >>> list(module_sentences('def f():\n    "Return the answer to life and to everything else. Or not."'))
        ['Return the answer to life and to everything else.']
    """
    for node in documented(ast.parse(source)):
        for paragraph in paragraphs(ast.get_docstring(node, clean=False) or ""):
            yield from filter(is_prose, SENTENCE_END.split(paragraph))


def documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module, classes and functions in a syntax tree; `ast.walk` would enter every expression as well."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            waiting.extend(getattr(node, field, ()))


def source_files(library: Path, module: str) -> list[Path]:
    """The source files of a module or package, without its tests; none where the interpreter lacks it."""
    if (library / f"{module}.py").is_file():
        return [library / f"{module}.py"]
    tests = {"test", "tests", "idle_test"}
    return [
        path for path in sorted((library / module).rglob("*.py")) if not tests & set(path.parts[len(library.parts) :])
    ]


def read_source(path: Path) -> str:
    """The text of a source file; nothing for the few that are no UTF-8 on purpose."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def distinct(sentences: Iterable[Sentence]) -> list[Sentence]:
    """The sentences without near-duplicates: of two that share 60 % of their words, the first stays.

    Two sets with a Jaccard index of at least t share a word among the rarest `|set| - ceil(t * |set|) + 1` of each:
    only sentences that do are compared.

    Args:
        sentences: In the order of preference.

    Returns:
        The sentences that stay, in their order.

    Example:
        >>> texts = ["Return the size of the file.", "Returns the size of the file.", "Close the socket at once."]
        >>> [sentence.text for sentence in distinct(Sentence(text, "files", "os") for text in texts)]
        ['Return the size of the file.', 'Close the socket at once.']
    """
    pairs = [(sentence, frozenset(word.lower() for word in WORD.findall(sentence.text))) for sentence in sentences]
    frequency = Counter(word for _, words in pairs for word in words)
    kept: list[tuple[Sentence, frozenset[str]]] = []
    holders: dict[str, list[int]] = defaultdict(list)  # rare word -> numbers of the kept sentences that have it
    for sentence, words in pairs:
        rare = sorted(words, key=lambda word: (frequency[word], word))
        rare = rare[: len(words) - math.ceil(NEAR_DUPLICATE * len(words)) + 1]
        near = {number for word in rare for number in holders[word]}
        others = (kept[number][1] for number in near)
        if any(len(words & other) >= NEAR_DUPLICATE * len(words | other) for other in others):
            continue
        for word in rare:
            holders[word].append(len(kept))
        kept.append((sentence, words))
    return [sentence for sentence, _ in kept]


def order_key(sentence: Sentence) -> str:
    """A number that depends on the words of a sentence alone, the same on every machine and in every Python."""
    return hashlib.sha256(" ".join(WORD.findall(sentence.text.lower())).encode()).hexdigest()


@cache  # several hundred files: to read them once a process is enough
def read_library(library: Path) -> tuple[Sentence, ...]:
    """Every sentence in the docstrings of a library folder, in a shuffled order that depends on the sentences alone."""
    found = [
        Sentence(text, topic, module)
        for topic, modules in TOPICS.items()
        for module in modules.split()
        for path in source_files(library, module)
        for text in module_sentences(read_source(path))
    ]
    return tuple(sorted(found, key=order_key))


def collect_sentences(library: Path | None = None) -> list[Sentence]:
    """The sentences of the standard library's docstrings, without near-duplicates, in a fixed shuffled order.

    Takes some seconds. The same interpreter version always gives the same sentences.

    Args:
        library: Folder of the standard library's sources; by default that of the running interpreter.

    Returns:
        The sentences of every topic that has at least `MIN_SENTENCES` of them.

    Raises:
        CraftError: If the interpreter comes without the sources of its library.

    Example:
        >>> sentences = collect_sentences()
        >>> len({sentence.topic for sentence in sentences}) >= 6
        True
        >>> max(len(sentence.text.split()) for sentence in sentences) <= 25
        True
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    found = distinct(read_library(library))
    counts = Counter(sentence.topic for sentence in found)
    chosen = [sentence for sentence in found if counts[sentence.topic] >= MIN_SENTENCES]
    if not chosen:
        raise CraftError(
            f"No docstrings under {str(library)!r}: this Python has no sources of its standard library. "
            f"The demo's text set is built from them. Run it with another Python."
        )
    return chosen


def first_of_each_topic(sentences: Iterable[Sentence], number: int) -> list[Sentence]:
    """The first sentences of each topic, at most so many.

    Example:
        >>> sentences = [Sentence("One.", "a", ""), Sentence("Two.", "a", ""), Sentence("Three.", "b", "")]
        >>> [sentence.text for sentence in first_of_each_topic(sentences, 1)]
        ['One.', 'Three.']
    """
    taken: Counter[str] = Counter()
    first = []
    for sentence in sentences:
        if taken[sentence.topic] < number:
            taken[sentence.topic] += 1
            first.append(sentence)
    return first


def first_of_all(sentences: list[Sentence], total: int) -> list[Sentence]:
    """The first sentences of each topic, of each as many as it takes to make up a total.

    More of each where an interpreter lacks a topic (often tkinter's) or has little of one.

    Returns:
        A few more than `total`; all sentences where these are fewer.

    Example:
        >>> 1000 <= len(first_of_all(collect_sentences(), 1000)) < 1050
        True
    """
    sizes = Counter(sentence.topic for sentence in sentences).values()
    number = 0
    while sum(min(size, number) for size in sizes) < min(total, len(sentences)):
        number += 1
    return first_of_each_topic(sentences, number)


def split_sentences(sentences: list[Sentence], test_share: float = 0.2) -> tuple[list[Sentence], list[Sentence]]:
    """Train and test sentences: which side one falls on depends on its words alone.

    Args:
        sentences: What `collect_sentences` returned: without near-duplicates, so that none is on both sides.
        test_share: Share of the test side, between 0 and 1; a share of the sentences only on average.

    Returns:
        The sentences to train on and those to test on.

    Example:
        >>> words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        >>> train, test = split_sentences([Sentence(f"Return {word} of them.", "numbers", "math") for word in words])
        >>> len(train), len(test)
        (7, 3)
    """
    # The last digits: the first ones are the order that `first_of_each_topic` cuts by.
    in_test = [int(order_key(sentence)[-8:], 16) < test_share * 16**8 for sentence in sentences]
    train = [sentence for sentence, test in zip(sentences, in_test, strict=True) if not test]
    test = [sentence for sentence, test in zip(sentences, in_test, strict=True) if test]
    return train, test
