"""Names, keywords and flags that are not known: each is refused with what was probably meant; names in any case."""

import inspect

import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace
from helpers.shell import run
from helpers.structures import argon

from ase_bptt import (
    BPTTOptimizer,
    RelaxationPair,
    Structures,
    TorchCalculator,
    Trainer,
    datasets,
    load_potential,
    relax,
    steppers,
)
from ase_bptt.adjoints import FullTape, Guided, Replay, make_adjoint
from ase_bptt.losses import named_loss, root_delta_q
from ase_bptt.optimize import BFGS, FIRE, LBFGS, QuasiNewton
from ase_bptt.steppers import make_stepper
from ase_bptt.suggestions import nearest
from ase_bptt.terms import make_terms
from ase_bptt.utils import best_device


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("devise", ["device", "dtype"], "device"),
        ("FMAX", ["fmax", "steps"], "fmax"),
        ("step-size", ["step_size"], "step_size"),
        ("learning_rate", ["lr", "rates"], "lr"),
        ("--learning-rate", ["--lr", "--rattle"], "--lr"),
        ("max_steps", ["steps", "maxstep"], "steps"),
        ("pot", ["potential", "out"], "potential"),
        ("gradient_descent", ["gd", "fire"], "gd"),
        ("zzz", ["gd", "fire"], None),
        ("learning_rate", ["gd"], None),
    ],
)
def test_the_nearest_word(word, known, meant):
    assert nearest(word, known) == meant


class TestCalculator:
    def test_asks_for_a_potential(self):
        with pytest.raises(TypeError, match=r"^TorchCalculator needs a potential: give the name of one \('chgnet'"):
            TorchCalculator()

    @pytest.mark.parametrize(
        ("keyword", "meant"),
        [
            ("model", "did you mean 'potential'"),
            ("models", "did you mean 'potential'"),
            ("model_paths", "did you mean 'potential'"),
            ("devise", "did you mean 'device'"),
            ("use_device", "did you mean 'device'"),
            ("default_dtype", "did you mean 'dtype'"),
            ("head", "potential='mace:NAME:HEAD'"),
            ("modal", "potential='sevennet:NAME:MODAL'"),
            ("return_site_energies", "get_potential_energies"),
        ],
    )
    @pytest.mark.parametrize("potential", [None, "lj"])
    def test_a_keyword_of_another_calculator_is_refused_with_ours(self, keyword, meant, potential):
        given = {} if potential is None else {"potential": potential}
        with pytest.raises(TypeError, match=f"^TorchCalculator has no keyword '{keyword}' .*{meant}.*; it has pot"):
            TorchCalculator(**given, **{keyword: "chgnet"})

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            pytest.param("mace.calculators", "MACECalculator", marks=needs_mace),
            pytest.param("chgnet.model.dynamics", "CHGNetCalculator", marks=needs_chgnet),
        ],
    )
    def test_none_of_a_familys_keywords_is_swallowed(self, module, name):
        parameters = inspect.signature(getattr(pytest.importorskip(module), name).__init__).parameters.values()
        theirs = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self", "device"}
        for keyword in theirs:
            with pytest.raises(TypeError, match=f"no keyword '{keyword}'"):
                TorchCalculator("lj", **{keyword: None})

    def test_keywords_of_ase_are_taken(self):
        atoms = argon()
        calculator = TorchCalculator(lennard_jones(), atoms=atoms, directory=".", label="argon")
        assert atoms.calc is calculator
        assert np.isfinite(atoms.get_potential_energy())

    def test_what_is_no_potential(self):
        with pytest.raises(TypeError, match="a path or a torch module, not of type Atoms"):
            TorchCalculator(bulk("Cu"))

    @pytest.mark.parametrize(("name", "near"), [("chgent", "chgnet"), ("CHGNet", "chgnet"), ("mace_si", "mace-si")])
    def test_a_misspelt_potential(self, name, near):
        with pytest.raises(ValueError, match=f"no potential '{name}' \\(did you mean '{near}'\\?\\): it is no file"):
            load_potential(name)


