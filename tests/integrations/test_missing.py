"""Without its package an integration says so, in one sentence."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from shardline.errors import UsageError


@pytest.mark.parametrize("package", ["accelerate", "transformers", "lightning"])
def test_a_missing_package_is_named(package, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"shardline.integrations.{package}", raising=False)

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    with pytest.raises(UsageError, match=f"needs the package '{package}'.*pip install 'shardline\\[integrations\\]'"):
        import_module(f"shardline.integrations.{package}")
