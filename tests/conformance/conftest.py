"""Set-up of the common tests of transformers."""

import pytest

MARKERS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers that the common tests use."""
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: marker of transformers")
