"""What decays, which rows of the embeddings are trained, and what ends a training."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file

from otter_hf.testing.otterhd import tiny_model, tiny_processor
from otter_hf.training.freezing import train_only_rows
from otter_hf.training.optimizer import check_precision, decayed_parameter_names
from otter_hf.training.vocabulary import check_vocabulary, tell_positions


def test_what_trains_worse_than_it_seems_is_told(model, caplog):
    """Steps smaller than what 16 bits tell apart, and positions that the decoder has not learned."""
    layer = torch.nn.Linear(2, 2).bfloat16()
    check_precision(layer, False, "fsdp")
    check_precision(torch.nn.Linear(2, 2), True, "none")
    positions = model.config.text_config.max_position_embeddings
    tell_positions(positions, model.config)
    assert not caplog.records
    check_precision(layer, False, "none")
    tell_positions(positions + 1, model.config)
    assert "is kept in bfloat16" in caplog.text and f"was made for {positions} positions" in caplog.text
    with pytest.raises(ValueError, match="fp16 scales gradients of float32 weights"):
        check_precision(layer, True, "none")
    check_precision(layer.requires_grad_(False), True, "none")


def test_the_image_token_of_another_tokenizer(model, processor):
    config = copy.deepcopy(model.config)
    check_vocabulary(processor.tokenizer, config)
    config.image_token_id += 1
    with pytest.raises(ValueError, match=f"has <image> at {processor.image_token_id}, and the model looks for it at"):
        check_vocabulary(processor.tokenizer, config)


def test_decay(model):
    decayed = set(decayed_parameter_names(model))
    parameters = dict(model.named_parameters())
    assert decayed <= set(parameters)
    for name in (
        "model.vision_tower.embeddings.patch_embedding.weight",
        "model.perceiver.layers.0.to_q.weight",
        "model.language_model.layers.1.gated_cross_attn_layer.feed_forward.1.weight",
        "model.language_model.layers.0.decoder_layer.mlp.up_proj.weight",
    ):
        assert name in decayed, name
    for name in parameters:
        if re.search("norm|bias|attn_gate|ff_gate|latents|embed_tokens|lm_head", name):
            assert name not in decayed, name
    # the norm that the original decayed because its name is a number
    assert "model.language_model.layers.1.gated_cross_attn_layer.feed_forward.0.weight" not in decayed
    assert "model.vision_tower.embeddings.position_embedding.weight" not in decayed


def test_decay_with_tied_head_and_of_otterhd(model):
    model.lm_head.weight = model.get_input_embeddings().weight
    assert "lm_head.weight" not in decayed_parameter_names(model)
    decayed = decayed_parameter_names(tiny_model(tiny_processor()))
    assert "model.vision_embed_tokens.weight" in decayed
    assert not [name for name in decayed if "norm" in name or "embed_tokens.weight" == name.split("model.")[-1]]


def test_trainer_groups(fit, monkeypatch):
    groups = []
    monkeypatch.setattr(
        "otter_hf.training.run.OtterTrainer.save_state", lambda self: groups.extend(self.optimizer.param_groups)
    )
    fit(max_steps=1, freeze=["vision"])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.ndim >= 2 for parameter in groups[0]["params"])
    assert any(parameter.ndim >= 2 for parameter in groups[1]["params"])  # embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_row_of_answer_is_trained(fit, ragged, model, processor, tied):
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(ragged / "base")
    before = load_file(ragged / "base" / "model.safetensors")
    settings = {
        "train_embedding_rows": ["<answer>"],
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = fit("whole", **settings)
    resumed = fit("resumed", resume_from_checkpoint=str(whole / "checkpoint-2"), **settings)
    for folder in (whole, resumed):
        after = load_file(folder / "model.safetensors")
        names = [name for name in after if "embed_tokens" in name or "lm_head" in name]
        assert len(names) == (1 if tied else 2)
        for name in names:
            changed = (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
            assert changed in ([processor.answer_token_id], []), name
            assert changed or name == "lm_head.weight"  # <answer> itself is no label, and only pushed away
    assert torch.equal(
        load_file(whole / "model.safetensors")[names[0]], load_file(resumed / "model.safetensors")[names[0]]
    )


def test_rows_of_the_embeddings_keep_other_gradients_away(model):
    train_only_rows(model, [3, 1])
    ids = torch.arange(8)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert weight.grad.any(dim=1).nonzero().flatten().tolist() == [1, 3]
    assert model.model.language_model.layers[0].decoder_layer.mlp.up_proj.weight.grad.any()


def test_a_schedule_that_does_not_take_what_it_is_given(fit):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs {'minimum': 1} are not those of the schedule cosine: "):
        fit(lr_scheduler_type="cosine", lr_scheduler_kwargs={"minimum": 1})


def test_unknown_row(fit):
    with pytest.raises(ValueError, match="train_embedding_rows: '<anser>' is no token"):
        fit(train_embedding_rows=["<anser>"])


def test_a_loss_that_is_not_finite_names_its_samples(fit, ragged, model):
    broken = model.state_dict()
    broken["model.language_model.norm.weight"] = broken["model.language_model.norm.weight"] * 3e38
    model.save_pretrained(ragged / "base", state_dict=broken)
    with pytest.raises(ValueError, match=r"The loss of step 1 is nan, with the samples '[pt]\d'(, '[pt]\d'){3}: look"):
        fit()


def test_a_gradient_that_is_not_finite_names_the_samples_of_its_step(fit, monkeypatch):
    def poison(self, model):
        model.lm_head.weight.grad[0, 0] = float("inf")
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    monkeypatch.setattr("transformers.Trainer._clip_grad_norm", poison)
    with pytest.raises(ValueError, match=r"The gradient of step 1 is (inf|nan), with the samples '.*'(, '.*'){7}: "):
        fit(gradient_accumulation_steps=2)
