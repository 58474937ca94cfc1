"""transformers' common model tests on our MPT decoder; laid beside transformers' own tests by run.sh."""

import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from otter_hf.models.mpt import OtterMptConfig, OtterMptForCausalLM, OtterMptModel

from ..generation.test_utils import GenerationTesterMixin
from ..test_modeling_common import ModelTesterMixin
from ..test_training_mixin import TrainingTesterMixin


# the mixins know by name what is a base model and what has a loss
MODEL_MAPPING_NAMES |= {"otter_mpt": "OtterMptModel"}
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES |= {"otter_mpt": "OtterMptForCausalLM"}


class MptTester:
    """Rows of random tokens."""

    batch_size = 3
    seq_length = 9
    is_training = True
    # read by the mixins
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    vocab_size = 99
    pad_token_id = 0
    causal_lm_class = OtterMptForCausalLM

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return OtterMptConfig(
            d_model=self.hidden_size,
            n_heads=self.num_attention_heads,
            n_layers=self.num_hidden_layers,
            expansion_ratio=2,
            vocab_size=self.vocab_size,
            pad_token_id=self.pad_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length), generator=generator)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return self.get_config(), {key: value.to(torch_device) for key, value in inputs.items()}


class MptConformanceTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (OtterMptModel, OtterMptForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True
    model_tester = None

    def setUp(self):
        self.model_tester = MptTester(self)

    @unittest.skip("MosaicGPT's names are optional dialects of ours: no checkpoint of ours has them")
    def test_reverse_loading_mapping(self):
        pass
