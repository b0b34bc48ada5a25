"""What a wheel holds: every package of the repository, the configs, and the marker of types."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed():
    """setuptools is given the list, since it cannot search for packages and map the configs to another folder."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "idattn").rglob("__init__.py")]
    assert sorted(settings["packages"]) == sorted([*map(".".join, (x.parts for x in folders)), "idattn.configs"])
    assert settings["package-dir"] == {"idattn.configs": "configs"} and (ROOT / "configs" / "__init__.py").exists()
    assert "py.typed" in settings["package-data"]["idattn"] and (ROOT / "idattn" / "py.typed").exists()