class TestOptimizer:
    @pytest.mark.parametrize(
        ("given", "error", "text"),
        [
            ({"step_size": 0.1}, TypeError, "no keyword 'step_size' .it belongs to stepper='gd'"),
            ({"stepper": "gd", "dt": 0.1}, TypeError, "no keyword 'dt' .it belongs to stepper='fire'"),
            ({"fmax": 0.1}, TypeError, "no keyword 'fmax' .give it to run.., as run.fmax="),
            ({"logfle": None}, TypeError, "no keyword 'logfle' .did you mean 'logfile'"),
            ({"optimizer": "fire"}, TypeError, "no keyword 'optimizer' .did you mean 'stepper'"),
            ({"stepper": steppers.FIRE(), "step_size": 0.1}, TypeError, "it belongs to stepper='gd'"),
            ({"stepper": steppers.FIRE(), "dt": 0.1}, TypeError, "Set dt on the stepper object itself"),
            ({"stepper": "fier"}, ValueError, "no stepper 'fier' .did you mean 'fire'"),
            ({"adjoint": "guidd:3"}, ValueError, "no adjoint 'guidd:3' .did you mean 'guided:N'"),
        ],
    )
    def test_an_unknown_keyword_or_name(self, given, error, text):
        with pytest.raises(error, match=text):
            BPTTOptimizer(bulk("Cu"), **given)

    @pytest.mark.parametrize(
        ("cls", "keyword", "text"),
        [
            (FIRE, "step_size", "^FIRE has no keyword 'step_size' .it belongs to stepper='gd'"),
            (BFGS, "memory", "^BFGS has no keyword 'memory' .it belongs to stepper='lbfgs'"),
            (LBFGS, "max_step", "^LBFGS has no keyword 'max_step' .did you mean 'maxstep'"),
            (QuasiNewton, "max_step", "^BFGSLineSearch has no keyword 'max_step' .did you mean 'maxstep'"),
            (QuasiNewton, "dt", "^BFGSLineSearch has no keyword 'dt' .it belongs to stepper='fire'"),
            (QuasiNewton, "fmax", "^BFGSLineSearch has no keyword 'fmax' .give it to run"),
        ],
    )
    def test_those_with_the_names_of_ase(self, cls, keyword, text):
        with pytest.raises(TypeError, match=text):
            cls(bulk("Cu"), **{keyword: 1})

    @pytest.mark.parametrize("stepper", ["FIRE", "Fire", "fire"])
    def test_a_stepper_in_any_case(self, stepper):
        optimizer = BPTTOptimizer(bulk("Cu"), stepper=stepper, dt=0.05, adjoint="Implicit", loginterval=2)
        assert (optimizer.stepper.name, optimizer.stepper.dt) == ("fire", 0.05)


class TestNames:
    def test_in_any_case(self):
        assert type(make_stepper("GD", step_size=0.1)) is steppers.GradientDescent
        assert type(make_adjoint("FULL")) is FullTape
        assert make_adjoint("Guided:7").first == Guided(7).first
        assert make_adjoint("Replay:Differences").differences == Replay(differences=True).differences
        assert named_loss("Root_Delta_Q") is root_delta_q
        assert [term.name for term in make_terms(["Teacher"])] == ["teacher"]
        assert load_potential("lj", dtype="Float32").dtype is torch.float32
        assert relax("lj", argon(), stepper="BFGS", adjoint="implicit", steps=1).nsteps.tolist() == [1]

    @pytest.mark.parametrize(
        ("call", "near"),
        [
            (lambda: make_stepper("gradient_descent"), "'gd'"),
            (lambda: make_adjoint("tape"), "'full'"),
            (lambda: named_loss("rmse"), "'rmsd'"),
            (lambda: make_terms(["teachr"]), "'teacher'"),
            (lambda: make_stepper("FIRE2"), "'fire'"),
            (lambda: load_potential("lj", dtype="double"), "'float64'"),
            (lambda: datasets.si_defects("training"), "'train'"),
        ],
    )
    def test_misspelt(self, call, near):
        with pytest.raises(ValueError, match=f"^There is no .* .did you mean {near}.*; there are "):
            call()

    @pytest.mark.parametrize(
        ("call", "wanted"),
        [
            (lambda: make_stepper(steppers.FIRE), r"FIRE\(...\)"),
            (lambda: make_adjoint(Replay), r"Replay\(...\)"),
            (lambda: BPTTOptimizer(bulk("Cu"), stepper=steppers.BFGS), r"BFGS\(...\)"),
        ],
    )
    def test_a_class_in_place_of_an_object(self, call, wanted):
        with pytest.raises(ValueError, match=f"an object is wanted: {wanted}"):
            call()

    def test_a_hyperparameter_of_another_stepper(self):
        with pytest.raises(TypeError, match=r"'bfgs' has no keyword 'memory' .it belongs to stepper='lbfgs'"):
            make_stepper("bfgs", memory=3)


