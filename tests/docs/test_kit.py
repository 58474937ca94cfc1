"""The contributor's kit: files that other programs read are what these expect."""

import re
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff", *sorted((ROOT / ".github").rglob("*.yml"))]


def test_files_are_yaml_and_name_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(FILES) == 5
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert isinstance(yaml.safe_load(text), dict)
        for target in re.findall(r"run: make (\S+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = re.findall(r"\b\w+\.md\b", str(site["nav"]))
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_version_stands_in_one_place():
    import otter_hf

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.search(r"^version = \"", text, re.MULTILINE) and 'attr = "otter_hf.__version__"' in text
    assert otter_hf.__version__.split(".dev")[0] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_citation_has_the_papers_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert citation["authors"] and all(reference["authors"] for reference in citation["references"])
    assert all(reference["url"] in readme for reference in citation["references"])
