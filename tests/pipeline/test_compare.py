"""The comparison: every method runs at the target, costs are recomputed, what is done is not done again."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from fliqs_hf.baselines import random_allocation, register_baseline, short_training, unregister_baseline
from fliqs_hf.errors import BusyError, CheckpointError, ConfigError, TargetError
from fliqs_hf.lock import locked
from fliqs_hf.pipeline import compare
from fliqs_hf.pipeline.compare_methods import UNIFORM, check_methods, runs
from fliqs_hf.pipeline.compare_summary import markdown, summarise, write_summary
from fliqs_hf.pipeline.compare_table import COLUMNS, Table, rows_of
from fliqs_hf.tasks import Accuracy
from fliqs_hf.training import train

METHODS = [
    "uniform-int", "uniform-fp", "manual", "random", "random-no-int2", "loss-delta", "fisher", "elementwise",
    "hessian", "ptq-fisher", "differentiable", "gumbel", "multi-trial-random", "multi-trial-optuna", "search",
    "search-0.5-x2", "paper",
]  # fmt: skip


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("fp32")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def arguments(fp32: Path, output: Path, *methods: str) -> list[str]:
    return [
        str(fp32), "--dataset_name", "digits", "--use_cpu", "--seeds", "0", "--target_bits", "4", "--max_steps", "3",
        "--batch_size", "8", "--prior_images", "16", "--trials", "2", "--max_train_samples", "64",
        "--max_eval_samples", "32", "--output", str(output), "--methods", *methods,
    ]  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


@pytest.mark.slow
def test_every_method_runs_at_the_target(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    compare.main(arguments(fp32, output, *METHODS))
    found = {row["method"]: row for row in rows(output)}
    assert list(found) == METHODS
    for name, row in found.items():
        if name != "manual":  # people do not aim
            assert 0.98 - 1e-9 <= float(row["cost_ratio"]) <= 1.02, name
        assert row["steps"] == ("0" if name.startswith("ptq-") else "3")
        assert 0 <= float(row["top1"]) <= 1
    assert float(found["manual"]["cost_ratio"]) > 1
    assert found["uniform-int"]["allocation"].endswith("W int4 / A int4")
    text = output.read_text()
    assert "--target_bits 4" in text.splitlines()[0]
    assert "torch" in text.splitlines()[1]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.jsonl"))

    ran: list[Any] = []
    original = compare.Comparison.run
    monkeypatch.setattr(compare.Comparison, "run", lambda self, *a: ran.append(a) or original(self, *a))
    compare.main(arguments(fp32, output, "uniform-int", "ptq-uniform-fp", "fisher"))
    assert ran == [("ptq-uniform-fp", 4.0, 0)]
    assert len(rows(output)) == len(METHODS) + 1
    assert "| 4 | ptq-uniform-fp |" in capsys.readouterr().out


def test_learned_clipping_factors(fp32: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    given = [*arguments(fp32, output, "uniform-int", "search"), "--activation_granularity", "per_token_clipped"]
    compare.main(given)
    plain = tmp_path / "plain.csv"
    compare.main(arguments(fp32, plain, "uniform-int", "search"))
    assert [row["allocation"] for row in rows(output)] == [row["allocation"] for row in rows(plain)]
    assert all(a["loss"] != b["loss"] for a, b in zip(rows(output), rows(plain), strict=True))
    for method in ("differentiable", "ptq-fisher"):
        with pytest.raises(ConfigError, match=f"{method} takes --activation_granularity per_token only"):
            compare.main([*arguments(fp32, output, method), "--activation_granularity", "per_token_clipped"])


def test_trials_learn_clipping_factors(fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []

    def spy(model: Any, *args: Any, **named: Any) -> Any:
        learned.append(any(name.endswith("input_clip") for name, _ in model.named_parameters()))
        return train(model, *args, **named)

    monkeypatch.setattr(short_training, "train", spy)
    given = arguments(fp32, tmp_path / "out.csv", "multi-trial-random")
    compare.main([*given, "--activation_granularity", "per_token_clipped"])
    assert learned == [True, True]


def test_distillation(fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of every method imitates the fp32 model by that share of the loss, trials included."""
    taught = []

    def spy(*args: Any, **named: Any) -> Any:
        teacher = named["teacher"]
        taught.append((args[2].distill_weight, teacher is not args[0] and teacher.state_dict()["classifier.weight"]))
        return train(*args, **named)

    for module in (compare, short_training):
        monkeypatch.setattr(module, "train", spy)
    methods = ["uniform-int", "search", "differentiable", "multi-trial-random"]
    compare.main([*arguments(fp32, tmp_path / "out.csv", *methods), "--distill", "0.5"])
    assert len(taught) == 3 + 2 + 1  # two trials, then the best of them
    original = load_file(fp32 / "model.safetensors")["classifier.weight"]
    assert all(weight == 0.5 and torch.equal(of_teacher, original) for weight, of_teacher in taught)


