"""Mutation testing: what share of small faults in the heart of the package do the tests find?

    python benchmarks/mutants.py map                    runs all tests once under coverage: which test runs which line
    python benchmarks/mutants.py run --sample 300       300 faults, one at a time, against the tests that run their line

Faults are those of cosmic-ray (operators, comparisons, numbers, keywords, loops, decorators, exceptions); those that change
annotations alone are left out. The sample takes one fault per place, by a hash of the function, the line's text and the fault, so
code that has only moved gets the same faults again. A fault's tests run from the cheapest on, up to a budget of recorded seconds,
and stop at the first failure; a fault that outlives the budget counts as survived. Needs cosmic-ray, coverage and pytest-cov.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
AREAS = (
    *("vit_tucker/tensor/*.py", "vit_tucker/attention/*.py", "vit_tucker/attention/variants/**/*.py"),
    *("vit_tucker/patching/*.py", "vit_tucker/hosts/*.py", "vit_tucker/conversion/*.py"),
    *("vit_tucker/training/state.py", "vit_tucker/training/saved_state.py", "vit_tucker/storage/checkpoints.py"),
)
PRELOADED = (
    *("torch", "timm", "torchvision", "accelerate", "numpy", "pytest", "hypothesis", "sklearn.datasets", "pydantic"),
    *("matplotlib.pyplot", "torch._dynamo", "torch.utils.tensorboard", "safetensors.torch", "peft", "transformers"),
)
SHARE_SLACK, SLACK = 6.0, 90.0
"""A fault is taken for an endless loop after so many times the recorded seconds of its tests, and so many seconds more."""


@dataclass
class Mutant:
    """One fault.

    Attributes:
        file: below the root.
        line: first line of the change.
        function: that it is in; '' for the module.
        operator: of cosmic-ray.
        occurrence: number of the place among those of the operator in the file.
        before, after: the line's text.
        tests: ids of the tests that run the line, cheapest first; empty if none does.
        outcome: "killed", "timeout", "survived" or "not run" (no test runs the line, so it survives).
        seconds: of the tests.
    """

    file: str
    line: int
    function: str
    operator: str
    occurrence: int
    before: str
    after: str = ""
    tests: list[str] = field(default_factory=list)
    outcome: str = "not run"
    seconds: float = 0.0


def without_annotations(source: str) -> str:
    """The syntax tree of a source as text, without annotations and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)
    return ast.dump(tree)


def mutants_of(root: Path, file: str) -> Iterator[Mutant]:
    """All faults of a file, not yet made: without ``after``."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery

    source = (root / file).read_text()
    lines, nodes = source.split("\n"), list(ast_nodes(get_ast(source)))
    for name in sorted(plugins.operator_names()):
        operator_class = plugins.get_operator(name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        places = [(node, begin[0]) for node in nodes for begin, _ in operator.mutation_positions(node)]
        for occurrence, (node, line) in enumerate(places):
            function = ASTQuery(node).get_definition_name() or ""
            yield Mutant(file, line, function, name, occurrence, lines[line - 1].strip())


def mutate(mutant: Mutant, source: str) -> str | None:
    """The source with the fault; None if it changes annotations alone, or can't be made."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    mutated: str | None = mutate_code(source, plugins.get_operator(mutant.operator)(), mutant.occurrence)
    try:
        same = mutated is None or without_annotations(mutated) == without_annotations(source)
    except SyntaxError:
        return None
    return None if same else mutated


def sample(mutants: Iterable[Mutant], root: Path, count: int, seed: int) -> list[Mutant]:
    """One fault per line, ``count`` of them, by a hash that knows neither file nor line number."""
    groups: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in mutants:  # faults of one kind in one line are told apart by their order
        groups.setdefault((str(seed), mutant.function, mutant.before, mutant.operator), []).append(mutant)
    keys = {
        hashlib.sha256("\0".join((*words, str(number))).encode()).hexdigest(): mutant
        for words, group in groups.items()
        for number, mutant in enumerate(group)
    }
    chosen: dict[tuple[str, int], Mutant] = {}
    for _, mutant in sorted(keys.items()):
        place, source = (mutant.file, mutant.line), (root / mutant.file).read_text()
        if place not in chosen and (mutated := mutate(mutant, source)) is not None:
            pairs = zip(source.split("\n"), mutated.split("\n"), strict=False)
            mutant.before, mutant.after = next((a.strip(), b.strip()) for a, b in pairs if a != b)
            chosen[place] = mutant
        if len(chosen) == count:
            break
    return list(chosen.values())


def read_map(root: Path, folder: Path) -> tuple[dict[tuple[str, int], set[str]], dict[str, float]]:
    """Tests by file and line, and seconds by test, of an earlier ``map``."""
    from coverage import CoverageData

    data = CoverageData(str(folder / "coverage"))
    data.read()
    lines: dict[tuple[str, int], set[str]] = {}
    for measured in data.measured_files():
        if not measured.startswith(f"{root}/"):
            continue
        for line, contexts in data.contexts_by_lineno(measured).items():
            names = {context.rpartition("|")[0] for context in contexts if "|" in context}
            lines[measured[len(str(root)) + 1 :], line] = names
    seconds = json.loads((folder / "seconds.json").read_text())
    return lines, seconds


