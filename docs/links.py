"""A hook of mkdocs: links to files beside the pages (`../benchmarks/...`) become names, as the site has them not."""

import re


def on_page_markdown(markdown: str, **kwargs) -> str:
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)
