"""Attention opened: the results of torch's own, more heads or fewer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.evaluation import flat_tensors
from sparsekit.surgery.attention import attention_forward, is_open, open_attention_


def _attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def _masks(kind, targets, sources, batch, heads):
    causal = torch.ones(targets, sources).triu(1).bool()
    padding = torch.zeros(batch, sources).bool()
    padding[0, -1] = True
    return {
        "none": {},
        "causal": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal.double() * -3, "key_padding_mask": padding.double() * -2},
        "each head": {"attn_mask": torch.randn(batch * heads, targets, sources).double()},
    }[kind]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "bias": False},
        {"kdim": 7, "vdim": 5},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)
def test_an_opened_attention_gives_the_results_of_torch_for_all_arguments(options):
    module = _attention(**options).eval()
    opened = copy.deepcopy(module)
    open_attention_(opened)
    opened = pickle.loads(pickle.dumps(opened))
    assert is_open(opened)
    assert isinstance(opened, nn.MultiheadAttention)
    assert not is_open(module)
    assert opened.state_dict().keys() == module.state_dict().keys()
    query = torch.randn(4, 2, 12).double()
    key, value = (torch.randn(4, 2, width).double() for width in (module.kdim, module.vdim))
    same = module.kdim == module.vdim == 12
    for tensors in ((query, query, query) if same else (query, key, value), (query, key, value)):
        if module.batch_first:
            tensors = tuple({id(t): t.transpose(0, 1).contiguous() for t in tensors}[id(t)] for t in tensors)
        for kind in ("none", "causal", "padding", "both", "each head"):
            for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                arguments = {**_masks(kind, 4, 4, 2, 3), **weights}
                expected, found = (flat_tensors(one(*tensors, **arguments)) for one in (module, opened))
                assert [t.shape for t in found] == [t.shape for t in expected]
                for one, other in zip(expected, found, strict=True):
                    torch.testing.assert_close(one, other)
    alone = [t[:, 0] if not module.batch_first else t[0] for t in (query, key, value)][
        : 3 if not same else 1
    ] * 3
    for one, other in zip(flat_tensors(module(*alone[:3])), flat_tensors(opened(*alone[:3])), strict=True):
        torch.testing.assert_close(one, other)


def test_the_function_gives_the_results_of_torch_in_training_too():
    module = _attention(dropout=0.5)
    opened = copy.deepcopy(module)
    open_attention_(opened)
    x = torch.randn(4, 2, 12).double()
    torch.manual_seed(3)
    expected, _ = module(x, x, x)
    torch.manual_seed(3)
    found, _ = opened(x, x, x)
    assert found.shape == expected.shape
    assert (found == 0).sum() == (expected == 0).sum()
    static = torch.randn(6, 5, 4).double()
    arguments = (x, x, x, 12, 3, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0)
    out = (module.out_proj.weight, module.out_proj.bias)
    for one, other in zip(
        nn.functional.multi_head_attention_forward(*arguments, *out, static_k=static, static_v=static),
        attention_forward(*arguments, *out, static_k=static, static_v=static),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_subclass_with_a_forward_of_its_own_is_left_as_it_is():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    class Named(nn.MultiheadAttention):
        width = 8

    own, named = Own(8, 2), Named(8, 2)
    open_attention_(own)
    open_attention_(named)
    assert type(own) is Own
    assert is_open(named)
    assert named.width == 8
    assert isinstance(copy.deepcopy(named), Named)


class Encoder(nn.Module):
    """Maps as tokens through two encoder layers of torch's, with padding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        padding = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device)
        padding[:, -1] = True
        return self.head(self.encoder(tokens, src_key_padding_mask=padding)[:, :3].mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_cut_encoder_computes_the_same_with_and_without_the_fused_kernel(tmp_path):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 3, 8, 8)
    groups = sk.find_groups(model, x, round_to=1, min_channels=1)
    free = {group.name: group for group in groups.free}
    assert list(free) == [f"encoder.layers.{i}.{layer}" for i in (0, 1) for layer in ("self_attn", "linear1")]
    assert free["encoder.layers.0.self_attn"].n_channels == 4
    for parts in (["linear1"], ["self_attn"], ["self_attn", "linear1"]):
        masks = {
            name: torch.arange(group.n_channels) % 2 == 0
            for name, group in free.items()
            if name.rpartition(".")[2] in parts
        }
        plan = sk.make_plan(groups, masks)
        pruned = sk.apply_plan(model, plan)
        assert sk.verify_cut(model, pruned, plan).max_rel < 1e-5
        attention = pruned.encoder.layers[0].self_attn
        heads = 2 if "self_attn" in parts else 4
        assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (heads, 4, 16)
        assert attention.in_proj_weight.shape == (12 * heads, 16)
        folder = sk.save(pruned, tmp_path / "artifact", factory=Encoder, plan=plan)
        fast = torch.backends.mha.get_fastpath_enabled()
        found = []
        with torch.no_grad():
            for enabled in (True, False):
                torch.backends.mha.set_fastpath_enabled(enabled)
                found.append(pruned(x))
                assert torch.equal(sk.load(folder, factory=Encoder)(x), found[-1])
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.testing.assert_close(*found)


class Block(nn.Module):
    """Attention whose weights are thrown away, or returned."""

    def __init__(self, returned):
        super().__init__()
        self.embed, self.returned = nn.Linear(6, 16), returned
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        tokens = self.embed(x)
        attended, weights = self.attention(tokens, tokens, tokens)
        out = self.head(torch.relu(tokens + attended)).mean(1)
        return (out, weights) if self.returned else out


def test_heads_stay_only_where_the_mean_of_their_weights_is_read():
    x = torch.randn(2, 5, 6)
    groups = {g.name: g for g in sk.find_groups(Block(False), x, round_to=1, min_channels=1)}
    assert not groups["attention"].frozen
    assert not groups["embed"].frozen
    # Without a layer norm the residual width goes, too: columns of the projections, rows of the last layer.
    assert {(m.tensor, m.dim) for m in groups["embed"].members} >= {
        ("attention.in_proj_weight", 1),
        ("attention.out_proj.weight", 0),
        ("attention.out_proj.bias", 0),
    }
    read = {g.name: g for g in sk.find_groups(Block(True), x, round_to=1, min_channels=1)}
    assert "mean mixes channels" in read["attention"].frozen
    assert not read["embed"].frozen


def test_the_projections_of_attention_have_costs():
    x = torch.randn(2, 5, 6)
    costs = {layer.weight: layer for layer in sk.find_groups(Block(False), x).layers}
    assert list(costs) == [
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    ]
    assert costs["attention.in_proj_weight"].macs == 5 * 16 * 48
    assert costs["attention.out_proj.weight"].macs == 5 * 16 * 16
