"""Generated parts of the site: links into the repository, tables, commands; docstrings as Markdown."""

import argparse
import re
import textwrap
from pathlib import PurePosixPath
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

import vit_tucker
from docs.hooks import ROOT
from docs.hooks.commands import arguments_table, command_parsers, command_reference
from docs.hooks.repository import linked_files, links, repository_path, rewrite_links, site_path, text_of
from docs.hooks.tables import config_reference, fields_table, layering, layering_table, sweep_reference
from tests.test_layering import ALLOWED
from vit_tucker.config.schema import RunConfig, TrainConfig

pytestmark = pytest.mark.slow


def test_links_out_of_docs_point_into_the_site():
    text = (
        "[a](../benchmarks/README.md#x) [b](cost.md) [c](https://x.org) [d](../benchmarks/results/cost)\n"
        "```\n[e](../README.md)\n```\n"
    )
    assert rewrite_links("hosts.md", text) == (
        "[a](repository/benchmarks/README.md#x) [b](cost.md) [c](https://x.org) "
        "[d](repository/benchmarks/results/cost/listing.md)\n```\n[e](../README.md)\n```\n"
    )
    assert rewrite_links("repository/benchmarks/README.md", "[a](../docs/cost.md)") == "[a](../../cost.md)"
    assert rewrite_links("api/index.md", "[a](../../missing.md)") == "[a](../../missing.md)"  # mkdocs reports it


def test_the_hooks_are_no_part_of_the_site():
    mkdocs = pytest.importorskip("mkdocs.config.defaults").MkDocsConfig(config_file_path=str(ROOT / "mkdocs.yml"))
    words = re.search(r"^exclude_docs: \|\n((?:  .*\n)+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert words is not None
    mkdocs.load_dict({"site_name": "x", "exclude_docs": textwrap.dedent(words[1])})
    assert mkdocs.validate()[0] == []
    published = [path for path in (ROOT / "docs").rglob("*") if path.is_file() and path.suffix in (".py", ".pyc")]
    assert all(mkdocs.exclude_docs.match_file(path.relative_to(ROOT / "docs").as_posix()) for path in published)
    assert not mkdocs.exclude_docs.match_file("api/index.md")


def test_paths_go_both_ways():
    for path in ("docs/cost.md", "benchmarks/README.md", "docs/api/index.md"):
        assert repository_path(site_path(PurePosixPath(path)).as_posix()) == PurePosixPath(path)


def test_linked_files_are_there_and_those_they_link_to():
    files = linked_files(["cost.md"])
    assert PurePosixPath("benchmarks/README.md") in files
    assert PurePosixPath("benchmarks/results/model_cpu/model.md") in files  # by way of the README
    assert all((ROOT / file).is_file() or file.name == "listing.md" for file in files)
    assert not any(file.is_relative_to("docs") for file in files)


def test_a_folder_is_a_list_of_its_files():
    listing = PurePosixPath("benchmarks/results/cost/listing.md")
    assert "- [table1.csv](table1.csv)" in text_of(listing)
    assert PurePosixPath("benchmarks/results/cost/table1.csv") in links(listing, text_of(listing))


class Example(BaseModel):
    """An example."""

    count: int = Field(ge=1, description="How | many.")
    kind: Literal["a", "b"] | None = Field(default=None, description="<Which>.")
    pair: tuple[int, int] = Field(default=(1, 2), description="Two.")
    many: tuple[str, ...] = ()
    inner: Annotated[float, "x"] | dict[str, int] = 0.5


def test_a_table_of_keys():
    assert fields_table(Example).splitlines()[2:] == [
        "| `count` | int, ≥ 1 | required | How \\| many. |",
        "| `kind` | `a` or `b` or null | `null` | &lt;Which&gt;. |",
        "| `pair` | list of 2 int | `[1, 2]` | Two. |",
        "| `many` | list of text | `[]` |  |",
        "| `inner` | float or mapping | `0.5` |  |",
    ]


def test_every_key_of_the_config_is_in_the_reference_with_a_description():
    text = config_reference() + sweep_reference()
    for model in (RunConfig, TrainConfig, *(vit_tucker.get_method(name) for name in vit_tucker.list_methods())):
        for key in model.model_fields:
            if key != "method":
                assert f"| `{key}` | " in text, key
    assert "|  |" not in text


def test_the_layers_are_those_of_the_test():
    assert layering() == ALLOWED
    assert "| `tensor` | Pure functions on tensors" in layering_table()


def test_the_commands_are_those_of_the_parsers():
    text = command_reference()
    for name, parser in command_parsers().items():
        assert f"## `vit-tucker {name}`\n" in text
        for option in (action.option_strings[0] for action in parser._actions if action.option_strings):
            assert f"| `{option}" in text or f"| <code>{option}" in text or option == "-h", (name, option)


def test_every_argument_says_what_it_is():
    for name, parser in command_parsers().items():
        for action in parser._actions:
            assert action.help or action.choices, (name, action.dest)


def test_arguments_of_a_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="+", metavar="FILE", help="100%% of them")
    parser.add_argument("--size", type=int, choices=(1, 2), help="a | b")
    parser.add_argument("--fast", action="store_true", help="quick")
    parser.add_argument("names", nargs="*", metavar="A | B", help="<x>")
    parser.add_argument("--cfg", required=True, help="config")
    assert arguments_table(parser).splitlines()[2:] == [
        "| `FILE [...]` | 100% of them |",
        "| `--size {1,2}` | a \\| b |",
        "| `--fast` | quick |",
        "| <code>[A &#124; B ...]</code> | &lt;x&gt; |",
        "| `--cfg CFG` (required) | config |",
    ]


def test_docstrings_become_markdown():
    docstrings = pytest.importorskip("docs.hooks.docstrings")
    text = (
        "H*D of ``plan`` and ``x*y``, [a] [b].\n\n    x * y\n\nArgs:\n    a_b, c: (H*D,)\n        more.\n    _d: <e>\n"
    )
    assert docstrings.as_markdown(docstrings.split_names(text), {"plan": "vit_tucker.plan"}) == (
        "H\\*D of [`plan`][vit_tucker.plan] and `x*y`, \\[a\\] \\[b\\].\n\n    x * y\n\nArgs:\n    a_b: (H\\*D,)\n        more."
        "\n    c: (H\\*D,)\n        more.\n    _d: &lt;e&gt;"
    )


def test_descriptions_that_the_source_computes_are_those_of_the_class():
    described = pytest.importorskip("docs.hooks.docstrings").described
    griffe = pytest.importorskip("griffe")
    module = griffe.visit(
        "vit_tucker.config.schema", ROOT / "schema.py", "class RunConfig:\n    seed: int = Field(0)\n"
    )
    attribute = module["RunConfig.seed"]
    assert described(attribute, "'Of ' 'all.'") == "Of all."
    assert described(attribute, "describe_key('seed')") == RunConfig.model_fields["seed"].description
