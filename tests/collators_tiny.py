"""A collator of each family, with tiny parts."""

from transformers import IdeficsImageProcessorPil

from otter_hf.data import IdeficsCollator, prepare_idefics_tokenizer
from otter_hf.data.collator import OtterCollator
from otter_hf.data.collator_flamingo import FlamingoCollator
from otter_hf.data.collator_otterhd import OtterHDCollator
from otter_hf.models.flamingo import FlamingoProcessor
from otter_hf.testing import otter as otter_tiny
from otter_hf.testing import otterhd as otterhd_tiny


def otter(**options):
    return OtterCollator(otter_tiny.tiny_processor(), **options)


def flamingo(**options):
    processor = otter_tiny.tiny_processor()
    return FlamingoCollator(FlamingoProcessor(processor.image_processor, processor.tokenizer), **options)


def otterhd(**options):
    return OtterHDCollator(otterhd_tiny.tiny_processor(), **options)


def idefics(**options):
    tokenizer = prepare_idefics_tokenizer(otter_tiny.build_tokenizer())
    return IdeficsCollator(tokenizer, IdeficsImageProcessorPil(image_size=28), **options)


COLLATORS = {"otter": otter, "flamingo": flamingo, "otterhd": otterhd, "idefics": idefics}
