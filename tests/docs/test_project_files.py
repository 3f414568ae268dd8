"""Facts that several project files state must agree."""

import tomllib

import pytest
import yaml

from ..conftest import ROOT


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_pre_commit_runs_the_ruff_that_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = (hook["rev"] for hook in hooks if hook["repo"].endswith("ruff-pre-commit"))
    assert f"ruff=={revision.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_ci_runs_every_python_that_the_package_names(project):
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if line.startswith("Programming Language")]
    assert jobs["test"]["strategy"]["matrix"]["python"] == [version for version in named if version.startswith("3.")]


def test_the_citation_names_the_package_and_its_licence(project):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["license"]) == (project["name"], project["license"])
    assert citation["repository-code"] == project["urls"]["Homepage"]


def test_every_dependency_has_a_lowest_version(project):
    assert [line for line in project["dependencies"] if ">=" not in line] == []