@pytest.mark.parametrize("option", ["--distill 1.5", "--max_steps 0", "--trial_steps 0"])
def test_bad_values_are_refused_before_anything_is_loaded(tmp_path: Path, option: str) -> None:
    output = tmp_path / "out.csv"
    with pytest.raises(ConfigError, match=option.strip("-").replace(" ", "=")):
        compare.main([*arguments(tmp_path / "no model", output, "search"), *option.split()])
    assert not output.exists()


def test_a_target_out_of_reach_stops_it_before_anything_runs(fp32: Path, tmp_path: Path) -> None:
    """2.5 bits are within reach of all formats, but not without INT2."""
    output = tmp_path / "out.csv"
    given = arguments(fp32, output, "uniform-int", "fisher", "random-no-int2")
    given[given.index("--target_bits") + 1] = "2.5"
    with pytest.raises(TargetError, match=r"random-no-int2: target_bits=2\.5 is below"):
        compare.main(given)
    assert not output.exists()


@pytest.mark.parametrize("method", ["serach", "search-abc", "ptq-search", "fisher-0.3"])
def test_unknown_methods_are_refused_before_anything_runs(fp32: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown method|'abc' does not exist"):
        compare.main(arguments(fp32, tmp_path / "out.csv", "uniform-int", method))
    assert not (tmp_path / "out.csv").exists()


def test_a_baseline_may_be_named_like_a_method_with_parts(fp32: Path, tmp_path: Path) -> None:
    names = ["search-mine", "uniform-mine", "paper-mine"]
    for name in names:
        register_baseline(name, random_allocation)
    try:
        compare.main(arguments(fp32, tmp_path / "out.csv", *names))
    finally:
        for name in names:
            unregister_baseline(name)
    assert [row["method"] for row in rows(tmp_path / "out.csv")] == names
    assert len({row["allocation"] for row in rows(tmp_path / "out.csv")}) == 1


def test_samples_of_a_split_sorted_by_class_show_every_class(fp32: Path, tmp_path: Path) -> None:
    data, generator = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for name, count in (("train", 200), ("validation", 100)):
        labels = sorted(label for label in range(10) for _ in range(count // 10))
        images = [Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)) for _ in labels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        split = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        split.to_parquet(data / f"{name}-00000-of-00001.parquet")
    given = arguments(fp32, tmp_path / "out.csv", "search")
    given[given.index("digits")] = str(data)
    found = compare.Comparison(compare.parser("compare").parse_args(given))
    assert (len(found.train), len(found.eval)) == (64, 32)
    assert set(found.train.labels) == set(range(10))  # by the seed of `sample`; the first 64 have four
    assert len(set(found.eval.labels)) >= 8


def test_a_table_of_the_first_images_is_not_added_to(fp32: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    compare.main(arguments(fp32, output, "ptq-uniform-int"))
    assert '"samples": "random"' in output.read_text()
    output.write_text(output.read_text().replace(', "samples": "random"', ""))
    with pytest.raises(CheckpointError, match="samples=None, not 'random'"):
        compare.main(arguments(fp32, output, "ptq-uniform-fp"))


def test_labels_that_are_not_classes_of_images_are_not_matched(tmp_path: Path) -> None:
    given = [*arguments(tmp_path / "no model", tmp_path / "out.csv", "search"), "--task", "image-segmentation"]
    with pytest.raises(ConfigError, match="match_labels='index' is for tasks with one class per image"):
        compare.main([*given, "--match_labels", "index"])


def test_uniform_models_in_any_format_are_run_once(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in formats that the search space does not have, and under one name whatever alias was given."""
    output = tmp_path / "out.csv"
    methods = ["uniform-e4m3", "ptq-uniform-fp8", "ptq-uniform-int8", "ptq-uniform-bf16", "ptq-fisher"]
    targets = ["--target_bits", "4", "8"]
    compare.main([*arguments(fp32, output, *methods), *targets])
    found = rows(output)
    assert [(row["method"], row["target_bits"], row["steps"]) for row in found] == [
        ("uniform-e4m3", "8", "3"), ("ptq-uniform-e4m3", "8", "0"), ("ptq-uniform-int8", "8", "0"),
        ("ptq-uniform-bf16", "16", "0"), ("ptq-fisher", "4", "0"), ("ptq-fisher", "8", "0"),
    ]  # fmt: skip
    for row in found[:4]:
        fmt = row["method"].rpartition("-")[2]
        assert row["allocation"].endswith(f"W {fmt} / A {fmt}")
        assert float(row["cost_ratio"]) == 1
    assert "| 16 | ptq-uniform-bf16 |" in capsys.readouterr().out
    compare.main([*arguments(fp32, output, *methods), *targets])  # nothing is left to do
    assert rows(output) == found


def test_weights_and_inputs_apart(fp32: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    apart = ["--activation", "separate"]
    for method in sorted(REFUSED_APART):
        with pytest.raises(ConfigError, match=f"{method} takes --activation same only"):
            compare.main([*arguments(fp32, output, "fisher", method), *apart])
    assert not output.exists()
    compare.main([*arguments(fp32, output, "fisher", "search"), *apart])
    for row in rows(output):
        pairs = [part.split(" × ")[1].split(" / ") for part in row["allocation"].split(", ")]
        assert any(weight.removeprefix("W ") != inputs.removeprefix("A ") for weight, inputs in pairs)
        assert 0.98 - 1e-9 <= float(row["cost_ratio"]) <= 1.02


REFUSED_APART = {"differentiable", "gumbel", "hessian", "ptq-hessian"}


@pytest.mark.parametrize("space", ["int2,int4,e2m1", "fliqs-s-int", "int2"])
@pytest.mark.parametrize("activation", ["same", "separate"])
def test_every_method_runs_or_is_refused_before_it_does(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: str, space: str
) -> None:
    """Every method, way to decide inputs, space and target; without training and evaluation."""
    for module in (compare, short_training):
        monkeypatch.setattr(module, "train", lambda model, *_, **__: model)
        monkeypatch.setattr(module, "evaluate", lambda *_, **__: Accuracy(16, 32, 32, 1.0))
    monkeypatch.setattr(compare, "peak_memory", lambda _: nullcontext(SimpleNamespace(working_bytes=0)))  # 0.5 s each
    options = ["--activation", activation, "--search_space", space, "--trials", "1"]
    given = compare.parser("compare").parse_args([*arguments(fp32, tmp_path / "out.csv", "search"), *options])
    comparison = compare.Comparison(given)
    formats = {fmt.name for fmt in comparison.space.formats}
    ran = set()
    for method, bits, _ in runs([*METHODS, "ptq-hessian", "ptq-random-no-int2"], [2.0, 3.0, 4.0, 8.0], [0]):
        try:
            check_methods([method], activation)
            comparison.check(method, bits)
        except (ConfigError, TargetError):
            continue
        row = comparison.run(method, bits, 0)
        ran.add((method, bits))
        names = {name[2:] for part in row["allocation"].split(", ") for name in part.split(" × ")[1].split(" / ")}
        if method not in UNIFORM:
            assert names <= formats - ({"int2"} if "no-int2" in method else set())
            assert 0.97 - 1e-9 <= row["cost_ratio"] <= 1.02
    reach = {"int2,int4,e2m1": {2.0, 3.0, 4.0}, "fliqs-s-int": {4.0, 8.0}, "int2": {2.0}}[space]
    refused = REFUSED_APART if activation == "separate" else set()
    for method in {*METHODS, "ptq-hessian", "ptq-random-no-int2"} - refused - set(UNIFORM):
        without = "no-int2" in method
        wanted = {bits for bits in reach if not (without and (space == "int2" or (space[:4] == "int2" and bits < 4)))}
        assert {bits for name, bits in ran if name == method} == wanted, method
    assert not {method for method, _ in ran} & refused
    assert {(method, bits) for method in UNIFORM for bits in (3.0, 4.0, 8.0)} <= ran


def test_a_random_allocation_without_int2_decides_inputs_apart(fp32: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    compare.main([*arguments(fp32, output, "ptq-random-no-int2"), "--activation", "separate"])
    pairs = [part.split(" × ")[1].split(" / ") for part in rows(output)[0]["allocation"].split(", ")]
    assert any(weight.removeprefix("W ") != inputs.removeprefix("A ") for weight, inputs in pairs)
    assert "int2" not in rows(output)[0]["allocation"]


@pytest.mark.parametrize("option", ["--trials 0", "--prior_images 0"])
def test_numbers_are_checked_before_anything_is_loaded(tmp_path: Path, option: str) -> None:
    output = tmp_path / "out.csv"
    with pytest.raises(ConfigError, match=option.split()[0].strip("-s")):
        compare.main([*arguments(tmp_path / "no model", output, "ptq-uniform-int"), *option.split()])
    assert not output.exists()


def test_uniform_models_have_whole_bits(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole bits"):
        compare.main([*arguments(fp32, tmp_path / "out.csv", "uniform-int"), "--target_bits", "2.5"])


def test_the_summary_is_mean_and_sample_deviation(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    head = HEAD
    lines = ["# fp32: top1 0.9000, loss 0.1, 10 images", head]
    lines += [
        "a,3,0,0.5,1.0,1.0,4,2.0,10,x",
        "# another command",
        "a,3,1,0.7,2.0,0.98,4,4.0,,x",
        "b,3,0,0.9,0.5,1,4,1,5,x",
    ]
    file.write_text("\n".join(lines) + "\n")
    fp32, (b, a) = summarise(file)
    assert fp32 == 0.9
    assert (a["value"], a["loss"], a["cost"], a["seconds"], a["peak"], a["seeds"]) == (0.6, 1.5, 0.99, 3.0, 10.0, 2)
    assert a["std"] == pytest.approx(0.02**0.5, rel=1e-12)  # float64 rounding
    assert (b["method"], b["std"]) == ("b", None)
    text = markdown(fp32, [b, a])
    assert "| 3 | b | 90.00 | 0.500 | 1.000 | 1 | 5 | 1 |" in text
    assert "| 3 | a | 60.00 ± 14.14 |" in text
    assert write_summary(file) == text == (tmp_path / "r.md").read_text()


HEAD = ",".join(COLUMNS).replace("value", "top1")  # as it has always been
SETTINGS = {"model": "m", "max_steps": 3, "distill": 0.0}
ROW = dict.fromkeys(COLUMNS, "1") | {"method": "search", "allocation": "2 × int4, 1 × int8"}


def test_a_table_goes_on_wherever_it_was_cut_off(tmp_path: Path) -> None:
    """At every byte: what is whole is kept, what is not is written again, and the head is there once."""
    file = tmp_path / "t.csv"
    table = Table(file, SETTINGS)
    table.begin(["command", "versions"], "top1")
    for seed in "01":
        table.add(ROW | {"seed": seed})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        table = Table(file, SETTINGS)
        table.begin(["again"], "top1")
        for seed in "01":
            if ("search", "1", seed) not in table.done:
                table.add(ROW | {"seed": seed})
        lines = file.read_text().splitlines()
        assert [row["seed"] for row in rows_of(file, lines)] == ["0", "1"], length
        assert lines.count(HEAD) == 1


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("search,1,0,1", "search,1,0,O", "no row of results"),
        ("search,1,0,1,", "search,1,0,", "no row of results"),
        ("method,target", "methad,target", "no table of a comparison"),
        ('"max_steps": 3', '"max_steps": 4', "max_steps=4, not 3"),
        ('{"model"', '{model"', "damaged"),
        ("search,1,0", "\udcff", "cannot be read"),
    ],
)
def test_a_damaged_table_or_one_of_other_settings_is_not_added_to(
    tmp_path: Path, old: str, new: str, named: str
) -> None:
    file = tmp_path / "t.csv"
    table = Table(file, SETTINGS)
    table.begin([], "top1")
    table.add(ROW | {"seed": "0"})
    text = file.read_text()
    assert old in text
    file.write_bytes(text.replace(old, new).encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=named):
        Table(file, SETTINGS)


def test_what_is_no_table_is_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a line without an end")
    with pytest.raises(CheckpointError, match="no table of a comparison"):
        Table(tmp_path / "notes.csv", SETTINGS)
    assert (tmp_path / "notes.csv").read_text() == "a line without an end"


def test_two_comparisons_do_not_write_into_one_table(fp32: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    with locked(file, tmp_path / ".t.csv.lock"), pytest.raises(BusyError, match=r"t\.csv: process"):
        compare.main(arguments(fp32, file, "uniform-int"))
