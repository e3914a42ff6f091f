"""Files that a maintained project has beside its code: they parse, and what they name is there."""

import configparser
import re
import shlex
from pathlib import Path

import pytest
import yaml

from docs.hooks.commands import command_parsers
from vit_tucker.version import __version__

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml")
PINNED = re.compile(r"^[\w-]+/[\w-]+@[0-9a-f]{40}$")
CHANGES = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
"""Headings of Keep a Changelog."""


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(section: str, key: str) -> list[str]:
    return setup_cfg()[section][key].split()


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def matrix() -> dict:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    return workflow["jobs"]["quick"]["strategy"]["matrix"]


def supported_pythons() -> list[str]:
    """['3.10', ..., '3.13'] of '>=3.10,<3.14'."""
    low, high = map(int, re.findall(r"3\.(\d+)", setup_cfg()["options"]["python_requires"]))
    return [f"3.{minor}" for minor in range(low, high)]


class TestWorkflows:
    @pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
    def test_they_are_pinned_read_only_and_one_per_branch(self, file):
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert "group" in workflow["concurrency"]
        assert all(job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())
        for step in steps(workflow):
            assert ("uses" in step) != ("run" in step)
            assert "uses" not in step or PINNED.match(step["uses"]), step

    def test_unpinned_actions_are_seen(self):
        assert PINNED.match("actions/checkout@v4") is None

    def test_pip_is_cached_by_files_that_are_there(self):
        names = set()
        for file in WORKFLOWS:
            for step in steps(yaml.safe_load(file.read_text())):
                if step.get("with", {}).get("cache") == "pip":
                    names.add(step["with"]["cache-dependency-path"])
        assert names == {"constraints.txt", "${{ env.CONSTRAINTS }}"}
        assert all((ROOT / name).is_file() for name in ("constraints.txt", "constraints-oldest.txt"))

    def test_what_they_run_is_there(self):
        runs = [step["run"] for file in WORKFLOWS for step in steps(yaml.safe_load(file.read_text())) if "run" in step]
        assert {".ci/run", "./run.sh test --quick"} <= set(runs)
        for command in runs:
            program, *arguments = shlex.split(command)
            if program.startswith(".venv"):
                assert arguments[0] in command_parsers()
            else:
                assert (ROOT / program).stat().st_mode & 0o100, command

    def test_every_supported_python_is_tested(self):
        assert matrix()["python"] == supported_pythons()
        assert {entry["python"] for entry in matrix()["include"]} <= set(supported_pythons())
        assert {"oldest"} == {entry["versions"] for entry in matrix()["include"]}
        assert f"3.10 to {supported_pythons()[-1]}" in (ROOT / "run.sh").read_text()

    def test_the_oldest_versions_are_those_that_the_package_allows(self):
        lines = [
            line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")
        ]
        pinned = dict(line.split("==") for line in lines)
        assert set(pinned) == {"torch", "torchvision", "timm", "transformers"}
        allowed = requirements("options", "install_requires") + requirements("options.extras_require", "hf")
        for name, version in pinned.items():
            bound = (
                next(text for text in allowed if re.match(rf"{name}\b>=", text)).partition(">=")[2].partition(";")[0]
            )
            assert version.startswith(bound), (name, version, bound)

    def test_the_constraints_file_can_be_chosen(self):
        text = (ROOT / "run.sh").read_text()
        assert "constraints=${CONSTRAINTS:-constraints.txt}" in text
        assert '-c "$constraints"' in text


class TestIssueForms:
    @pytest.mark.parametrize("file", FORMS, ids=lambda file: file.name)
    def test_they_ask_for_vit_tucker_info(self, file):
        form = yaml.safe_load(file.read_text())
        assert form["name"]
        assert form["description"]
        fields = {part["id"]: part for part in form["body"] if "id" in part}
        assert "`vit-tucker info`" in fields["info"]["attributes"]["label"]
        assert all(part["attributes"].get("label") or part["type"] == "markdown" for part in form["body"])

    def test_commands_in_them_are_there(self):
        text = "\n".join(file.read_text() for file in FORMS)
        named = set(re.findall(r"vit-tucker (\w+)", text))
        assert "info" in named
        assert named <= set(command_parsers())

    def test_there_is_one_for_bugs_features_and_models(self):
        assert [file.stem for file in FORMS] == ["bug", "feature", "model"]


