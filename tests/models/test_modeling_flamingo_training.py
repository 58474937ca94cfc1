"""Training: the loss, what gets gradients, checkpointing, packing, PEFT, compilation."""

import copy
import sys
import types

import flash_stand_in
import pytest
import torch
from tiny_flamingo import IMAGE, PAD, assert_close, images, pad_rows, row, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import DataCollatorWithFlattening

from otter_hf.models import lm_loss
from otter_hf.models.flamingo.layers_flamingo import PerceiverBlock


def batch(*places):
    """Rows with images at the given places, every second token labelled."""
    ids = torch.cat([row(*at, seed=i) for i, at in enumerate(places)])
    labels = ids.masked_fill(ids == IMAGE, -100)
    labels[:, ::2] = -100
    return {"input_ids": ids, "pixel_values": images(len(places), 2), "labels": labels}


def loss_and_gradients(model, inputs, **kwargs):
    model.zero_grad()
    loss = model(**inputs, **kwargs).loss
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_all_close(ours, reference, tolerance=1e-6):
    assert len(ours) == len(reference)
    for a, b in zip(ours, reference, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("max_logits", [2**26, 300])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("once", [True, False])
def test_loss_where_it_counts_equals_the_full_one(monkeypatch, max_logits, num_items, tie, once):
    monkeypatch.setattr(lm_loss, "MAX_LOGITS", max_logits)  # 300: three positions of the vocabulary at a time
    if not once:  # as on a GPU
        monkeypatch.setattr(lm_loss, "_runs_once", lambda *args: False)
    model = tiny_model(tie_word_embeddings=tie).train()
    inputs = batch((1, 5), (3,))
    kwargs = {} if num_items is None else {"num_items_in_batch": num_items}
    full = loss_and_gradients(model, inputs, skip_logits=False, **kwargs)
    assert_all_close(loss_and_gradients(model, inputs, **kwargs), full)
    # labels that are shifted already
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    assert_all_close(loss_and_gradients(model, inputs, shift_labels=shifted, **kwargs), full)


@pytest.mark.parametrize("trained", ["both", "head", "states", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_brings_its_gradients(monkeypatch, trained, dtype):
    """Scaled logits, labels that are fewer than said, a loss that is scaled, and what is frozen."""
    monkeypatch.setattr(lm_loss, "MAX_LOGITS", 4 * 50 * 4)  # four positions at a time
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False, dtype=dtype).requires_grad_(trained in ("both", "head"))
    states = torch.randn(2, 7, 8, generator=generator).to(dtype).requires_grad_(trained in ("both", "states"))
    labels = torch.randint(50, (2, 7), generator=generator)
    labels[0, 3:] = -100
    loss = lm_loss.supervised_loss(head, states, labels, vocab_size=50, scale=0.7, target_count=11)
    logits = head(states).float() * 0.7
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    exact = dtype == torch.float32
    assert_close(loss, expected, 1e-6 if exact else 1e-2)
    leaves = [leaf for leaf in (head.weight, states) if leaf.requires_grad]
    for ours, reference in zip(
        torch.autograd.grad(3 * loss, leaves) if leaves else (),
        torch.autograd.grad(3 * expected, leaves) if leaves else (),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert_close(ours, reference, 1e-6 if exact else 1e-2)


def test_a_replica_of_nn_data_parallel():
    """As transformers' Trainer makes them where one process sees several GPUs: their weights are no parameters."""
    model = tiny_model().train()
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():  # what torch.nn.parallel.replicate does, which takes no CPU
        weights = {name: weight for name, weight in module._parameters.items() if weight is not None}
        replica._parameters = dict.fromkeys(module._parameters.keys() - weights.keys())
        replica._former_parameters = {name: weight * 1 for name, weight in weights.items()}
        for name, value in replica._former_parameters.items():
            setattr(replica, name, value)
        for name, part in module._modules.items():
            setattr(replica, name, replicas[part])
    inputs = batch((1, 5), (3,))
    assert not list(replicas[model].parameters())
    loss, expected = replicas[model](**inputs).loss, model(**inputs).loss
    assert_close(loss, expected, 1e-6)
    weight = model.model.perceiver.latents
    assert_close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0])


def test_the_head_may_be_on_another_device():
    """As `device_map="auto"` puts it, with the embeddings that it is tied to; its hooks move what it is given."""

    class Head(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states.to(self.weight.device))

    head, labels = Head(8, 50, bias=False, device="meta"), torch.tensor([[1, 2, -100, 3]])
    for num_items in (None, torch.tensor(2)):
        loss = lm_loss.supervised_loss(head, torch.zeros(1, 4, 8), labels, 50, num_items_in_batch=num_items)
        assert loss.is_meta and loss.shape == ()


def test_constant_media_are_projected_at_once(monkeypatch):
    """With a frozen tower the resampler's norm of media goes into its matrix; films and pictures together."""
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(False)
    with torch.no_grad():
        for layer in model.model.perceiver.layers:
            layer.norm_media.bias.normal_()
            layer.norm_media.weight.normal_()
    mask = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [0, 0]]])
    inputs = {**batch((1, 5), (3,)), "pixel_values": images(2, 2, frames=2), "pixel_attention_mask": mask}
    folded = loss_and_gradients(model, inputs)
    monkeypatch.setattr(PerceiverBlock, "_media_are_constant", lambda self, media: False)
    assert_all_close(folded, loss_and_gradients(model, inputs), 1e-5)


