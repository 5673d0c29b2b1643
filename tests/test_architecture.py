"""The layers of the package: imports go down only, and never in a circle."""

from __future__ import annotations

import graphlib
from collections.abc import Iterator

import grimp
import pytest

PACKAGE = "curveball_fused"
# The drawing, top to bottom. What stands on a line imports from lines below, and not from its neighbors. It counts
# wherever an import stands: in a function, too, or for type checkers only.
LAYERS = {
    PACKAGE: [
        "__main__",
        "explanation cuda_graphs integrations monitoring loss_ops",
        "optimizer",
        "advice",
        "step step_arguments",
        "between_solves",
        "quadratic_model",
        "debug",
        "checks",
        "batch guard loss_scale outputs state",
        "settings",
        "curvature losses preconditioners",
        "autograd_graph data_parallel replay",
        "ops",
        "backends",
        "_torch_private user_warnings",
    ],
    f"{PACKAGE}.backends": ["selection", "reference triton native", "scalars dtypes"],
}
WHERE = "Imports go down only: LAYERS in tests/test_architecture.py is the drawing, docs/architecture.md explains it."


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(PACKAGE, cache_dir=None)


def child(package: str, module: str) -> str | None:
    """Return the name of the part of `package` that `module` belongs to; None for the package itself, or another."""
    return module.removeprefix(f"{package}.").partition(".")[0] if module.startswith(f"{package}.") else None


def within(graph: grimp.ImportGraph, package: str) -> Iterator[tuple[str, str, str, str]]:
    """All imports between two parts of `package`: importer, imported, and the parts that they belong to."""
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            upper, lower = child(package, importer), child(package, imported)
            if upper and lower and upper != lower:
                yield importer, imported, upper, lower


def told(graph: grimp.ImportGraph, importer: str, imported: str) -> str:
    """An import as a reader finds it."""
    lines = [
        f"line {d['line_number']}: {d['line_contents']}"
        for d in graph.get_import_details(importer=importer, imported=imported)
    ]
    return f"{importer} imports {imported} ({'; '.join(lines)})"


def upwards(graph: grimp.ImportGraph, package: str) -> list[str]:
    """The imports that do not go down."""
    level = {name: i for i, line in enumerate(LAYERS[package]) for name in line.split()}
    return [
        f"{told(graph, importer, imported)}, but {lower} is not below {upper}."
        for importer, imported, upper, lower in within(graph, package)
        if level[upper] >= level[lower]
    ]


@pytest.mark.parametrize("package", LAYERS)
def test_every_part_has_its_place_in_the_drawing(imports: grimp.ImportGraph, package: str) -> None:
    drawn = [name for line in LAYERS[package] for name in line.split()]
    there = {child(package, module) for module in imports.find_children(package)}
    assert sorted(drawn) == sorted(there), f"{package}: give new parts a line in LAYERS, and take out those that went."


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_down(imports: grimp.ImportGraph, package: str) -> None:
    wrong = upwards(imports, package)
    assert not wrong, "\n".join([*wrong, WHERE])


def test_nothing_but_the_program_imports_the_package_as_a_whole(imports: grimp.ImportGraph) -> None:
    assert imports.find_modules_that_directly_import(PACKAGE) <= {f"{PACKAGE}.__main__"}, WHERE


def circle(edges: dict[str, set[str]]) -> str:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def test_no_modules_import_in_a_circle(imports: grimp.ImportGraph) -> None:
    found = circle({module: imports.find_modules_directly_imported_by(module) for module in imports.modules})
    assert not found, f"{found}. {WHERE}"


def test_no_packages_import_in_a_circle(imports: grimp.ImportGraph) -> None:
    """Whatever the modules are that make the connection."""
    for package in (m for m in imports.modules if imports.find_children(m)):
        edges: dict[str, set[str]] = {}
        for _, _, upper, lower in within(imports, package):
            edges.setdefault(upper, set()).add(lower)
        found = circle(edges)
        assert not found, f"in {package}: {found}. {WHERE}"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("ops.losses", "state"), ("guard", "state"), ("backends.dtypes", "backends.reference.losses")],
    ids=["up", "aside", "within backends"],
)
def test_an_import_that_does_not_go_down_is_told(imports: grimp.ImportGraph, importer: str, imported: str) -> None:
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    graph.add_import(
        importer=f"{PACKAGE}.{importer}", imported=f"{PACKAGE}.{imported}", line_number=7, line_contents="import it"
    )
    package = f"{PACKAGE}.backends" if importer.startswith("backends") else PACKAGE
    (sentence,) = upwards(graph, package)
    assert sentence.startswith(f"{PACKAGE}.{importer} imports {PACKAGE}.{imported} (line 7: import it), but ")


def test_a_circle_is_told() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle({"a": {"b", "c"}, "b": {"c"}})