class TestShell:
    @pytest.mark.parametrize("words", [["relax", "x.xyz"], ["train", "runs"], ["evaluate", "runs"]])
    def test_asks_for_a_potential(self, words):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err == (
            f"ase-bptt: {words[0]} needs a potential: give --potential with a name (chgnet, mace:medium), a run folder "
            "of ours, or a native checkpoint with --trust.\n"
        )

    @pytest.mark.parametrize(
        ("words", "answer"),
        [
            ("train runs --learning-rate 0.1", "There is no flag --learning-rate: did you mean --lr?"),
            ("train --model chgnet runs", "There is no flag --model: did you mean --potential?"),
            ("train runs --batch_size=3", "There is no flag --batch_size: did you mean --batch-size?"),
            ("relax --optimizer=bfgs", "There is no flag --optimizer: did you mean --stepper?"),
            ("relax x --pot emt", "There is no flag --pot: did you mean --potential?"),
            ("evaluate x --max-steps 3", "There is no flag --max-steps: did you mean --steps?"),
            ("relax x -z", "There is no flag -z; ase-bptt relax --help lists them."),
            (
                "train runs --warm 2",
                "There is no flag --warm in the shell; Python has it: Trainer(warm_start_every=...).",
            ),
            (
                "demo --lora=4",
                "There is no flag --lora in the shell; Python has it: ase_bptt.tuning.prepare(potential, lora=...).",
            ),
            ("info --model chgnet", "There is no flag --model: POTENTIAL is given without a flag."),
        ],
    )
    def test_an_unknown_flag_is_answered_with_the_nearest_and_the_commands_usage(self, words, answer):
        code, out, err = run(*words.split())
        command = words.split()[0]
        assert (code, out) == (2, "")
        assert err.startswith(f"usage: ase-bptt {command} ")
        assert err.endswith(f"ase-bptt {command}: error: {answer}\n")

    @pytest.mark.parametrize(
        ("words", "answer"),
        [
            ("relx x", "There is no command 'relx' (did you mean 'relax'?); there are demo, train, relax"),
            ("--potential emt relax x", "--potential stands before the command: give it after."),
            ("relax x --stepper fier", "There is no stepper 'fier' (did you mean 'fire'?); there are"),
            ("train x --loss rmse", "There is no loss 'rmse' (did you mean 'rmsd'?); there are"),
            ("train x --adjoint tape", "There is no adjoint 'tape' (did you mean 'full'?); there are"),
            ("relax x --dtype double", "There is no dtype 'double' (did you mean 'float64'?); there are"),
        ],
    )
    def test_other_words(self, words, answer):
        code, _, err = run(*words.split())
        assert code == 2
        assert answer in err

    def test_names_in_any_case_and_numbers_below_zero(self):
        code, _, err = run(
            "train", "runs", "--stepper", "FIRE", "--loss", "RMSD", "--adjoint", "Replay", "--potential", "lj"
        )
        assert (code, err) == (2, "ase-bptt: There is no file or folder runs.\n")
        code, _, err = run("relax", "x", "--fmax", "-1")
        assert err.endswith("must be positive, got -1\n")


class TestDevice:
    """Where there is no GPU; tests/test_gpu.py holds the rest."""

    @pytest.fixture(autouse=True)
    def _without_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
    def test_one_that_is_not_here(self, device):
        sentence = f"There is no device '{device}' here: PyTorch finds no GPU; leave it out to take the best"
        for call in (
            load_potential,
            TorchCalculator,
            lambda spec, device: load_potential(lennard_jones(), device=device),
        ):
            with pytest.raises(ValueError, match=f"^{sentence}") as error:
                call("lj", device=device)
            assert "\n" not in str(error.value)
        code, _, err = run("relax", "x", "--potential", "lj", "--device", device)
        assert code == 2
        assert sentence in err.splitlines()[-1]

    @pytest.mark.filterwarnings("ignore::ase_bptt.training.state.NoGain")
    def test_neither_a_batch_nor_a_resumed_training_takes_it(self, tmp_path):
        with pytest.raises(ValueError, match=r"^There is no device 'cuda' here: PyTorch"):
            Structures.from_atoms(argon(), device="cuda")
        pairs = [RelaxationPair(argon(k), argon(k), str(k), str(k)) for k in range(2)]
        Trainer("lj", steps=1, out=tmp_path / "run", progress=False).fit(pairs[:1], pairs[1:], epochs=1)
        with pytest.raises(ValueError, match=r"^There is no device 'cuda' here: PyTorch"):
            Trainer.resume(tmp_path / "run", device="cuda")
        assert Trainer.resume(tmp_path / "run").potential.device == torch.device("cpu")

    def test_the_default(self, monkeypatch):
        assert load_potential("lj").device == TorchCalculator("lj").potential.device == best_device()
        assert best_device() == torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert best_device() == torch.device("cuda")


def test_a_potential_goes_to_the_gpu_by_default_and_a_module_stays(monkeypatch):
    moved = []
    module = lennard_jones()
    monkeypatch.setattr("ase_bptt.potentials.as_device", lambda device: torch.device("cpu" if device else "meta"))
    monkeypatch.setattr("ase_bptt.potential.Potential.to", lambda self, **where: moved.append(where["device"]) or self)
    load_potential("lj")
    load_potential("lj", device="cpu")
    load_potential(module)
    assert moved == [torch.device("meta"), torch.device("cpu"), None]
