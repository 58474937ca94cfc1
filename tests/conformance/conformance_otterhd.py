"""transformers' common model and processor tests on OtterHD; laid beside transformers' own tests by run.sh."""

import functools
import io
import unittest
from unittest.mock import patch

import torch
from PIL import Image
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.testing_utils import torch_device

from otter_hf import (
    OtterHDConfig,
    OtterHDForConditionalGeneration,
    OtterHDModel,
    OtterHDProcessor,
)
from otter_hf.models.otterhd.modeling_otterhd import _FirstRevisionName
from otter_hf.testing.otterhd import tiny_processor

from ..generation.test_utils import GenerationTesterMixin
from ..test_modeling_common import ModelTesterMixin
from ..test_processing_common import ProcessorTesterMixin
from ..test_training_mixin import TrainingTesterMixin


# the mixins know by name what is a base model and what has a loss
MODEL_MAPPING_NAMES |= {"fuyu": "OtterHDModel"}
for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
    names |= {"fuyu": "OtterHDForConditionalGeneration"}

PATCH_SIZE = 4
CONVERSIONS = get_checkpoint_conversion_mapping(OtterHDConfig.model_type)


class OtterHDTester:
    """Rows of text with one patch each."""

    batch_size = 7  # that of the mixins which make their own batch
    seq_length = 9
    is_training = True
    # read by the mixins
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    vocab_size = 99
    image_size = PATCH_SIZE
    num_channels = 3
    pad_token_id = 0
    image_token_id = 3
    causal_lm_class = OtterHDForConditionalGeneration

    def __init__(self, parent, with_images=True):
        self.parent = parent
        self.with_images = with_images

    def get_config(self):
        return OtterHDConfig(
            patch_size=PATCH_SIZE,
            image_token_id=self.image_token_id if self.with_images else self.vocab_size,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=self.pad_token_id,
            text_config={
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": 64,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "max_position_embeddings": 512,
                "rope_theta": 25000.0,
            },
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(4, self.vocab_size, (self.batch_size, self.seq_length), generator=generator)
        input_ids[:, 1] = self.image_token_id
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, PATCH_SIZE * PATCH_SIZE * 3, generator=generator),
        }
        return self.get_config(), {key: value.to(torch_device) for key, value in inputs.items()}


class OtterHDConformanceTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    _is_composite = True
    all_model_classes = (OtterHDModel, OtterHDForConditionalGeneration)
    additional_model_inputs = ["pixel_values"]
    test_can_init_all_missing_weights_before_2023 = True
    skip_test_image_features_output_shape = True  # it asks for a vision_config
    model_tester = None

    def setUp(self):
        # these tests run on random ids alone
        random_ids = any(word in self._testMethodName for word in ("rope", "overfit"))
        self.model_tester = OtterHDTester(self, with_images=not random_ids)

    @unittest.skip("There is no vision tower: image features are the output of one linear layer")
    def test_get_image_features_hidden_states(self):
        pass

    @unittest.skip("There is no vision tower: image features are the output of one linear layer")
    def test_get_image_features_attentions(self):
        pass

    def test_reverse_loading_mapping(self):
        # the names of the first Hub revision are read and never written, those of Fuyu where it is asked for
        written = [renaming for renaming in CONVERSIONS if not isinstance(renaming, _FirstRevisionName)]
        save = OtterHDForConditionalGeneration.save_pretrained
        as_fuyu = functools.partialmethod(save, save_original_format=True)
        with (
            patch(f"{ModelTesterMixin.__module__}.get_model_conversion_mapping", lambda *args, **kwargs: written),
            patch.object(OtterHDForConditionalGeneration, "save_pretrained", as_fuyu),
        ):
            super().test_reverse_loading_mapping(skip_base_model=True)

    def test_training_overfit(self):
        # the mixin asks the outer configuration for the size of the vocabulary
        with patch.object(OtterHDConfig, "vocab_size", OtterHDTester.vocab_size, create=True):
            super().test_training_overfit()


def local_image(url):
    """What the mixin would download: a picture of one patch, for it counts patches as pictures."""
    buffer = io.BytesIO()
    Image.new("RGB", (10, 10), "red").save(buffer, "PNG")
    return buffer.getvalue()


class OtterHDProcessorConformanceTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = OtterHDProcessor

    def setUp(self):
        patcher = patch("otter_hf.pictures.fetch", local_image)
        patcher.start()
        self.addCleanup(patcher.stop)

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor().image_processor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor().tokenizer

    # a row holds images only
    def prepare_videos_inputs(self, batch_size=None):
        return None

    def prepare_audio_inputs(self, batch_size=None):
        return None

    # the mixin gives options of films to processors of pictures, which refuse what they have no use for
    def _without_films(self, test):
        call = OtterHDProcessor.__call__

        @functools.wraps(call)
        def without(processor, *args, num_frames=None, do_sample_frames=None, **kwargs):
            return call(processor, *args, **kwargs)

        with patch.object(OtterHDProcessor, "__call__", without):
            test()

    def test_model_input_names(self):
        self._without_films(super().test_model_input_names)

    def test_flat_kwarg_applied_when_modality_dict_lacks_it(self):
        self._without_films(super().test_flat_kwarg_applied_when_modality_dict_lacks_it)

    def test_apply_chat_template_image_0(self):
        self._without_films(super().test_apply_chat_template_image_0)

    def test_apply_chat_template_image_1(self):
        self._without_films(super().test_apply_chat_template_image_1)

    @unittest.skip("The number of frames of a training is what programs that make pictures of films take")
    def test_init_arguments_not_in_processor_kwargs(self):
        pass

    @unittest.skip("The chat template has no tools, and says so")
    def test_apply_chat_template_tool_calls_no_content(self):
        pass
