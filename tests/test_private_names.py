"""Private names of dependencies: each is known, is used in one module, and was read in the version installed."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hpo"

READ_IN = {"optuna": "5.0", "mlflow": "3.17"}
"""Minor versions in which the private names were read; pyproject.toml allows no other."""

KNOWN = {
    # Optuna: tables that are written in one statement, a cache that is told what we wrote, and what samplers need.
    "optuna.storages._rdb.models": 1,
    "optuna.storages._CachedStorage": 1,
    "optuna._transform._SearchSpaceTransform": 1,
    "optuna._typing.JSONSerializable": 1,
    "study._storage": 1,
    "study._study_id": 1,
    "trial._trial_id": 1,
    # MLflow: its schema, created in a file aside.
    "mlflow.store.db.utils._initialize_tables": 1,
    # PyTorch: base classes of layers, operations on lists of tensors, the fused optimizers, the engine of
    # autograd, the compiler, which types a CPU multiplies, and whether a tensor was changed in place.
    # The fused optimizers and the engine were run with torch 2.9.0 and 2.15.0, the oldest allowed and the newest.
    "inputs._version": 1,
    "torch.nn.modules.batchnorm._BatchNorm": 3,
    "nn.modules.batchnorm._BatchNorm": 1,
    "torch.nn.modules.dropout._DropoutNd": 1,
    "torch._foreach_*": 2,
    "torch.ops.aten._foreach_*": 1,
    "torch._fused_sgd_": 1,
    "torch._fused_adam_": 1,
    "torch._fused_adamw_": 1,
    "torch.autograd.Variable._execution_engine": 1,
    "torch._higher_order_ops.scan": 1,
    "torch._dynamo": 1,
    "torch._dynamo.exc.TorchDynamoException": 1,
    "torch._inductor": 1,
    "torch._inductor.config": 1,
    "torch.cpu._is_avx512_bf16_supported": 1,
    "torch.cpu._is_amx_tile_supported": 1,
}
"""How many modules of hpo use each of them."""


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith("hpo"):
                whole = [f"{module}.{name.name}" for name in names]
                yield from {module if is_private(module) and module.endswith("models") else name for name in whole}
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.Attribute(value=ast.Name(id="self" | "cls" | "os") | ast.Call()):
                pass
            case ast.Attribute(value=value, attr=attr) if is_private(attr):
                yield f"{ast.unparse(value)}.{attr}"


def test_every_private_name_of_a_dependency_is_known_and_stays_in_its_module() -> None:
    modules: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for name in filter(is_private, private_names(ast.parse(path.read_text()))):
            modules[re.sub(r"(?<=\b_foreach_).*", "*", name)].add(path.name)
    assert {name: len(users) for name, users in modules.items()} == KNOWN


def test_the_private_names_were_read_in_the_version_that_is_installed() -> None:
    assert {name: version(name).rpartition(".")[0] for name in READ_IN} == READ_IN
