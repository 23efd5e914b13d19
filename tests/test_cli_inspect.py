"""What `craft-peft inspect` says, against the plain definitions and against adapters that are really built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from small_models import WIDTH, bert, gpt2
from tiny_encoder import write_encoder
from torch import nn

from craft_peft import CraftConfig, CraftError, explained_energy, hosvd, unfold
from craft_peft.cli.inspect import advice, short_names
from craft_peft.cli.main import main
from craft_peft.glue.inspection import StackReport, candidate_ranks, clip_ranks, inspect_model


class Layers(nn.Module):
    """A model with one stack of matrices that are not square."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(9, 12)}) for _ in range(4))

    def stack(self) -> torch.Tensor:
        return torch.stack([layer["up"].weight.detach() for layer in self.layers])


@pytest.fixture(scope="module")
def model() -> Layers:
    return Layers()


@pytest.fixture(scope="module")
def report(model: Layers) -> StackReport:
    (only,) = inspect_model(model, ["up"], (3, 5, 4))
    return only


@pytest.mark.parametrize("ranks", [(3, 5, 4), (4, 12, 9), (1, 1, 1), (2, 12, 3)])
def test_energy_of_any_ranks_is_that_of_their_own_decomposition(
    model: Layers, report: StackReport, ranks: tuple[int, int, int]
) -> None:
    stack = model.stack()
    tucker = hosvd(stack, ranks)
    assert report.energy(ranks) == pytest.approx(explained_energy(stack, tucker).item(), abs=1e-5)
    assert report.layer_energies(ranks) == pytest.approx(explained_energy(stack, tucker, mode=0).tolist(), abs=1e-5)


def test_energy_is_by_default_that_of_the_chosen_ranks(report: StackReport) -> None:
    assert report.energy() == report.energy((3, 5, 4))
    assert report.layer_energies() == report.layer_energies((3, 5, 4))
    assert 0 < report.energy() < 0.9


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_singular_values_are_those_of_the_unfolding(model: Layers, report: StackReport, mode: int) -> None:
    expected = torch.linalg.svdvals(unfold(model.stack(), mode))
    torch.testing.assert_close(report.singular_values(mode), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_rank_for_is_the_smallest_that_holds_the_share(report: StackReport, share: float) -> None:
    rank = report.rank_for(share)
    assert report.energy(clip_ranks(report, rank)) >= share
    assert rank == 1 or report.energy(clip_ranks(report, rank - 1)) < share


def test_counts_and_sizes_are_those_of_the_adapter(tmp_path: Path) -> None:
    base, ranks = bert(), (3, 8, 5)
    reports = inspect_model(base.bert, ranks=ranks)
    adapted = get_peft_model(base, CraftConfig(target_modules=["query", "value"], ranks=ranks))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert sum(report.trained() for report in reports) == trained
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    # The rest, indices and fingerprints, is a hundred bytes or so.
    saved = sum(t.nbytes for name, t in tensors.items() if not name.endswith(("index", "fingerprint")))
    assert sum(report.stored_bytes() for report in reports) == saved


def test_default_targets_follow_the_model_type() -> None:
    (only,) = inspect_model(gpt2().transformer)
    assert (only.pattern, only.shape.matrix, only.ranks) == ("h.*.attn.c_attn", (3 * WIDTH, WIDTH), (3, 48, 16))


def test_all_linear_leaves_no_layer_out() -> None:
    names = short_names(inspect_model(bert().bert, "all-linear", (1, 4, 4)))
    assert {"query", "key", "value", "pooler.dense", "attention.output.dense"} <= set(names)


def test_short_names_grow_until_they_differ(report: StackReport) -> None:
    patterns = ["encoder.*.attn.q", "decoder.*.attn.q"]
    reports = [StackReport(pattern, report.shape, report.ranks, report.full) for pattern in patterns]
    assert short_names(reports) == patterns
    assert short_names([*reports, report]) == [*patterns, "up"]
    assert short_names(reports[:1]) == ["q"]


def test_advice_names_the_ranks_that_hold_half(report: StackReport) -> None:
    rank = report.rank_for(0.5)
    text = " ".join(advice([report]))
    assert f"--ranks 4,{rank},{min(rank, 9)}" in text
    assert f"{4**2 + rank**2 + min(rank, 9) ** 2:,} trained" in text
    assert "layer rank is below the number of layers" in text


def test_candidate_ranks_stay_below_the_matrix_size() -> None:
    reports = inspect_model(bert(width=64).bert)
    assert candidate_ranks(reports) == [4, 8, 16, 32, 50]


def test_unknown_model_type_needs_target_modules(model: Layers) -> None:
    with pytest.raises(CraftError, match=r"^Please specify `target_modules` in .* has no default target modules.*'up'"):
        inspect_model(model)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


def test_command_prints_stacks_energy_and_parameters(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plot = tmp_path / "spectra.png"
    assert main(["inspect", "--model", encoder, "--ranks", "2,8,8", "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "query: encoder.layer.*.attention.self.query" in printed
    for expected in ("2 x 16 x 16", "2, 8, 8", "132", "264", "Half of every stack", str(plot)):
        assert expected in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--ranks", "9,8,8"],
            "number 1 of `--ranks`, 9, keeps more layer directions than stack 'query' has layers (2)",
        ),
        (["--ranks", "2,8"], "three whole numbers"),
        (["--ranks", "2,0,8"], "at least 1"),
        (["--target-modules", "qery"], "Did you mean 'query'?"),
        (["--target-modules", "LayerNorm"], "not a linear layer"),
        (["--plot", "spectra.pdf"], "does not end in .png"),
        (["--plot", "no/such/folder/spectra.png"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], message: str, encoder: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", "--model", encoder, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_or_empty_model_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", "--model", str(tmp_path / "none")]) == 2
    assert "There is no model folder" in capsys.readouterr().err
    assert main(["inspect", "--model", str(tmp_path)]) == 2
    assert "Could not read a model" in capsys.readouterr().err
