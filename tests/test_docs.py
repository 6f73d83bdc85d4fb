"""The documentation's links, names and settings are those of the code."""

import re
from pathlib import Path

import pytest

import trl_ext
import trl_ext.losses
from trl_ext.losses import DISTILLATIONS
from trl_ext.trust_regions import TRUST_REGIONS


ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r'\[([^\]]*)\]\(([^)\s]+)(?:\s+"([^"]*)")?\)')  # label, target, title
METHODS = (ROOT / "docs" / "methods.md").read_text()
ROWS = [line for line in METHODS.splitlines() if line.startswith("| ") and "Config(" in line]


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def defines(path, name):
    """Whether a Python file defines a function, class or constant `name`."""
    return re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=", path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for label, target, title in LINK.findall(text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"[{label}]({target})"
        if anchor:
            assert anchor in anchors(path), f"[{label}]({target})"
        code = re.fullmatch(r"`(\w+)(\(\))?`", label)
        if path.suffix == ".py" and code:
            assert defines(path, code[1]), f"[{label}]({target})"
        if path.suffix == ".py" and title:  # the test that the link is about
            assert defines(path, title.partition("[")[0]), f"[{label}]({target} {title!r})"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_method_names_a_setting_a_function_and_a_test(row, tmp_path):
    settings = re.findall(r'`(\w+Config)\((\w+)="(\w+)"\)`', row)
    assert settings
    for config, name, value in settings:
        args = getattr(trl_ext, config)(**{name: value, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False})
        assert getattr(args, name) in (value, [value])
    links = [(label.strip("`"), target) for label, target, _ in LINK.findall(row) if "://" not in target]
    functions = [label for label, target in links if "/losses/" in target and "tests" not in target]
    tests = [label for label, target in links if "/tests/" in target]
    assert functions
    assert tests
    assert all(callable(getattr(trl_ext.losses, function)) for function in functions)


def test_every_choice_of_a_setting_is_a_row():
    named = set(re.findall(r'`\w+Config\((\w+="\w+")\)`', METHODS))
    choices = {f'trust_region="{name}"' for name in TRUST_REGIONS}
    choices |= {f'distillation="{name}"' for name in DISTILLATIONS}
    for config, name in (("TrOPDConfig", "objective"), ("ERPDConfig", "signal"), ("ERPDConfig", "extraction_loss")):
        choices |= {f'{name}="{value}"' for value in choices_of(config, name)}
    assert choices <= named


def choices_of(config, name):
    """What a setting may be: from its metadata, or from the sentence that refuses anything else."""
    field = getattr(trl_ext, config).__dataclass_fields__[name]
    if "choices" in field.metadata:
        return field.metadata["choices"]
    with pytest.raises(ValueError, match=name) as error:
        getattr(trl_ext, config)(**{name: "unknown", "use_cpu": True, "bf16": False})
    choices = re.findall(r"'(\w+)'", str(error.value))
    choices = [choice for choice in choices if choice != "unknown"]
    assert len(choices) >= 3
    return choices