def make_map(root: Path, folder: Path, arguments: Sequence[str]) -> None:
    """Run all tests under coverage, each a context of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "coveragerc"
    config.write_text(f"[run]\ndata_file = {folder / 'coverage'}\nsource = {root / 'vit_tucker'}\n")
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--cov", "--cov-context=test", "-q"]
    command += [f"--cov-config={config}", "--cov-report=", f"--junitxml={folder / 'tests.xml'}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(command, cwd=root, env=environment, check=False)
    seconds = {}
    for case in ET.parse(folder / "tests.xml").iter("testcase"):
        *parts, _ = (case.get("classname") or "").split("."), None
        seconds[test_id(root, parts[0], case.get("name") or "")] = float(case.get("time") or 0)
    (folder / "seconds.json").write_text(json.dumps(seconds))


def test_id(root: Path, parts: Sequence[str], name: str) -> str:
    """Returns pytest's name of a test: ('tests', 'x', 'TestY'), 'test_z' -> 'tests/x.py::TestY::test_z'."""
    for count in range(len(parts), 0, -1):
        file = "/".join(parts[:count]) + ".py"
        if (root / file).is_file():
            return "::".join([file, *parts[count:], name])
    return name


def tests_of(mutant: Mutant, root: Path, lines: dict[tuple[str, int], set[str]]) -> set[str]:
    """The tests that run a fault's line, or its statement; those that run anything of its file for a line that imports run."""
    starts = [mutant.line]
    for node in ast.walk(ast.parse((root / mutant.file).read_text())):
        if isinstance(node, ast.stmt) and node.lineno <= mutant.line <= (node.end_lineno or node.lineno):
            starts.append(node.lineno)
    for line in (mutant.line, max(starts[1:], default=mutant.line)):
        if found := lines.get((mutant.file, line)):
            return found
    return set().union(*(tests for (file, _), tests in lines.items() if file == mutant.file))


def choose_tests(tests: set[str], seconds: dict[str, float], file: str, budget: float) -> list[str]:
    """The tests of a line from the cheapest on, those of the file's own test file first, up to a budget of seconds."""
    own, spent = f"/test_{Path(file).stem}.py::", 0.0
    chosen: list[str] = []
    for test in sorted(tests, key=lambda t: (own not in t, seconds.get(t, 1.0), t)):
        spent += seconds.get(test, 1.0)
        if chosen and spent > budget:
            break
        chosen.append(test)
    return chosen


def run_mutant(mutant: Mutant, root: Path, copy: Path, seconds: dict[str, float], log: Path) -> None:
    """Run a fault's tests in a forked process, in a copy of the checkout; notes the outcome."""
    source = (root / mutant.file).read_text()
    mutated = mutate(mutant, source)
    assert mutated is not None
    (copy / mutant.file).write_text(mutated)
    started, limit = time.monotonic(), SLACK + SHARE_SLACK * sum(seconds.get(t, 1.0) for t in mutant.tests)
    child = os.fork()
    if child == 0:
        os.setsid()
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        import pytest

        os._exit(
            int(
                pytest.main(
                    ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:pytest_cov", *mutant.tests]
                )
            )
        )
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - started < limit:
        time.sleep(0.05)
    if done[0] == 0:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        mutant.outcome = "timeout"
    else:
        mutant.outcome = "survived" if os.waitstatus_to_exitcode(done[1]) == 0 else "killed"
    mutant.seconds = round(time.monotonic() - started, 1)
    (copy / mutant.file).write_text(source)


def copy_checkout(root: Path, copy: Path) -> None:
    """The files of a checkout that git knows."""
    shutil.rmtree(copy, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)


def run_sample(args: argparse.Namespace) -> None:
    """Sample faults, run them, write a CSV as they are done."""
    root, folder = args.root.resolve(), args.folder.resolve()
    lines, seconds = read_map(root, folder)
    files = sorted({str(f.relative_to(root)) for area in AREAS for f in root.glob(area)})
    everything = [mutant for file in tqdm(files, "faults") for mutant in mutants_of(root, file)]
    chosen = sample(everything, root, args.sample, args.seed)
    print(f"{len(everything):,} faults in {len(files)} files; {len(chosen)} are tried")
    for mutant in chosen:
        mutant.tests = choose_tests(tests_of(mutant, root, lines), seconds, mutant.file, args.budget)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for module in PRELOADED:
        importlib.import_module(module)
    copy = folder / f"copy{args.part}"
    copy_checkout(root, copy)
    done = []
    mine = chosen[args.part :: args.parts]
    for number, mutant in enumerate(tqdm(mine, "tried")):
        if mutant.tests:
            run_mutant(mutant, root, copy, seconds, folder / f"log{args.part}.{number}.txt")
        done.append(mutant)
        write_csv(args.out, done)
    shutil.rmtree(copy)
    counts = Counter(mutant.outcome for mutant in done)
    found = counts["killed"] + counts["timeout"]
    print(f"{found} of {len(done)} found ({found / len(done):.1%}): {dict(counts)}")


def write_csv(file: Path, mutants: Sequence[Mutant]) -> None:
    """One row per fault."""
    rows = [{**asdict(mutant), "tests": len(mutant.tests)} for mutant in mutants]
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Mutation testing of the heart of the package.")
    parser.add_argument("step", choices=("map", "run"))
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to test")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs/mutants", help="coverage, logs, copies of the checkout"
    )
    parser.add_argument("--out", type=Path, default=Path("mutants.csv"), help="results")
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60.0, help="recorded seconds of tests per fault")
    parser.add_argument("--part", type=int, default=0, help="which of several processes this is")
    parser.add_argument("--parts", type=int, default=1)
    args, rest = parser.parse_known_args()
    if args.step == "map":
        make_map(args.root.resolve(), args.folder.resolve(), rest)
    else:
        run_sample(args)


if __name__ == "__main__":
    main()
