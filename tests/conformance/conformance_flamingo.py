"""transformers' common model tests on Flamingo and Otter; laid beside transformers' own tests by run.sh."""

import copy
import unittest
from unittest.mock import patch

import torch
from tiny_flamingo import IMAGE, PAD, SIZE, tiny_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.testing_utils import torch_device

from otter_hf import (
    FlamingoConfig,
    FlamingoForConditionalGeneration,
    FlamingoModel,
    OtterConfig,
    OtterForConditionalGeneration,
    OtterModel,
)

from ..generation.test_utils import GenerationTesterMixin
from ..test_modeling_common import ModelTesterMixin
from ..test_training_mixin import TrainingTesterMixin


# the mixins know by name what is a base model and what has a loss
MODEL_MAPPING_NAMES |= {"flamingo": "FlamingoModel", "otter": "OtterModel"}
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES |= {
    "flamingo": "FlamingoForConditionalGeneration",
    "otter": "OtterForConditionalGeneration",
}


class FlamingoTester:
    """Rows of text with an image each."""

    batch_size = 3
    seq_length = 9
    is_training = True
    # read by the mixins
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    vocab_size = 99
    image_size = SIZE
    num_channels = 3
    pad_token_id = PAD
    image_token_id = IMAGE

    def __init__(self, parent, config_class, causal_lm_class):
        self.parent = parent
        self.config_class = config_class
        self.causal_lm_class = causal_lm_class

    def get_config(self):
        config = tiny_config(
            text={"num_hidden_layers": self.num_hidden_layers},
            image_token_id=None if self.without_images else IMAGE,
        )
        return self.config_class.from_dict(
            copy.deepcopy(config.to_dict()) | {"model_type": self.config_class.model_type}
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(3, IMAGE, (self.batch_size, self.seq_length), generator=generator)
        input_ids[:, 1] = IMAGE
        pixel_values = torch.rand(self.batch_size, 3, SIZE, SIZE, generator=generator)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": pixel_values,
        }
        return self.get_config(), {key: value.to(torch_device) for key, value in inputs.items()}


class FlamingoConformance(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    _is_composite = True
    additional_model_inputs = ["pixel_values"]
    test_can_init_all_missing_weights_before_2023 = True
    config_class = None

    def setUp(self):
        self.model_tester = FlamingoTester(self, self.config_class, self.all_model_classes[-1])
        # these tests run on random ids alone
        self.model_tester.without_images = "rope" in self._testMethodName

    @property
    def model_tester(self):
        return self._model_tester

    @model_tester.setter
    def model_tester(self, value):
        self._model_tester = value

    @unittest.skip("The 2023 names of several decoders map to one name of ours: no decoder has them all")
    def test_reverse_loading_mapping(self):
        pass

    def test_training_overfit(self):
        # the mixin asks the outer configuration for the size of the vocabulary
        with patch.object(self.config_class, "vocab_size", FlamingoTester.vocab_size, create=True):
            super().test_training_overfit()


class FlamingoConformanceTest(FlamingoConformance, unittest.TestCase):
    config_class = FlamingoConfig
    all_model_classes = (FlamingoModel, FlamingoForConditionalGeneration)


class OtterConformanceTest(FlamingoConformance, unittest.TestCase):
    config_class = OtterConfig
    all_model_classes = (OtterModel, OtterForConditionalGeneration)
