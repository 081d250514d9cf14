"""Hidden units of recurrent layers are channels: in all gates, layers and directions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import find_groups
from torch import Tensor, nn

import sparsekit as sk

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


class Sequences(nn.Module):
    """A layer before a recurrent one, and one behind it."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], read: int, **own: nn.Module) -> None:
        super().__init__()
        self.run, self.hidden = run, 6
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(read, 3)
        for name, module in own.items():
            setattr(self, name, module)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.run(self, self.embed(steps).relu()))


def _outputs(self: Any, x: Tensor) -> Tensor:
    output: Tensor = self.rnn(x)[0]
    return output[:, -1]


def _last_states(self: Any, x: Tensor) -> Tensor:
    state = self.rnn(x.transpose(0, 1))[1]
    state = state[0] if isinstance(state, tuple) else state
    return torch.cat([state[-2], state[-1]], 1)


def _states_of_zeros(self: Any, x: Tensor) -> Tensor:
    """As tutorials write it: the first state has the size of an attribute."""
    state = torch.zeros(2, x.size(0), self.hidden).to(x)
    output, _ = self.rnn(x, (state, state.clone()) if isinstance(self.rnn, nn.LSTM) else state)
    return output[:, -1]


def _packed(self: Any, x: Tensor) -> Tensor:
    pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
    lengths = torch.tensor([7 - i for i in range(len(x))])
    output, state = self.rnn(pack(x, lengths, batch_first=True, enforce_sorted=False))
    return pad(output, batch_first=True)[0].amax(1) + torch.cat([state[-2], state[-1]], -1)


def _cells(self: Any, x: Tensor) -> Tensor:
    state: Any = None
    for step in x.unbind(1):
        state = self.cell(step, state)
    return state[0] if isinstance(state, tuple) else state


def _decoded(self: Any, x: Tensor) -> Tensor:
    """The last state of one layer, and a vector computed of it, are the first of others."""
    _, state = self.encoder(x)
    steps, _ = self.rnn(x, state)
    first = self.first(steps.mean(1))
    return self.cell(x[:, 0], (first, torch.zeros_like(first)))[0]


def _lstm(**options: Any) -> nn.LSTM:
    return nn.LSTM(8, 6, **options)


# What each network makes, how many free channels each layer has.
NETWORKS: dict[str, tuple[Callable[[], Sequences], dict[str, int]]] = {
    "lstm": (lambda: Sequences(_outputs, 6, rnn=_lstm(batch_first=True)), {"embed": 8, "rnn": 6}),
    "two layers in two directions": (
        lambda: Sequences(_last_states, 12, rnn=_lstm(num_layers=2, bidirectional=True)),
        {"embed": 8, "rnn": 6},
    ),
    "gru without biases": (
        lambda: Sequences(_last_states, 12, rnn=nn.GRU(8, 6, 2, bidirectional=True, bias=False)),
        {"embed": 8, "rnn": 6},
    ),
    "plain": (
        lambda: Sequences(_outputs, 6, rnn=nn.RNN(8, 6, batch_first=True, nonlinearity="relu")),
        {"embed": 8, "rnn": 6},
    ),
    # What is projected may go; its hidden units may not.
    "projection": (
        lambda: Sequences(
            _outputs, 8, rnn=_lstm(num_layers=2, bidirectional=True, proj_size=4, batch_first=True)
        ),
        {"embed": 8, "rnn": 4},
    ),
    "lstm from zeros": (
        lambda: Sequences(_states_of_zeros, 6, rnn=_lstm(num_layers=2, batch_first=True)),
        {"embed": 8, "rnn": 6},
    ),
    "gru from zeros": (
        lambda: Sequences(_states_of_zeros, 6, rnn=nn.GRU(8, 6, 2, batch_first=True)),
        {"embed": 8, "rnn": 6},
    ),
    "packed": (
        lambda: Sequences(_packed, 12, rnn=nn.GRU(8, 6, batch_first=True, bidirectional=True)),
        {"embed": 8, "rnn": 6},
    ),
    "lstm cell": (lambda: Sequences(_cells, 6, cell=nn.LSTMCell(8, 6)), {"embed": 8, "cell": 6}),
    "gru cell": (lambda: Sequences(_cells, 6, cell=nn.GRUCell(8, 6)), {"embed": 8, "cell": 6}),
    "plain cell": (lambda: Sequences(_cells, 6, cell=nn.RNNCell(8, 6)), {"embed": 8, "cell": 6}),
    "decoder": (
        lambda: Sequences(
            _decoded,
            4,
            encoder=nn.GRU(8, 6, 2, batch_first=True),
            rnn=nn.GRU(8, 6, 2, batch_first=True),
            first=nn.Linear(6, 4),
            cell=nn.LSTMCell(8, 4),
        ),
        {"embed": 8, "encoder": 6, "rnn": 6, "first": 4, "cell": 4},
    ),
}
STEPS = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))


