"""Which weights train, how fast, and what a person reads of it."""

import pytest
import torch
from helpers.potentials import lennard_jones, mace_of_irreps, needs_chgnet, needs_mace, tiny_chgnet
from helpers.structures import skewed

from ase_bptt import tuning
from ase_bptt.potentials.direct import Direct
from ase_bptt.relaxation import relax
from ase_bptt.steppers import GradientDescent
from ase_bptt.tuning import layers, low_rank

LAST = [
    pytest.param(mace_of_irreps, 1, "model.readouts.1.", "model.readouts.0.", id="mace", marks=needs_mace),
    pytest.param(tiny_chgnet, 1, "model.mlp.", "model.atom_conv_layers.1.", id="chgnet", marks=needs_chgnet),
    pytest.param(
        tiny_chgnet, 2, "model.atom_conv_layers.1.", "model.atom_conv_layers.0.", id="chgnet-2", marks=needs_chgnet
    ),
    pytest.param(Direct, 1, "force_head.", "updates.0.", id="direct"),
]


def trained(potential):
    return {name for name, p in potential.named_parameters() if p.requires_grad}


def moving(potential):
    """Names of the weights that a relaxation's gradient reaches."""
    relax(potential, skewed(), steps=2, fmax=1e-6, stepper="gd").positions.pow(2).sum().backward()
    return {name for name, p in potential.named_parameters() if p.grad is not None}


@needs_mace
def test_patterns_choose_and_freeze():
    potential = mace_of_irreps()
    found = tuning.select(potential, train=["*readouts*", "*products.1.*"], freeze=["*linear_2*"])
    chosen = trained(potential)
    assert all("readouts" in name or "products.1." in name for name in chosen)
    assert "model.readouts.1.linear_1.weight" in chosen
    assert "model.readouts.1.linear_2.weight" not in chosen
    sizes = {name: p.numel() for name, p in potential.named_parameters()}
    assert found == (sum(sizes[name] for name in chosen), sum(sizes.values()))


@needs_mace
def test_what_was_chosen_before_does_not_matter():
    potential = mace_of_irreps()
    tuning.select(potential, train="*readouts*")
    tuning.select(potential, freeze="*node_embedding*")
    everything = {name for name, _ in potential.named_parameters()}
    assert trained(potential) == everything - {"model.node_embedding.linear.weight"}


@pytest.mark.parametrize(("make", "last", "inside", "outside"), LAST)
def test_the_last_layers(make, last, inside, outside):
    potential = make()
    tuning.select(potential, last=last)
    chosen = trained(potential)
    assert all(name in chosen for name, _ in potential.named_parameters() if name.startswith(inside))
    assert not any(name.startswith(outside) for name in chosen)
    reached = moving(potential)
    assert reached
    assert reached <= chosen


@pytest.mark.parametrize("make", [case.values[0] for case in (*LAST[:2], LAST[3])], ids=["mace", "chgnet", "direct"])
def test_layers_hold_every_weight_that_forces_depend_on_once(make):
    potential = make()
    names = [name for layer in layers(potential) for name in layer]
    assert len(names) == len(set(names))
    rest = {name for name, _ in potential.named_parameters()} - set(names)
    assert all("composition" in name for name in rest)


@needs_mace
def test_last_comes_beside_train():
    potential = mace_of_irreps()
    tuning.select(potential, train="*node_embedding*", last=1)
    chosen = trained(potential)
    assert "model.node_embedding.linear.weight" in chosen
    assert "model.readouts.1.linear_1.weight" in chosen
    assert "model.readouts.0.linear.weight" not in chosen


def test_a_family_can_say_its_layers():
    class Own(type(lennard_jones())):
        def layers(self):
            return [["epsilon"], ["sigma"]]

    potential = Own(smooth=True)
    names = [name for name, _ in potential.named_parameters()]
    assert {"epsilon", "sigma"} <= set(names)
    tuning.select(potential, last=1)
    assert trained(potential) == {"sigma"}


