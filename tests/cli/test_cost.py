"""The cost command as users type it."""

import csv
import io
from pathlib import Path

import pytest

from vit_tucker.cli import main

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "cost.md"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cost"
SMALL = ["vit_tiny_patch16_224", "model.depth=1", "model.img_size=32", "model.embed_dim=48", "model.num_heads=4"]


def cost(capsys, *arguments: str) -> str:
    assert main(["cost", *arguments]) == 0
    return capsys.readouterr().out


def test_methods_of_a_model(capsys):
    methods = ["--method", "tucker  ranks=[3,8,8]", "--method", "mha"]
    printed = cost(capsys, *SMALL, *methods, "model.num_classes=10", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [row["attention"] for row in rows] == ["dense", "tucker  ranks=[3,8,8]", "mha"]
    dense, tucker, mha = ({k: float(v) for k, v in row.items() if k != "attention"} for row in rows)
    assert dense == mha
    assert (
        tucker["attention_params"] == 2 * (4 * 3 + 3 * 8 * 8 + 48 * 8 + 48 * 8) + 8 + 48
    )  # biases of queries and output
    assert tucker["params"] - tucker["attention_params"] == dense["params"] - dense["attention_params"]
    assert tucker["kv_bytes"] == 5 * 16 * 4


def test_ranks_without_brackets_and_measured(capsys):
    options = ["--measure", "--turns", "2", "--device", "cpu", "--batch-size", "1"]
    printed = cost(capsys, "--method", "tucker ranks=3,8,8 layers=0", *SMALL, *options)
    assert "| tucker ranks=3,8,8 layers=0 |" in printed
    assert "time of dense" in printed
    assert "forward pass in float32, batch size 1, on cpu, " in printed


def test_a_config(capsys):
    printed = cost(capsys, "--cfg", "digits/tucker_r16", "model.depth=1", "--format", "csv")
    assert [row.split(",")[0] for row in printed.splitlines()] == ["attention", "dense", "digits-tucker_r16"]


def test_the_document_is_what_the_commands_print(capsys):
    pytest.importorskip("transformers")  # whose models are counted too
    text = DOCUMENT.read_text()
    for number in "123":
        assert cost(capsys, "--table", number).strip() in text
        assert cost(capsys, "--table", number, "--format", "csv") == (RESULTS / f"table{number}.csv").read_text()
    assert cost(capsys, "--table", "1", "c=32").strip() not in text


def test_files_by_their_endings(capsys, tmp_path):
    for name, start in (("a.csv", "method,"), ("b.tex", "% Table 1"), ("c.md", "Table 1"), ("d", "Table 1")):
        assert str(tmp_path / name) in cost(capsys, "--table", "1", "--out", str(tmp_path / name))
        assert (tmp_path / name).read_text().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cost needs one of MODEL, --cfg and --table"),
        (["a", "b"], "not 2 models"),
        (["a", "--cfg", "digits/dense"], "cost needs one of MODEL, --cfg and --table"),
        (["vit_base_patch16_24"], "did you mean 'vit_base_patch16_224'?"),
        (
            [*SMALL, "--method", "tuker ranks=[1,2,3]"],
            "unknown method 'tuker', known: ",
        ),
        ([*SMALL, "--method", "tucker rank=[1,2,3]"], "attention.rank: unknown key; did you mean 'ranks'?"),
        ([*SMALL, "--method", "tucker [1,2,3]"], "written as 'NAME key=value ...'"),
        (
            [*SMALL, "--method", "tucker ranks=[5,8,8]"],
            "tucker ranks=[5,8,8]: blocks.0.attn: ranks=[5, 8, 8]: head rank 5",
        ),
        ([*SMALL, "--method", "tucker ranks=[5"], "ranks: not valid YAML: expected"),
        ([*SMALL, "--method", "tucker ranks={budget: 0.1}"], "add model.pretrained=true"),
        ([*SMALL, "model.depht=1"], "did you mean 'depth'?"),
        ([*SMALL, "--measure", "--device", "gpu"], "--device gpu: one of cpu, cuda, mps, xpu"),
        ([*SMALL, "--batch-size", "0"], "--batch-size: 0: must be at least 1"),
        ([*SMALL, "--turns", "1", "--measure"], "--turns 1: must be at least 2"),
        (["--table", "1", "dd=3"], "dd: unknown size"),
        (["--table", "2", "d=3"], "d=3: --table 2 accepts no sizes"),
        (["--table", "2", "--method", "mha"], "--table accepts no --method"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_status_2(capsys, arguments, message):
    assert main(["cost", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
