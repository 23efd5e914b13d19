"""Where the classification head starts: as initialised, or from the training set.

A head that starts far from the mean label sends a large, uniform gradient into the adapter during the first steps.
"""

from __future__ import annotations

from collections.abc import Callable

import datasets
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..errors import CraftError
from .encoding import longest_first
from .pretrained import head_modules, new_modules
from .tasks import Task

EXAMPLES = 512
RIDGE = 0.01
"""Penalty on the squared weights in `fitted`: keeps the fit of a few hundred examples from being exact."""


def start_at_prior(output: nn.Linear, features: Callable[[], Tensor], labels: Tensor, task: Task) -> None:
    """Zero weight; the bias predicts the mean label, or the class frequencies."""
    nn.init.zeros_(output.weight)
    if output.bias is None:
        return
    if task.is_regression:
        prior = labels.mean()[None]
    else:
        # One row more of each class, so that a class without rows gets no infinite bias.
        counts = labels.bincount(minlength=task.outputs) + 1
        prior = (counts / counts.sum()).log()
    with torch.no_grad():
        output.bias.copy_(prior)


def fit_output(output: nn.Linear, features: Callable[[], Tensor], labels: Tensor, task: Task) -> None:
    """Minimises the task's loss with a ridge penalty over the output layer alone, on the frozen model's features.

    A convex problem: the result does not depend on the random start, up to the optimizer's tolerance.
    """
    inputs = features()
    start_at_prior(output, features, labels, task)
    optimizer = torch.optim.LBFGS(output.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        predicted = output(inputs)
        if task.is_regression:
            loss = functional.mse_loss(predicted[:, 0], labels)
        else:
            loss = functional.cross_entropy(predicted, labels)
        loss = loss + RIDGE * output.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    optimizer.zero_grad()


HEAD_STARTS: dict[str, Callable[[nn.Linear, Callable[[], Tensor], Tensor, Task], None] | None] = {
    "random": None,
    "prior": start_at_prior,
    "fitted": fit_output,
}
"""How a head can start; None leaves it as the model initialised it."""


def start_head(
    model: PreTrainedModel, task: Task, rows: datasets.Dataset, collator: DataCollatorWithPadding, start: str, seed: int
) -> None:
    """Sets the output layer of a model's head.

    Args:
        model: A model that was just given its head; the rest of it is only read.
        task: What it will predict.
        rows: Encoded training rows; a `sample` of them is used.
        collator: Makes batches of them.
        start: A key of `HEAD_STARTS`.
        seed: Decides which rows are looked at.

    Raises:
        CraftError: An unknown start, or no output layer of the right width.
    """
    if start not in HEAD_STARTS:
        raise CraftError(f"Unknown head start `{start}`. Use one of {', '.join(HEAD_STARTS)}.")
    set_output = HEAD_STARTS[start]
    if set_output is None:
        return
    parts = [model.get_submodule(path) for path in (*new_modules(model), *head_modules(model))]
    layers = (layer for part in parts for layer in part.modules())
    outputs = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.out_features == task.outputs]
    if not outputs:
        raise CraftError(
            f"{type(model).__name__} has no linear layer with {task.outputs} outputs to start with `{start}`. "
            "Use the head start `random`."
        )
    chosen = sample(rows, seed)
    chosen = chosen.select(longest_first(chosen))
    labels = torch.tensor(list(chosen["labels"]), dtype=torch.float32 if task.is_regression else torch.int64)
    set_output(outputs[-1], lambda: _output_inputs(model, outputs[-1], chosen, collator), labels, task)


def sample(rows: datasets.Dataset, seed: int) -> datasets.Dataset:
    """`EXAMPLES` of the rows, or all if there are fewer, which and in what order the seed decides."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:EXAMPLES]
    return rows.select(order.tolist())


@torch.no_grad()
def _output_inputs(
    model: PreTrainedModel, output: nn.Linear, rows: datasets.Dataset, collator: DataCollatorWithPadding
) -> Tensor:
    """One vector a text: what the output layer gets where the model reads its answer."""
    seen: list[Tensor] = []
    hook = output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    was_training = model.training
    model.eval()
    vectors = []
    try:
        for batch in DataLoader(rows.remove_columns("labels"), batch_size=32, collate_fn=collator):
            seen.clear()
            logits = model(**batch).logits
            vectors.append(_answer_vectors(seen[-1], batch["attention_mask"]))
            if not torch.allclose(output(vectors[-1]), logits, atol=1e-4, rtol=1e-3):
                raise CraftError(
                    f"The head of {type(model).__name__} does not end in a linear layer on one vector a text, so that "
                    "it cannot be fitted. Use `head_start='random'`."
                )
    finally:
        hook.remove()
        model.train(was_training)
    return torch.cat(vectors)


def _answer_vectors(inputs: Tensor, attention_mask: Tensor) -> Tensor:
    if inputs.shape[:-1].numel() == len(inputs):
        return inputs.flatten(1)
    # A decoder applies its head to every token and answers at the last one that is not padding.
    last = (attention_mask * torch.arange(1, attention_mask.shape[1] + 1)).argmax(dim=1)
    return inputs[torch.arange(len(inputs)), last]