@needs_mace
@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"train": ["*readuots*"]}, r"No weight matches '\*readuots\*'; there are \d+, as .*readouts"),
        ({"freeze": ["nothing"]}, "No weight matches 'nothing'"),
        ({"freeze": ["*"]}, "Nothing of this mace potential is left to train"),
        ({"last": 4}, "has 3 layers: the last 4 of them"),
        ({"last": 0}, "has 3 layers: the last 0 of them"),
        ({"train": ["*symmetric*"], "lora": 4}, "no linear maps that are to be trained"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(how, match):
    potential = mace_of_irreps()
    potential.model.node_embedding.requires_grad_(False)
    before = trained(potential)
    with pytest.raises(ValueError, match=match):
        tuning.prepare(potential, **how)
    assert trained(potential) == before


def test_layers_of_a_family_that_has_none():
    with pytest.raises(NotImplementedError, match="layers of the family 'lj' are not known"):
        tuning.select(lennard_jones(), last=1)


@needs_mace
def test_choosing_comes_before_low_rank_updates():
    potential = mace_of_irreps()
    low_rank.add(potential)
    with pytest.raises(ValueError, match="before low-rank updates"):
        tuning.select(potential, last=1)


@needs_mace
def test_what_trains_is_described():
    potential = mace_of_irreps()
    total = sum(p.numel() for p in potential.parameters())
    assert tuning.prepare(potential) == f"trains all {total:,} weights"
    # readouts.1 of the tiny MACE: 8 to 8 and 8 to 1
    assert tuning.prepare(potential, train=["*readouts.1*"]) == f"trains 72 of {total:,} weights"
    words = tuning.prepare(potential, train=["*readouts.1*"], lora=2)
    # (8 + 8) rank 2, and (8 + 1) rank 1, for a column has no more
    assert words == f"trains 41 parameters of low-rank updates of {total:,} weights (LoRA, rank 2)"
    assert all("readouts.1" in name for name in trained(potential))


@needs_mace
def test_rates_by_pattern_and_for_the_stepper():
    potential = mace_of_irreps()
    step = torch.nn.Parameter(torch.tensor(0.04, dtype=torch.float64))
    momentum = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    made = tuning.groups(
        potential, GradientDescent(step, momentum=momentum), {"*readouts*": 10.0, "*linear*": 0.1}, lr=1e-3
    )
    optimizer = torch.optim.AdamW(made, lr=5e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(potential.parameters())) + 2
    named = dict(potential.named_parameters())
    assert rates[id(named["model.readouts.0.linear.weight"])] == pytest.approx(1e-2)
    assert rates[id(named["model.products.0.linear.weight"])] == pytest.approx(1e-4)
    assert rates[id(named["model.interactions.0.skip_tp.weight"])] == 5e-3
    assert rates[id(step)] == pytest.approx(0.0004)
    assert rates[id(momentum)] == pytest.approx(0.01)
    assert optimizer.param_groups[0]["lr"] == 5e-3


@needs_mace
def test_rates_hold_for_low_rank_updates_under_the_plain_names():
    potential = mace_of_irreps()
    low_rank.add(potential)
    made = tuning.groups(potential, None, {"model.readouts.0.linear.weight": 2.0}, lr=1e-3)
    assert [group["name"] for group in made] == ["weights", "model.readouts.0.linear.weight"]
    assert len(made[1]["params"]) == 2
    assert made[1]["lr"] == pytest.approx(2e-3)


@needs_mace
@pytest.mark.parametrize(
    ("rates", "match"),
    [
        ({"*readout_mlp*": 2.0}, "No weight that trains matches"),
        ({"*products*": 2.0}, "No weight that trains matches"),
        ({"*readouts*": 0.0}, r"The factor of '\*readouts\*' must be positive"),
    ],
)
def test_rates_that_mean_nothing(rates, match):
    potential = mace_of_irreps()
    tuning.select(potential, train="*readouts*")
    with pytest.raises(ValueError, match=match):
        tuning.groups(potential, None, rates, lr=1e-3)


@needs_mace
def test_a_run_trains_what_was_chosen_and_no_more():
    """A step of the optimizer on LoRA's numbers moves the energies, and leaves the pretrained weights."""
    potential = mace_of_irreps()
    base = {k: v.clone() for k, v in potential.state_dict().items()}
    tuning.prepare(potential, last=1, lora=2)
    optimizer = torch.optim.AdamW(tuning.groups(potential, lr=2e-3), lr=2e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = relax(potential, skewed(), steps=2, fmax=1e-6, stepper="gd").positions.pow(2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    after = dict(low_rank.merge(potential).state_dict())
    changed = {name for name, value in base.items() if not torch.equal(value, after[name])}
    assert changed
    assert changed <= set(layers(potential)[-1])
