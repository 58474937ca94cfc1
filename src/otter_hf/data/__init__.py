"""MIMIC-IT data: files, mixtures, prompts and training batches.

Names are imported when they are first used: the models need only the prompts, not pandas and `datasets`.
"""

from ..importing import lazy_names


__all__, __getattr__ = lazy_names(
    __name__,
    {
        "collator": ("OtterCollator", "make_labels"),
        "collator_otterhd": ("OtterHDCollator",),
        "collator_idefics": ("IdeficsCollator", "idefics_loss", "prepare_idefics_tokenizer"),
        "formats": ("MimicitFiles", "load_mimicit", "make_train_config", "write_mimicit"),
        "hub": ("push_mixture", "read_hub_form", "write_hub_form"),
        "image_store": ("ImageStore",),
        "mixture": ("GroupedSampler", "MimicitMixture", "sample_rows"),
        "mixture_yaml": ("MixtureEntry", "read_mixture"),
        "neighbours": ("nearest_neighbours", "write_neighbours"),
        ".prompts": ("FORMATS", "chat_template", "clean_text", "escape_reserved_tokens", "render"),
        "samples": ("TASK_GROUPS", "Sample", "SampleError", "SampleOptions", "build_sample", "frame_indices"),
        "stream": ("StreamedMixture",),
        "validate": ("ValidationReport", "check_mixture"),
    },
)