class TestPreCommit:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}  # noqa: RUF012

    def test_hooks_have_what_they_run(self):
        assert set(self.hooks) >= {"ruff-check", "ruff-format", "mypy", "large-files", "yaml-syntax", "run-configs"}
        for hook in self.hooks.values():
            assert (hook["language"] == "python") == all(
                "==" in text for text in hook.get("additional_dependencies", ["none"])
            )

    def test_ruff_is_the_version_that_the_project_uses(self):
        ruff = next(text for text in requirements("options.extras_require", "lint") if text.startswith("ruff=="))
        for name in ("ruff-check", "ruff-format"):
            assert self.hooks[name]["additional_dependencies"] == [ruff]

    def test_schemas_are_there_and_patterns_match_the_configs(self):
        files = [file.relative_to(ROOT).as_posix() for file in (ROOT / "vit_tucker" / "configs").rglob("*.yaml")]
        for name in ("run-configs", "sweep-configs"):
            assert (ROOT / self.hooks[name]["entry"].split()[-1]).is_file()
        runs, sweeps = (
            {f for f in files if re.search(self.hooks[n]["files"], f)} for n in ("run-configs", "sweep-configs")
        )
        assert runs | sweeps == set(files)
        assert not runs & sweeps

    def test_mypy_sees_the_files_that_it_is_configured_for(self):
        files, exclude = self.hooks["mypy"]["files"], self.hooks["mypy"]["exclude"]
        for path in (
            "vit_tucker/run/environment.py",
            "experiments/sweep.py",
            "benchmarks/hosts.py",
            "docs/hooks/hooks.py",
        ):
            assert re.search(files, path)
            assert not re.search(exclude, path)
        for path in ("vit_tucker/__init__.py", "vit_tucker/configs/models/vit_c.py"):
            assert re.search(exclude, path)
        assert not re.search(files, "tests/test_habits.py")


class TestCitation:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())

    def test_the_software_has_the_package_s_version_and_licence(self):
        assert self.cff["cff-version"] == "1.2.0"
        assert self.cff["type"] == "software"
        assert self.cff["version"] == __version__
        assert self.cff["license"] == setup_cfg()["metadata"]["license"]
        assert self.cff["title"] == setup_cfg()["metadata"]["name"]
        assert {"message", "authors"} <= set(self.cff)

    def test_the_paper_is_the_one_that_the_docs_cite(self):
        paper = self.cff["preferred-citation"]
        names = [author["family-names"] for author in paper["authors"]]
        assert names == ["Klein", "Kusch", "Sager", "Schnake", "Schotthöfer"]
        text = (ROOT / "docs" / "mathematics.md").read_text()
        assert f"[{paper['title']}]({paper['url']})" in text
        assert paper["url"].endswith("2603.30033")


class TestChangelog:
    text = (ROOT / "CHANGELOG.md").read_text()

    def test_it_keeps_the_form(self):
        versions = re.findall(r"^## (.+)$", self.text, re.MULTILINE)
        assert versions[0] == "Unreleased"
        headings = re.findall(r"^### (.+)$", self.text, re.MULTILINE)
        assert headings
        assert set(headings) <= set(CHANGES)
        assert "keepachangelog.com" in self.text

    def test_each_entry_is_under_a_heading_and_each_heading_comes_once(self):
        for version in re.split(r"^## ", self.text, flags=re.MULTILINE)[1:]:
            before, *parts = re.split(r"^### ", version, flags=re.MULTILINE)
            assert not re.search(r"^- ", before, re.MULTILINE)
            names = [part.partition("\n")[0] for part in parts]
            assert names == sorted(set(names), key=CHANGES.index)
            assert all(re.search(r"^- ", part, re.MULTILINE) for part in parts)


class TestContributing:
    def test_paths_and_links_are_there(self):
        text = (ROOT / "CONTRIBUTING.md").read_text()
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
            assert (ROOT / target).exists(), target
        for path in re.findall(r"`((?:vit_tucker|tests|docs|experiments)/[\w./]*)`", text):
            assert (ROOT / path).exists(), path

    def test_the_distribution_has_what_people_cite_and_read(self):
        manifest = (ROOT / "MANIFEST.in").read_text()
        assert all(name in manifest for name in ("CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md"))
