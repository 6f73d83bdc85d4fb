"""
Runs the tests with the lowest versions that pyproject.toml allows, or with the newest that exist: before a release.

    python scripts/test_versions.py lowest
    python scripts/test_versions.py newest
    python scripts/test_versions.py lowest --instead torch==2.13.0   # where the lowest has no build for this machine

Makes a virtual environment (`.venv-lowest`, `.venv-newest`), prints its versions, and runs the whole suite in it, with
the arguments for pytest that stand after `--`. The exit status is pytest's.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[1]
EXTRAS = ("test", "math", "plots", "server", "deepspeed")


def requirements() -> list[str]:
    """Of the package and its extras, e.g. `"trl>=1.16,<1.17"`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    return [requirement for requirement in project["dependencies"] + extras if not requirement.startswith("trl_ext")]


def lowest(requirement: str) -> str:
    """`"trl>=1.16,<1.17"` -> `"trl==1.16"`, which pip takes for 1.16.0 too."""
    name, bound = re.match(r"([\w.-]+)>=([\w.]+)", requirement).groups()
    return f"{name}=={bound}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=["lowest", "newest"])
    parser.add_argument(
        "--instead", nargs="+", default=[], help="requirements that replace those of the same packages"
    )
    parser.add_argument("--folder", type=Path, help="of the virtual environment; one that exists is used as it is")
    own: list[str] = sys.argv[1:]
    pytest_arguments: list[str] = []
    if "--" in own:
        own, pytest_arguments = own[: own.index("--")], own[own.index("--") + 1 :]
    flags = parser.parse_args(own)
    folder = flags.folder or ROOT / f".venv-{flags.versions}"
    python = folder / "bin" / "python"
    if not python.exists():
        wanted = [lowest(r) if flags.versions == "lowest" else r for r in requirements()]
        replaced = {re.match(r"[\w.-]+", requirement)[0] for requirement in flags.instead}
        wanted = [r for r in wanted if re.match(r"[\w.-]+", r)[0] not in replaced] + flags.instead
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--upgrade", *wanted], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT], check=True)
    subprocess.run([python, "-m", "pip", "list", "--format", "freeze"], check=True)
    return subprocess.run([python, "-m", "pytest", *pytest_arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
