"""Syphus: instructions and answers about pictures, written by a language model from annotations in words.

Follows the pipeline of MIMIC-IT, https://huggingface.co/papers/2306.05425: annotations become queries, a chat model is
asked, its replies are read, filtered, and written as a MIMIC-IT dataset.
"""

from .build import BuildReport, build_dataset
from .client import ChatClient, ChatReply
from .datasets import DATASETS, SyphusDataset, find_dataset
from .filters import FilterRules
from .pictures import PictureOptions
from .prompts import Prompt, load_prompt
from .queries import Query
from .run import Budget, RunSummary, SyphusRun
from .translate import LANGUAGES, build_translations
from .verify import make_verification, verifications


__all__ = [
    "DATASETS",
    "LANGUAGES",
    "Budget",
    "BuildReport",
    "ChatClient",
    "ChatReply",
    "FilterRules",
    "PictureOptions",
    "Prompt",
    "Query",
    "RunSummary",
    "SyphusDataset",
    "SyphusRun",
    "build_dataset",
    "build_translations",
    "find_dataset",
    "load_prompt",
    "make_verification",
    "verifications",
]
