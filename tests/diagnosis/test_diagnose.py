"""diagnose(): the same answer by every way in, and clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aqnfx
from aqnfx.diagnosis.diagnose import run
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import prepare_probes
from aqnfx.diagnosis.statistics.predicted import predicted_record
from aqnfx.diagnosis.statistics.samples import Intervals as interpret_options
from aqnfx.errors import ArtifactError, InputError, ModelError, NotYetError, SelectorError
from aqnfx.probes.data.samples import load_tokenizer
from tests.cli.tiny import TEXT, save_model, save_text, tokenizer
from tests.families import build

QUICK: dict[str, Any] = {
    "samples": 4, "seeds": 2, "levels": (0.1, 0.3), "max_length": 24, "window": 2, "ops": "linear", "compile": "no",
    "batch_size": 2, "method": "measure",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def record(directory: Path) -> dict[str, Any]:
    return scores(aqnfx.diagnose(directory, TEXT * 2, **QUICK))


def scores(smap: Any) -> dict[str, Any]:
    """Return what was measured, without what names the model."""
    found: dict[str, Any] = smap.to_record()
    del found["provenance"], found["model"]["name"]
    return found


@pytest.mark.slow
def test_every_way_in_gives_the_same_map(directory: Path, record: dict[str, Any], tmp_path: Path) -> None:
    module: Any = aqnfx.graph.loading.load_model(str(directory))
    program = aqnfx.trace(module)
    file = save_text(tmp_path / "t.jsonl", copies=2)
    assert scores(aqnfx.diagnose(str(directory), file, **QUICK)) == record
    assert scores(aqnfx.diagnose(module, str(file), **QUICK)) == record
    assert scores(aqnfx.diagnose(program, TEXT * 2, tokenizer=load_tokenizer(str(directory)), **QUICK)) == record
    assert not module.training


def test_scores_do_not_depend_on_the_batch_size(directory: Path) -> None:
    small, large = (run(directory, TEXT, Options(**{**QUICK, "batch_size": size})) for size in (1, 32))
    np.testing.assert_allclose(small.scores["kl"], large.scores["kl"], rtol=5e-3)


@pytest.mark.slow
def test_samples_of_like_length_are_run_together_and_nothing_else_changes(directory: Path, tmp_path: Path) -> None:
    ragged = [" ".join(text.split()[: 3 + 2 * i]) for i, text in enumerate(TEXT)]
    options = QUICK | {"pack": False, "batch_size": 1}
    found = [run(directory, texts, Options(**options)) for texts in (ragged, ragged[::-1])]
    assert found[0].tokens.tolist() == sorted(found[0].tokens.tolist()) != [found[0].tokens[0]] * 4
    for metric, values in found[0].scores.items():  # whatever the order in the file
        np.testing.assert_array_equal(found[1].scores[metric], values)
    stepwise = run(directory, ragged[::-1], Options(**options, adaptive=True))
    assert stepwise.tokens.tolist() == found[0].tokens.tolist()[::-1]  # looks at its first batches: as they come


def test_a_journal_belongs_to_its_order_of_batches(directory: Path, tmp_path: Path) -> None:
    options = {**QUICK, "batch_size": 1}
    run(directory, TEXT, Options(**options), journal=tmp_path / "j")
    with pytest.raises(ArtifactError, match="another run: batches was"):  # equal lengths: the same samples in file order
        run(directory, TEXT, Options(**options, adaptive=True), journal=tmp_path / "j")


def test_no_single_row_is_left_over(directory: Path) -> None:
    found = {}
    for count, size in ((5, 4), (7, 3), (3, 2), (1, 4), (6, 4)):
        options = Options(**{**QUICK, "samples": count, "batch_size": size, "pack": False})
        ready = prepare_probes(directory, TEXT * 2, options, tell=lambda _: None)
        found[count, size] = [batch.size for batch in ready.batches(options)]
    assert found == {(5, 4): [3, 2], (7, 3): [2, 2, 2, 1], (3, 2): [2, 1], (1, 4): [1], (6, 4): [4, 2]}


def test_a_model_that_is_elsewhere_is_not_taken_along() -> None:
    model = build("qwen2", num_hidden_layers=2)
    with pytest.raises(InputError, match="the model given is on cpu, and device meta was asked; say device='cpu', or move it"):
        run(model, TEXT, Options(**QUICK, device="meta"), tokenizer=tokenizer())


def test_predictions_of_an_interrupted_run_are_those_of_its_samples(directory: Path) -> None:
    ragged = [" ".join((TEXT[0] + " " + text).split()[: 3 + 4 * i]) for i, text in enumerate(TEXT)]
    options = Options(**{**QUICK, "pack": False, "batch_size": 1, "method": "both", "probes": ("layer",), "seeds": 1})

    phases: list[str] = []

    def stop(done: int, total: int) -> None:
        if phases[-1] == "measuring" and done > total // 3:
            raise KeyboardInterrupt

    whole, part = (run(directory, ragged, options, progress=p, status=phases.append) for p in (None, stop))
    assert part.samples < whole.samples == 4
    assert part.places.tolist() != list(range(part.samples))  # not the shortest
    assert np.array_equal(part.tokens, whole.tokens[part.places])
    one = predicted_record(part, part.planned[0], 0.3, interpret_options())
    kl = whole.predictions.kl(part.planned[0].sites, 0.3)[part.places]
    assert one["kl"] == pytest.approx(kl.sum() / part.tokens.sum())


@pytest.mark.slow
def test_precision_of_a_loaded_model(directory: Path) -> None:
    found = run(directory, TEXT, Options(**{**QUICK, "method": "both", "dtype": "bfloat16"}))
    assert found.provenance["dtype"] == "bfloat16"
    assert np.isfinite(found.scores["kl"]).all()
    assert np.isfinite(found.predictions.kl(found.probes[0].sites, 0.1)).all()
    assert run(directory, TEXT, Options(**QUICK)).provenance["dtype"] == "float32"
    with pytest.raises(InputError, match="dtype float16 is for models that are loaded here; prepare the given one"):
        run(build("qwen2", num_hidden_layers=2), TEXT, Options(**{**QUICK, "dtype": "float16"}), tokenizer=tokenizer())


def test_confirmations_are_in_the_journal_too(directory: Path, tmp_path: Path) -> None:
    options = Options(**{**QUICK, "method": "both", "levels": (0.3, 1.0)})
    first, again = (run(directory, TEXT, options, journal=tmp_path / "j") for _ in range(2))
    assert first.provenance["confirm"]["runs"] > 0 == again.provenance["confirm"]["runs"] == again.provenance["runs"]
    assert len(first.confirmed) == len(again.confirmed) > 0
    for one, two in zip(first.confirmed, again.confirmed, strict=True):
        np.testing.assert_array_equal(one.scores["kl"], two.scores["kl"])


def test_more_seeds_keep_the_scores_of_the_first(directory: Path) -> None:
    few, more, later = (run(directory, TEXT, Options(**QUICK, seed=s) if n == 2 else Options(**{**QUICK, "seeds": n}))
                        for n, s in ((2, 0), (3, 0), (2, 1)))  # fmt: skip
    assert np.array_equal(more.scores["kl"][:, :, :2], few.scores["kl"])
    assert np.array_equal(more.scores["kl"][:, :, 1:], later.scores["kl"])


def test_status_progress_and_provenance(directory: Path) -> None:
    told: list[str] = []
    seen: list[tuple[int, int]] = []
    found = run(directory, TEXT, Options(**QUICK), status=told.append, progress=lambda *at: seen.append(at))
    assert told[0] == "loading the model"
    assert told[-1] == "measuring"
    assert seen[-1] == (len(seen), len(seen))
    facts = found.provenance
    assert facts["model"]["name"] == directory.name
    assert facts["data"]["path"] == "(values)"
    assert facts["data"]["samples"] == 4
    assert facts["compile"] == "none"
    assert facts["pipeline"].startswith("tag-layers,decompose-attention")
    assert len(facts["model"]["digest"]) == 64


@pytest.mark.slow
def test_a_journal_belongs_to_its_model_data_and_options(
    directory: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    journal = tmp_path / "j"
    assert scores(aqnfx.diagnose(directory, TEXT * 2, journal=journal, **QUICK)) == record
    assert scores(aqnfx.diagnose(directory, TEXT * 2, journal=journal, **QUICK)) == record
    other = save_model(tmp_path / "other", "qwen2", num_hidden_layers=2, rope_theta=50.0)
    changed = build("qwen2", num_hidden_layers=2)
    changed.model.norm.weight.data[0] = 2.0  # type: ignore[union-attr, index, operator]
    for model, data, options, field in (
        (directory, TEXT[::-1], {}, "data"),
        (directory, TEXT * 2, {"levels": (0.1, 0.2)}, "levels"),
        (directory, TEXT * 2, {"seed": 3}, "seeds"),
        (directory, TEXT * 2, {"noise": "uniform"}, "pipeline"),
        (directory, TEXT * 2, {"window": 1}, "probes"),
        (directory, TEXT * 2, {"batch_size": 3}, "batch_size"),
        (directory, TEXT * 2, {"task": "nll"}, "task"),
        (changed, TEXT * 2, {}, "model"),
    ):
        with pytest.raises(ArtifactError, match=f"another run: {field} was"):
            aqnfx.diagnose(model, data, journal=journal, tokenizer=load_tokenizer(str(directory)), **(QUICK | options))
    with pytest.raises(ArtifactError, match="another run: model was"):  # equal weights, other positions
        aqnfx.diagnose(other, TEXT * 2, journal=journal, **QUICK)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compile": "maybe"}, InputError, "compile 'maybe'"),
        ({"levels": ()}, InputError, "levels must be given"),
        ({"samples": 0}, InputError, "samples 0"),
        ({"seeds": -1}, InputError, "seeds -1"),
        ({"ops": "linaer"}, SelectorError, "did you mean 'linear'"),
        ({"layers": "9"}, SelectorError, "9"),
        ({"dtype": "int8"}, InputError, "dtype 'int8' is not one of float32, bfloat16, float16"),
        ({"device": "warp"}, InputError, "device 'warp' cannot be used"),
        ({"max_length": 1000}, InputError, "at most 128"),
        ({"task": "exact_match"}, InputError, "exact_match"),
    ],
)
def test_bad_options(directory: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        aqnfx.diagnose(directory, TEXT, **(QUICK | options))


def test_a_model_without_a_name_needs_a_tokenizer() -> None:
    model = build("qwen2", num_hidden_layers=2)
    with pytest.raises(InputError, match="pass tokenizer="):
        aqnfx.diagnose(model, TEXT, **QUICK)
    assert aqnfx.diagnose(model, TEXT, tokenizer=tokenizer(), **QUICK).per_layer.keys() == {"0", "1"}


def test_base_level_defaults_to_the_middle_level() -> None:
    assert Options(levels=(0.3, 0.1, 0.2)).base == 0.2
    assert Options(levels=(0.3, 0.1)).base == 0.3
    assert Options(levels=(0.3, 0.1), base_level=0.1).base == 0.1


def test_a_model_that_sees_later_tokens_is_told_so() -> None:
    model = build("bert", num_hidden_layers=2)
    for parameter in model.parameters():
        parameter.data.mul_(5.0)  # fresh weights are so small that one token hardly changes another's logits
    with pytest.raises(ModelError, match="causal"):
        aqnfx.diagnose(model, TEXT, tokenizer=tokenizer(), **(QUICK | {"task": "nll"}))


# --- the package's own names ------------------------------------------------------------------------------------------


def test_public_names() -> None:
    for name, module in aqnfx._LAZY.items():
        value = getattr(aqnfx, name)
        assert value.__name__ == name
        assert value.__module__.startswith(module)
        assert name in dir(aqnfx)
    assert issubclass(NotYetError, aqnfx.AqnfxError)
    assert aqnfx.relative_degradation(0.8, 0.6) == pytest.approx(0.25)
    assert aqnfx.noise_tolerance_index(0.25) == pytest.approx(4.0)
    with pytest.raises(AttributeError, match="no attribute 'diagnos'"):
        aqnfx.diagnos  # noqa: B018


def test_windows_of_a_shallow_model(directory: Path) -> None:
    quick = {k: v for k, v in QUICK.items() if k != "window"}
    found = aqnfx.diagnose(directory, TEXT, **quick)
    assert [w["layers"] for w in found.windows] == [[0, 1]]
    assert any("windows hold 2 layers" in note for note in found.notes)
    single = aqnfx.diagnose(directory, TEXT, **quick, layers=[1])
    assert single.windows == []
    assert list(single.per_layer) == ["1"]
    assert any("1 selected layer has no window" in note for note in single.notes)
    with pytest.raises(InputError, match="window 3 is longer than the 2 selected layers"):
        aqnfx.diagnose(directory, TEXT, **{**quick, "window": 3})


def test_a_step_beyond_the_window_is_noted(directory: Path) -> None:
    found = aqnfx.diagnose(directory, TEXT, **{**QUICK, "window": 1, "step": 2})
    assert [w["layers"] for w in found.windows] == [[0]]
    assert any("step 2 is larger than the window of 1" in note for note in found.notes)


def test_an_explicit_length_beyond_the_model_is_refused(tmp_path: Path) -> None:
    place = save_model(tmp_path, "qwen2", num_hidden_layers=1, max_position_embeddings=40)
    quick = {k: v for k, v in QUICK.items() if k not in ("max_length", "window")}
    for length in (41, 256):
        with pytest.raises(InputError, match=f"max_length {length} asked; the model takes at most 40"):
            aqnfx.diagnose(place, TEXT, **quick, max_length=length)
    assert aqnfx.diagnose(place, TEXT, **quick).provenance["data"]["max_length"] == 40


def test_a_model_that_is_not_causal_has_no_nll() -> None:
    found = aqnfx.diagnose(build("bert"), TEXT, tokenizer=tokenizer(), **{**QUICK, "max_length": 16})
    assert found.baseline["nll"] is None
    assert any("not causal" in note for note in found.notes)
    assert all(v["levels"]["0.1"]["kl"] > 0 for v in found.per_layer_detail.values())


def test_shared_values_are_noted() -> None:
    found = aqnfx.diagnose(
        build("gpt2"), TEXT, tokenizer=tokenizer(), **{**QUICK, "max_length": 16, "ops": "embedding", "probes": "operator"}
    )
    assert any("computes one value for the whole batch" in note for note in found.notes) == any(
        "wpe" in record["module"] for record in found.per_site
    )


def test_without_a_compiler(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aqnfx.probes.compile_choice.compiler_problem", lambda _device: "no C++ compiler was found")
    with pytest.raises(InputError, match=r"compile yes was asked, but no C.. compiler was found; .*--compile no"):
        aqnfx.diagnose(directory, TEXT, **{**QUICK, "compile": "yes"})
    assert aqnfx.diagnose(directory, TEXT, **{**QUICK, "compile": "auto"}).provenance["compile"] == "none"


def test_the_search_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    from aqnfx.probes.compile_choice import compiler_problem

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "no C++ compiler" in str(compiler_problem("cpu"))