def test_logits_are_skipped_in_training_only():
    model, inputs = tiny_model(), batch((1, 5), (3,))
    assert model(**inputs).logits.shape == (2, 12, 99)
    assert model(**inputs, skip_logits=True).logits is None
    model.train()
    output = model(**inputs)
    assert output.logits is None and output.past_key_values is None
    assert model(**inputs, skip_logits=False).logits.shape == (2, 12, 99)
    inputs.pop("labels")
    assert model(**inputs).logits.shape == (2, 12, 99)


def test_only_supervised_positions_reach_the_head():
    model, inputs = tiny_model().train(), batch((1, 5), (3,))
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    model(**inputs)
    assert rows == [int((inputs["labels"][:, 1:] != -100).sum())]


@pytest.mark.parametrize("decoder", ["llama", "gemma3_text"])
def test_ligers_fused_loss_where_it_applies(monkeypatch, decoder):
    """Liger needs CUDA; the stand-in computes what its class does, and takes what it takes."""

    class LigerFusedLinearCrossEntropyLoss:
        def __init__(self, ignore_index=-100, reduction="mean", softcap=None):
            self.softcap, self.options = softcap, {"ignore_index": ignore_index, "reduction": reduction}

        def __call__(self, lin_weight, _input, target, bias=None):
            assert bias is None and _input.shape[0] == target.shape[0]
            logits = lm_loss.scale_logits(_input @ lin_weight.T, softcap=self.softcap)
            return torch.nn.functional.cross_entropy(logits, target, **self.options)

    model = tiny_model(decoder, text={"final_logit_softcapping": 2.0} if decoder == "gemma3_text" else None).train()
    inputs = batch((1, 5), (3,))
    expected = loss_and_gradients(model, inputs)
    package = types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=LigerFusedLinearCrossEntropyLoss)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(lm_loss, "is_liger_kernel_available", lambda: True)
    heads = []
    model.lm_head.register_forward_hook(lambda *args: heads.append(args))
    assert_all_close(loss_and_gradients(model, inputs), expected)
    assert len(heads) == 1  # on a CPU nothing changes
    monkeypatch.setattr(lm_loss, "_fused_kernel_applies", lambda *args: True)
    assert_all_close(loss_and_gradients(model, inputs), expected)
    assert len(heads) == 1  # the kernel reads the weight itself


def test_a_loss_function_of_the_user_is_used():
    model, inputs = tiny_model().train(), batch((1,), (3,))
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 3
    assert model(**inputs).loss.item() == 3


