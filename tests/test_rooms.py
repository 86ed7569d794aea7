"""Who may import whom: downwards only, and nothing heavy where it is not used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pythia_jax

PACKAGE = Path(pythia_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Top to bottom; the rooms of one floor do not import each other.
FLOORS = (
    {"cli"},
    {"prompts", "quickstart"},
    {"evaluation", "interp"},
    {"bridge"},
    {"training"},
    {"model", "data"},
    {"sharding"},
    {"configs"},
    {"data_config", "model_config", "recipe"},
    {"chips", "config_parsing", "files", "suite"},
)
FLOOR_OF = {room: i for i, floor in enumerate(FLOORS) for room in floor}
EXPERIMENTAL = ("splash_attention", "mesh_utils", "topologies")
"""Of jax.experimental, what has no other home: the TPU kernel, meshes over several slices, and
compiling for TPUs that are not there."""
DOORS = {"__init__", "__main__"}
"""Modules at the top of the package that only open it: the lazy names, `python -m pythia_jax`."""
FRONT_DOOR = {"pythia_jax", *(f"pythia_jax.{name}" for name in pythia_jax.__all__)} - {
    "pythia_jax.data",  # rooms as well as names
    "pythia_jax.interp",
}
AT_HOME = {"pythia_jax.evaluation.harness": {"lm_eval"}}
"""Optional libraries that a module imports at its top: its class derives from one of theirs, and
it is itself imported in functions alone."""
EXTRAS = {
    "datasets",
    "fsspec",
    "gcsfs",
    "huggingface_hub",
    "ipykernel",
    "lm_eval",
    "nbclient",
    "nbformat",
    "pyarrow",
    "tensorflow",
    "torch",
    "torch_xla",
    "transformers",
    "wandb",
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, *, top_level_only=False):
    """Full names of what a file imports, relative imports resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in statements(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], base]).rstrip(".")
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def statements(tree):
    """What runs on import: the body, and what stands in its `try`s, but no `if TYPE_CHECKING`."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.Try):
            yield from node.body


def room(name):
    """`model` of `pythia_jax.model.loss`; None for what is not ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == "pythia_jax" and len(parts) > 1 else None


def files_of(*rooms):
    return [path for path in FILES if room(module_name(path)) in rooms]


def outside(path, **how):
    return {name.split(".")[0] for name in imports(path, **how)} - {"pythia_jax"}


def test_the_reader_of_imports_sees_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "pythia_jax")
    file = tmp_path / "pythia_jax" / "model" / "loss.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os.path\nfrom pythia_jax import configs\nfrom . import sites\n"
        "from ..bridge import hf\ndef f():\n    import torch\n"
        "try:\n    import grain\nexcept ImportError:\n    pass\n"
    )
    everything = imports(file)
    assert everything == {
        "os.path",
        "pythia_jax.configs",
        "pythia_jax.model.sites",
        "pythia_jax.bridge.hf",
        "grain",
        "torch",
    }
    assert imports(file, top_level_only=True) == everything - {"torch"}
    assert {room(name) for name in everything} == {None, "configs", "model", "bridge"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_stands_in_a_known_room(path):
    name = room(module_name(path))
    assert name is None or name in FLOOR_OF or name in DOORS


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_rooms_import_downwards_only(path):
    own = room(module_name(path))
    if own is None or own in DOORS:
        return
    for name in imports(path):
        if name.split(".")[0] != "pythia_jax" or room(name) in (own, "__version__"):
            continue
        # The front door (`pj.load`) opens the bridge and what lies under it.
        below = FLOOR_OF["bridge"] if name in FRONT_DOOR else FLOOR_OF.get(str(room(name)))
        assert below is not None, f"{module_name(path)} imports {name}, which is no room"
        assert FLOOR_OF[own] < below, f"{module_name(path)} imports {name}, which is not below it"


@pytest.mark.parametrize(
    "path",
    files_of("data", "configs", "data_config", "recipe", "config_parsing", "files", "suite"),
    ids=module_name,
)
def test_data_and_configs_import_neither_jax_nor_grain(path):
    heavy = {"jax", "jaxlib", "grain", "flax", "optax", "orbax", "jaxtyping", "chex"}
    assert not outside(path) & heavy


def test_data_and_configs_come_in_without_jax():
    code = (
        "import sys, pythia_jax; pythia_jax.data, pythia_jax.ModelConfig, pythia_jax.load_config;"
        "sys.exit(bool({'jax', 'grain', 'torch', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False)
    assert ran.returncode == 0


@pytest.mark.parametrize("path", files_of("model"), ids=module_name)
def test_model_knows_no_files(path):
    files = {"glob", "io", "json", "mmap", "os", "pathlib", "pickle", "shutil", "tempfile", "yaml"}
    stores = {"orbax", "safetensors", "tensorstore", "etils", "grain"}
    assert not outside(path) & (files | stores)
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    called = {f.id if isinstance(f, ast.Name) else getattr(f, "attr", "") for f in calls}
    assert not called & {"open", "save", "savez", "load", "memmap", "fromfile", "tofile"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_torch_is_imported_nowhere_and_other_extras_only_where_used(path):
    assert not outside(path) & {"torch", "torch_xla"}
    at_home = AT_HOME.get(module_name(path), set())
    assert not outside(path, top_level_only=True) & EXTRAS - at_home
    for name in imports(path, top_level_only=True):
        assert not any(f"{name}.".startswith(f"{home}.") for home in AT_HOME)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_public_names_of_jax_are_used(path):
    for name in imports(path):
        assert not name.startswith(("jax._src", "jaxlib", "jax.interpreters", "jax.core"))
        if name.startswith("jax.experimental"):
            assert any(part in name for part in EXPERIMENTAL), f"{name}: not one of the exceptions"


@pytest.mark.parametrize("name", sorted(pythia_jax.__all__))
def test_every_public_name_opens(name):
    assert getattr(pythia_jax, name) is not None
    assert name in dir(pythia_jax)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = pythia_jax.nothing_here
