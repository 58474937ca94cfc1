"""transformers' common tests on Flamingo's and Otter's processors; laid beside transformers' own by run.sh."""

import io
import unittest
from unittest.mock import patch

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from otter_hf import FlamingoProcessor, OtterProcessor

from ..test_processing_common import ProcessorTesterMixin


def local_image(url):
    """What the mixin would download."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


class FlamingoProcessorConformance(ProcessorTesterMixin):
    def setUp(self):
        patcher = patch("otter_hf.pictures.fetch", local_image)
        patcher.start()
        self.addCleanup(patcher.stop)

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})

    @classmethod
    def _setup_tokenizer(cls):
        words = [
            "<unk>",
            "<s>",
            "</s>",
            *"lower newer upper older longer string test describe this image what is .".split(),
        ]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        return cls.processor_class.prepare_tokenizer(tokenizer)

    # a text holds images or videos, not both, and no audio
    def prepare_videos_inputs(self, batch_size=None):
        return None

    def prepare_audio_inputs(self, batch_size=None):
        return None

    @unittest.skip("The processor lays pixels out as (B, T, F, C, H, W), its image processor as (N, C, H, W)")
    def test_subprocessor_defaults_1_images(self):
        pass

    @unittest.skip("The number of frames of a training is what a call without one takes")
    def test_init_arguments_not_in_processor_kwargs(self):
        pass

    @unittest.skip("The chat template has no tools, and says so")
    def test_apply_chat_template_tool_calls_no_content(self):
        pass


class FlamingoProcessorConformanceTest(FlamingoProcessorConformance, unittest.TestCase):
    processor_class = FlamingoProcessor


class OtterProcessorConformanceTest(FlamingoProcessorConformance, unittest.TestCase):
    processor_class = OtterProcessor