def test_a_batch_without_labels_costs_nothing():
    model, inputs = tiny_model().train(), batch((1,), (3,))
    inputs["labels"][:] = -100
    loss, *gradients = loss_and_gradients(model, inputs)
    assert loss == 0 and all(g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("pixels", [None, images(2)])
@pytest.mark.parametrize("own_loss", [False, True])
def test_a_text_only_batch_gives_gradients_to_all(pixels, own_loss):
    """
    Ranks of a distributed run wait for the gradient of every trainable parameter; also where a trainer computes its
    own loss from the logits, and the model is called as in inference, with a cache.
    """
    model = tiny_model(max_num_frames=2).train()
    ids = torch.cat([row(), row(seed=1)])
    output = model(input_ids=ids, pixel_values=pixels, labels=None if own_loss else ids)
    (output.logits.logsumexp(-1).mean() if own_loss else output.loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if "vision_tower" in name or "perceiver" in name or "attn.to_" in name:
                assert parameter.grad.eq(0).all(), name
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("every_n", [1, 2])
def test_gradient_checkpointing(use_reentrant, frozen, every_n):
    model = tiny_model(cross_attn_every_n_layers=every_n).train()
    if frozen:  # as Flamingo is trained: towers fixed, new layers free
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("perceiver" in name or "gated_cross_attn" in name)
    inputs = batch((1, 5), (3,))
    expected = loss_and_gradients(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    calls = []
    model.model.decoder_layers[1].gated_cross_attn_layer.attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    assert_all_close(loss_and_gradients(model, inputs), expected)
    assert len(calls) == 2  # once forward, once more backward


def test_gradients_reach_the_pixels():
    model, inputs = tiny_model(), batch((1, 5), (3,))
    inputs["pixel_values"].requires_grad_()
    model(**inputs).loss.backward()
    grad = inputs["pixel_values"].grad.flatten(2).abs().sum(-1)  # (B, T)
    assert grad[0].gt(0).all() and grad[1, 0] > 0 and grad[1, 1] == 0  # the second row has one image


# --- packing ---


def samples():
    """Four samples of different lengths with 2, 0, 1 and 1 images."""
    rows = [row(1, 5, length=9), row(length=4, seed=1), row(2, length=7, seed=2), row(0, length=5, seed=3)]
    pixels = images(1, 4)
    labels = []
    for r in rows:
        label = r.masked_fill(r == IMAGE, -100)
        label[:, 0] = -100  # nothing predicts a sample's first token
        labels.append(label)
    return rows, labels, pixels, [2, 0, 1, 1]


def packed():
    rows, labels, pixels, counts = samples()
    index, positions, first = [], [], 0
    for r, count in zip(rows, counts, strict=True):
        own = (r == IMAGE).long().cumsum(1)
        index.append(own + first * (own > 0))
        positions.append(torch.arange(r.shape[1])[None])
        first += count
    return {
        "input_ids": torch.cat(rows, dim=1),
        "labels": torch.cat(labels, dim=1),
        "pixel_values": pixels,
        "media_index": torch.cat(index, dim=1),
        "position_ids": torch.cat(positions, dim=1),
    }


def one_by_one(model):
    """The summed loss over all labels of the samples, each alone, and their logits."""
    rows, labels, pixels, counts = samples()
    total, logits, first = 0, [], 0
    for r, label, count in zip(rows, labels, counts, strict=True):
        own = pixels[:, first : first + count] if count else None
        output = model(input_ids=r, labels=label, pixel_values=own, num_items_in_batch=1, skip_logits=False)
        total, first = total + output.loss, first + count
        logits.append(output.logits)
    return total, torch.cat(logits, dim=1)


@pytest.mark.parametrize("decoder", ["llama", "otter_mpt", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_samples_do_not_see_each_other(decoder, implementation):
    model = tiny_model(decoder).train()
    model.set_attn_implementation(implementation)
    inputs = packed()
    num_items = int((inputs["labels"] != -100).sum())

    def gradients():
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return grads

    total, logits = one_by_one(model)
    (total / num_items).backward()
    expected = gradients()
    output = model(**inputs, skip_logits=False)
    assert_close(output.logits, logits)
    output = model(**inputs)
    assert_close(output.loss, total / num_items, 1e-6)
    output.loss.backward()
    assert_all_close(gradients(), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["llama", "otter_mpt"])
def test_packed_samples_without_labels(decoder):
    """As for a loss of one's own: no cache is made, which would hide from the decoder where samples begin."""
    model, inputs = tiny_model(decoder), packed()
    del inputs["labels"]
    output = model(**inputs)
    assert output.past_key_values is None
    assert_close(output.logits, one_by_one(model)[1])
    alone = {"input_ids": row(), "position_ids": torch.arange(12)[None]}
    assert model(**alone).past_key_values is not None


@torch.no_grad()
def test_packed_equals_padded():
    model = tiny_model()
    rows, labels, pixels, counts = samples()
    ids, mask = pad_rows(rows, "right")
    padded_labels = torch.full_like(ids, -100)
    grid = torch.zeros(4, 2, *pixels.shape[2:])
    first = 0
    for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
        padded_labels[i, : label.shape[1]] = label[0]
        grid[i, :count] = pixels[0, first : first + count]
        first += count
    padded = model(input_ids=ids, attention_mask=mask, pixel_values=grid, labels=padded_labels)
    assert_close(model(**packed()).loss, padded.loss, 1e-6)


@pytest.mark.parametrize(
    "decoder, implementation",
    [
        ("llama", "varlen_sdpa"),
        ("gemma3_text", "varlen_sdpa"),
        ("otter_mpt", "varlen_sdpa"),
        ("llama", "flash_attention_2"),
        ("gemma3_text", "flash_attention_2"),  # test_attention_mpt.py has MPT: this stand-in knows no ALiBi
    ],
)
def test_padding_free_through_a_variable_length_kernel(monkeypatch, decoder, implementation):
    calls = flash_stand_in.install(monkeypatch)
    model = tiny_model(decoder).train()
    total, logits = one_by_one(model)
    inputs = packed()
    num_items = (inputs["labels"] != -100).sum()
    expected = torch.autograd.grad(total / num_items, model.lm_head.weight)[0]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    flat = collate([{"input_ids": r[0].tolist(), "labels": r[0].tolist()} for r in samples()[0]])
    inputs |= {key: flat[key] for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
    model.config._attn_implementation = implementation
    assert_close(model(**inputs, skip_logits=False).logits, logits)
    loss = model(**inputs).loss
    assert_close(loss, total / num_items, 1e-6)
    assert_close(torch.autograd.grad(loss, model.lm_head.weight)[0], expected)
    assert bool(calls) == (implementation == "flash_attention_2")


@pytest.mark.slow
@torch.no_grad()
def test_packed_through_flex_attention():
    model = tiny_model()
    total, logits = one_by_one(model)
    inputs = packed()
    model.set_attn_implementation({"text_config": "flex_attention"})
    output = model(**inputs)
    assert_close(output.logits, logits)
    assert_close(output.loss, total / (inputs["labels"] != -100).sum(), 1e-6)


# --- on top ---


def test_lora():
    from peft import LoraConfig, get_peft_model

    model, inputs = tiny_model(), batch((1, 5), (3,))
    before = copy.deepcopy(model.state_dict())
    peft_model = get_peft_model(
        model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["perceiver"])
    )
    peft_model.train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = peft_model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    peft_model.eval()
    with torch.no_grad():
        expected = peft_model(**inputs).logits
    tokens = peft_model.generate(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], max_new_tokens=3)
    merged = peft_model.merge_and_unload()
    with torch.no_grad():
        assert_close(merged(**inputs).logits, expected)
    assert tokens.shape == (2, 15)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert all("q_proj" in name or "v_proj" in name or "perceiver" in name for name in changed)


def test_embeddings_may_be_trained_alone():
    model, inputs = tiny_model().train(), batch((1, 5), (3,))
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    model(**inputs).loss.backward()
    assert model.get_input_embeddings().weight.grad[IMAGE].abs().sum() > 0
    assert model.get_input_embeddings().weight.grad[PAD].eq(0).all()


@pytest.mark.slow
def test_compiled_training_forward_has_no_graph_break():
    model, inputs = tiny_model().train(), batch((1, 5), (3,))
    expected = loss_and_gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_all_close(loss_and_gradients(compiled, inputs), expected, 1e-5)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if torch.is_tensor(tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("cross_attention", ["sdpa", "eager"])
def test_many_images_train_without_a_mask_over_all_of_them(cross_attention):
    """16 images of 64 latents, 2,048 tokens, by segments and by blocks: no tensor of tokens x latents, or near it."""
    model = tiny_model(perceiver_num_latents=64, text={"max_position_embeddings": 2048}).train()
    model.set_attn_implementation({"": cross_attention, "text_config": "sdpa", "vision_config": "sdpa"})
    ids = row(*range(0, 2048, 128), length=2048)
    with LargestTensor() as largest:
        model(input_ids=ids, pixel_values=images(1, 16), labels=ids).loss.backward()
    assert largest.numel < 2048 * 16 * 64 / 4


def test_a_vocabulary_of_262144_does_not_blow_memory(monkeypatch):
    monkeypatch.setattr(lm_loss, "MAX_LOGITS", 2**20)
    head, hidden_states = torch.nn.Linear(4, 2**18, bias=False), torch.randn(1, 30, 4, requires_grad=True)
    labels = torch.randint(2**18, (1, 30), generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        lm_loss.supervised_loss(head, hidden_states, labels, vocab_size=2**18).backward()
    assert largest.numel <= 2**20 < 29 * 2**18
