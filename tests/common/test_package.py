"""The package itself: its public names and its version."""

import ast
import importlib.metadata

import pytest

import qformer_captioner

from ..conftest import ROOT


@pytest.mark.parametrize("name", qformer_captioner.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(qformer_captioner, name).__name__ == name


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'QFormerCaptoner'"):
        qformer_captioner.QFormerCaptoner  # noqa: B018


def test_type_checkers_see_every_public_name():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    names = {alias.asname for node in imports for alias in node.names if alias.asname}
    assert names == set(qformer_captioner.__all__)
    assert (ROOT / "py.typed").exists()


def test_the_installed_version_is_the_one_in_the_package():
    try:
        installed = importlib.metadata.version("qformer-captioner")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package installed")
    assert installed == qformer_captioner.__version__