def _emptied(model: nn.Module, groups: sk.ChannelGroups, masks: dict[str, Tensor]) -> nn.Module:
    """A copy in which the penalised weights of all that goes are zero."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for group in groups.free:
            for member in group.penalised:
                goes = [not bool(masks[group.name][i // member.repeat]) for i in range(len(member.positions))]
                positions = torch.tensor(member.positions)[torch.tensor(goes)]
                tensors[member.tensor].index_fill_(member.dim, positions, 0)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_units_go_and_zero_units_change_nothing(name: str) -> None:
    make, free = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    groups = find_groups(model, STEPS)
    made = {g.name: {m.module for m in g.of_role("producer")} for g in groups.free}
    assert {n: sum(g.n_channels for g in groups.free if n in made[g.name]) for n in free} == free
    masks = {g.name: torch.arange(g.n_channels) % 3 != 1 for g in groups.free}
    plan = sk.make_plan(groups, masks)
    assert sk.verify_cut(model, sk.apply_plan(model, plan), plan).max_rel < 1e-5
    emptied = _emptied(model, groups, masks)
    with torch.no_grad():
        found, expected = sk.apply_plan(emptied, plan)(STEPS), emptied(STEPS)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_unit_owns_a_row_in_every_gate_and_a_column_in_all_that_reads_it() -> None:
    model = Sequences(_last_states, 12, rnn=_lstm(num_layers=2, bidirectional=True))
    (group,) = [g for g in find_groups(model, STEPS).free if g.name == "rnn"]
    owned: dict[tuple[str, int], set[int]] = {}
    for member in group.members:
        owned.setdefault((member.tensor, member.dim), set()).update(member.positions[: member.repeat])
    ends = ("l0", "l0_reverse", "l1", "l1_reverse")
    rows = {(f"rnn.{kind}_{end}", 0): {0, 6, 12, 18} for end in ends for kind in ("weight_ih", "weight_hh")}
    biases = {(f"rnn.{kind}_{end}", 0): {0, 6, 12, 18} for end in ends for kind in ("bias_ih", "bias_hh")}
    columns = {(f"rnn.weight_hh_{end}", 1): {0} for end in ends}
    next_layer = {(f"rnn.weight_ih_{end}", 1): {0, 6} for end in ends[2:]}
    assert owned == {**rows, **biases, **columns, **next_layer, ("head.weight", 1): {0, 6}}
    # The gates behind a sigmoid only scale: shrinking them to zero would leave them half open.
    penalised = {m.positions[0] for m in group.penalised if m.tensor.startswith("rnn.")}
    assert penalised == {12}


def _from_six_zeros(self: Any, x: Tensor) -> Tensor:
    output: Tensor = self.rnn(x, torch.zeros(1, len(x), 6).to(x))[0]
    return output[:, -1]


@pytest.mark.parametrize(
    ("run", "rnn", "reason"),
    [
        (_from_six_zeros, nn.GRU(8, 6, batch_first=True), "a fixed size"),
        (_outputs, nn.LSTM(8, 6, 1, proj_size=3, batch_first=True), "torch tells the projection"),
        (_outputs, nn.utils.parametrizations.weight_norm(_lstm(batch_first=True), "weight_hh_l0"), "parametrisation"),
    ],
)  # fmt: skip
def test_units_that_stay_say_why(run: Any, rnn: nn.Module, reason: str) -> None:
    model = Sequences(run, 3 if "projection" in reason else 6, rnn=rnn)
    groups = [g for g in find_groups(model, STEPS) if "rnn" in {m.module for m in g.of_role("producer")}]
    assert groups
    assert any(reason in g.frozen for g in groups)


def test_states_of_an_attributes_size_shrink_with_it() -> None:
    class Unrolled(nn.Module):
        """A convolutional LSTM, as it is written by hand."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.gates, self.head = 6, nn.Conv2d(3 + 6, 24, 3, padding=1), nn.Conv2d(6, 2, 1)

        def forward(self, film: Tensor) -> Tensor:
            n, steps, _, height, width = film.shape
            h = torch.zeros(n, self.hidden, height, width, dtype=film.dtype)
            c = film.new_zeros((n, self.hidden, height, width))
            for step in range(steps):
                i, f, o, g = self.gates(torch.cat([film[:, step], h], 1)).split(self.hidden, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            return self.head(h)

    model = Unrolled().eval()
    groups = find_groups(model, torch.randn(1, 3, 3, 4, 4))
    assert [(g.name, g.n_channels) for g in groups.free] == [("gates", 6)]
    plan = sk.make_plan(groups, {"gates": torch.arange(6) % 3 != 1})
    pruned = sk.apply_plan(model, plan)
    assert (pruned.hidden, tuple(pruned.gates.weight.shape[:2])) == (4, (16, 7))
    assert sk.verify_cut(model, pruned, plan).max_rel < 1e-5
