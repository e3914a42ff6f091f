"""What `./run.sh test --quick` leaves out: files about processes are marked slow, and one case per attention method stays."""

import re
from pathlib import Path

import pytest

from tests.conftest import LEFT_OUT, quick_case

ROOT = Path(__file__).parent
STARTS_PROCESSES = re.compile(r"^(import|from) (subprocess|multiprocessing)\b|process_environment\(", re.M)
SLOW = re.compile(r"pytest\.mark\.slow\b")


def test_files_that_start_processes_are_marked_slow():
    files = [file for file in ROOT.rglob("test_*.py") if STARTS_PROCESSES.search(file.read_text())]
    assert len(files) > 10
    assert [str(file.relative_to(ROOT)) for file in files if not SLOW.search(file.read_text())] == []


@pytest.mark.parametrize("other", [1, 2])
@pytest.mark.parametrize(("method", "known"), [("gqa", True), ("none", False)])
def test_cases_are_told_apart_by_their_attention_method_only(request, method, known, other):
    name = request.node.nodeid.partition("[")[0]
    assert quick_case(request.node) == name + (f"['{method}']" if known else "[]")


@pytest.mark.slow
def test_slow_tests_run_only_in_the_whole_suite(request):
    assert not request.config.option.quick
    assert LEFT_OUT not in request.config.stash
