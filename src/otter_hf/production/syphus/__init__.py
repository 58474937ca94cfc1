"""Syphus: instructions and answers about pictures, written by a language model from annotations in words.

Follows the pipeline of MIMIC-IT, https://huggingface.co/papers/2306.05425: annotations become queries, a chat model is
asked, its replies are read, filtered, and written as a MIMIC-IT dataset.

Names are imported when they are first used.
"""

from ...importing import lazy_names


__all__, __getattr__ = lazy_names(
    __name__,
    {
        "budget": ("Budget", "RunSummary"),
        "build": ("BuildReport", "build_dataset"),
        "client": ("ChatClient", "ChatReply"),
        "datasets": ("DATASETS", "SyphusDataset", "find_dataset"),
        "filters": ("FilterRules",),
        "pictures": ("PictureOptions",),
        "prompts": ("Prompt", "load_prompt"),
        "queries": ("Query",),
        "run": ("SyphusRun",),
        "translate": ("LANGUAGES", "build_translations"),
        "verify": ("make_verification", "verifications"),
    },
)
