"""Several methods on one task, side by side: a table for the terminal and one HTML page that needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.table import Table

from .inference import Prediction
from .methods import METHODS
from .results import Result

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = ("#8a8f98", "#d9822b", "#2166ac", "#4d9221", "#7b3294")


@dataclass(frozen=True)
class Classified:
    """A sentence with its true label and what a model said.

    Args:
        text: The sentence.
        label: Its true label.
        prediction: The model's answer.
    """

    text: str
    label: str
    prediction: Prediction


def comparison_cells(result: Result) -> tuple[str, str, str, str, str]:
    """One row of the table: method, accuracy, trained numbers, seconds, size of the saved weights."""
    size = f"{result.parameters.stored_bytes / 1e6:,.2f} MB"
    return (
        result.method,
        f"{result.score.last:.1%}",
        f"{result.parameters.trainable:,}",
        f"{result.seconds:,.0f}",
        size if result.parameters.adapter else f"{size} (whole model)",
    )


COLUMNS = ("method", "accuracy", "trained numbers", "seconds", "saved")


def comparison_table(results: Sequence[Result], title: str) -> Table:
    """The results as a table for the terminal.

    Args:
        results: One a method.
        title: Above the table.

    Returns:
        The table.
    """
    table = Table(COLUMNS[0], title=title)
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(*comparison_cells(result))
    return table


def draw_learning(results: Sequence[Result]) -> Figure:
    """Draws the training loss over the steps, and the accuracy after each epoch."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result, colour in zip(results, COLOURS, strict=False):
        steps, losses = [point[0] for point in result.loss], [point[1] for point in result.loss]
        left.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        left.plot(steps, smooth(losses), color=colour, linewidth=1.8)
        epochs = [record.epoch for record in result.curve]
        scores = [100 * record.score for record in result.curve]
        right.plot(epochs, scores, color=colour, marker="o", label=result.method)
    left.set(xlabel="step", ylabel="training loss", title="Loss (thick: running mean)", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="accuracy in %", title="Accuracy on sentences not trained on", ylim=(0, 100))
    right.set_xticks(sorted({record.epoch for result in results for record in result.curve}))
    right.legend(loc="lower right")
    return figure


def smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """The running mean over a window; shorter windows at both ends, so that nothing is cut off.

    Example:
        >>> smooth([1.0, 2.0, 6.0], width=3)
        [1.5, 3.0, 4.0]
    """
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [float(np.mean(window)) for window in windows]


def draw_confusion(labels: Sequence[str], classified: Sequence[Classified], method: str) -> Figure:
    """Draws how the sentences of each label were classified, in percent of the label."""
    counts = np.zeros((len(labels), len(labels)))
    for sentence in classified:
        counts[labels.index(sentence.label), labels.index(str(sentence.prediction.label))] += 1
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = shares[row, column]
        axis.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 55 else "black")
    axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xlabel="classified as", ylabel="topic", title=f"{method}, in % of each topic")
    return figure


def as_image(figure: Figure) -> str:
    """A figure as the source of an HTML image: SVG inside the page, the same for the same figure."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "craft-peft"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(
    path: Path, results: Sequence[Result], labels: Sequence[str], classified: Sequence[Classified], examples: int = 12
) -> None:
    """Writes the comparison as one HTML file, pictures included.

    Args:
        path: The file.
        results: One a method; the last is the one that classified.
        labels: All labels.
        classified: The development sentences as the last method's model classified them.
        examples: So many of them are shown.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    counts = [sum(sentence.label == label for sentence in classified) for label in labels]
    page = environment.get_template("comparison.html.jinja").render(
        columns=COLUMNS,
        rows=[comparison_cells(result) for result in results],
        results=results,
        labels=labels,
        summaries={result.method: METHODS[result.method].summary for result in results},
        trained_on=results[-1].data["train"],
        tested=len(classified),
        most_frequent=f"{max(counts) / len(classified):.1%}",
        examples=classified[:examples],
        learning=as_image(draw_learning(results)),
        confusion=as_image(draw_confusion(labels, classified, results[-1].method)),
    )
    path.write_text(page, encoding="utf-8")
