"""The wheel ships the library, typed, and nothing that is only read or run."""

import pathlib
import tomllib
import zipfile

import hatchling.build
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = hatchling.build.build_wheel(str(folder))
    return zipfile.ZipFile(folder / name)


def test_wheel_holds_the_two_packages_only(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "attnx",
        "pallas_kernels",
    }


def test_wheel_is_typed_and_licensed(wheel):
    names = wheel.namelist()
    assert "attnx/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = next(name for name in names if name.endswith("/METADATA"))
    assert b"License-Expression: Apache-2.0" in wheel.read(metadata)


def test_wheel_holds_every_module(wheel):
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("attnx", "pallas_kernels")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources == {name for name in wheel.namelist() if name.endswith(".py")}


def test_constraints_pin_every_dependency_by_version_alone():
    """No addresses, no ranges; and nothing that pyproject asks for is left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = sum(project["optional-dependencies"].values(), project["dependencies"])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in pin and "@" not in pin and "/" not in pin for pin in pins)
    names = {pin.split("==")[0] for pin in pins}
    for requirement in asked:
        name = requirement.split(">")[0].split("=")[0].split("[")[0]
        assert name in names, f"{requirement} is not in constraints.txt"
