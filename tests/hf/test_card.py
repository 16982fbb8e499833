"""The model card: what it says is what was measured, what was not measured is not there, its snippet runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from statsmodels.stats.proportion import proportion_confint
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.formats import parse
from fliqs_hf.hf.card import model_card
from fliqs_hf.hf.hub import push
from fliqs_hf.report.run_report import write_report
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.validation.validate import validate
from fliqs_hf.wording import milliseconds
from tests.helpers.hub_server import HubServer
from tests.helpers.models import tiny
from tests.helpers.runs import change, write, write_run
from tests.hf.test_templating import Text, render
from tests.hf.test_validation_record import record


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "my-run")
    return tmp_path / "my-run"


def metadata(card: ModelCard) -> dict[str, Any]:
    """As the Hub reads it: from the text."""
    data: dict[str, Any] = ModelCard(str(card)).data.to_dict()
    return data


def rows(card: ModelCard, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its head."""
    section = card.text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_metadata(run: Path) -> None:
    assert metadata(model_card(run, "user/small")) == {
        "base_model": "google/vit-tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "datasets": ["uoft-cs/cifar10"],
        "metrics": ["accuracy"],
        "tags": ["fliqs", "quantized", "mixed-precision"],
        "model-index": [
            {
                "name": "small",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "cifar10", "type": "uoft-cs/cifar10"},
                        "metrics": [
                            {"type": "accuracy", "value": 0.917, "name": "Top-1 accuracy"},
                            {"type": "accuracy", "value": 0.985, "name": "Top-5 accuracy"},
                        ],
                    }
                ],
            }
        ],
    }


def test_local_names_are_no_metadata(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/deit` looks like an id on the Hub, but is a folder; `digits` has no namespace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "deit").mkdir(parents=True)
    change(run / "fliqs/settings.json", model_name_or_path="models/deit", dataset_name="digits", command=None)
    card = model_card(run)
    data = metadata(card)
    assert not {"base_model", "base_model_relation", "datasets"} & set(data)
    assert data["model-index"][0]["results"][0]["dataset"] == {"name": "digits", "type": "custom"}
    assert "`deit` (a local checkpoint)" in card.text
    assert "huggingface.co/models/deit" not in card.text


def test_one_format_is_not_mixed_precision(tmp_path: Path) -> None:
    write_run(tmp_path / "uniform", formats=("int4",))
    assert metadata(model_card(tmp_path / "uniform"))["tags"] == ["fliqs", "quantized"]


def test_results_have_their_intervals_and_costs(run: Path) -> None:
    layers = json.loads((run / "fliqs/layers.json").read_text())
    allocation = json.loads((run / "fliqs/allocation.json").read_text())
    bops = sum(
        layer["macs"] * parse(formats["weight"]).bits * parse(formats["activation"]).bits
        for layer in layers
        for formats in [allocation[layer["name"]]]
    )
    macs = sum(layer["macs"] for layer in layers)
    weights = sum(layer["weight_numel"] for layer in layers)
    table = rows(model_card(run), "Results")
    for cells, correct, top5, cost in zip(
        table, (930, 880, 917), ("99.00 %", "98.00 %", "98.50 %"), (macs * 32**2, macs * 16, bops), strict=True
    ):
        low, high = proportion_confint(correct, 1000, method="wilson")
        assert cells[1] == f"{correct / 10:.2f} % ({low * 100:.2f} % to {high * 100:.2f} %)"
        assert cells[2:4] == [f"{correct} / 1000", top5]
        assert cells[4] == f"{cost / 1e6:.3g} M"
    assert [cells[0] for cells in table] == ["original (fp32)", "uniform int4", "**this model**"]
    assert table[0][5] == f"{weights * 4 / 1e3:.3g} kB"
    scales = sum(layer["out_channels"] * 4 for layer in layers)
    assert table[1][5] == f"{(weights / 2 + scales) / 1e3:.3g} kB"


def test_every_layer_is_listed_in_the_order_of_the_model(run: Path) -> None:
    layers = json.loads((run / "fliqs/layers.json").read_text())
    allocation = json.loads((run / "fliqs/allocation.json").read_text())
    table = rows(model_card(run), "Formats, layer by layer")
    assert [cells[0].strip("`") for cells in table] == [layer["name"] for layer in layers]
    assert [cells[2:] for cells in table] == [list(allocation[layer["name"]].values()) for layer in layers]


def test_a_layer_left_in_floating_point_is_listed_as_such(run: Path) -> None:
    layer = {"name": "extra", "kind": "linear", "macs": 9, "weight_numel": 9, "out_channels": 3, "input_group": 99}
    write(run / "fliqs/layers.json", [*json.loads((run / "fliqs/layers.json").read_text()), layer])
    assert rows(model_card(run), "Formats, layer by layer")[-1] == ["`extra`", "9", "fp32", "fp32"]


#: What was recorded -> what the card says because of it.
_RECORDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "accuracy": (
        lambda run: change(run / "fliqs/results.json", accuracy=None),
        ("model-index", "metrics:", "top-1", "1,000 images", "91.70 %", "uniform int4"),
    ),
    "top5": (
        lambda run: change(
            run / "fliqs/results.json",
            accuracy={"searched": {"top1": 0.917, "correct": 917, "n": 1000}},
        ),
        ("Top-5", "top-5", "98.50 %", "93.00 %"),
    ),
    "layers": (lambda run: (run / "fliqs/layers.json").unlink(), ("BOPs", "| weights and activations | µJ", "MACs")),
    "figures": (lambda run: (run / "fliqs/figures" / "allocation.png").unlink(), ("![allocation]",)),
    "base model": (
        lambda run: change(run / "fliqs/settings.json", model_name_or_path=None, command=None),
        ("base_model", "google/vit-tiny"),
    ),
    "dataset": (
        lambda run: change(run / "fliqs/settings.json", dataset_name=None, command=None),
        ("datasets:", "cifar10", "model-index"),
    ),
    "seed": (lambda run: change(run / "fliqs/settings.json", seed=None), ("Seed",)),
    "preset": (lambda run: change(run / "fliqs/settings.json", preset=None), ("Preset",)),
    "versions": (lambda run: change(run / "fliqs/settings.json", versions=None), ("Versions", "2.13.0")),
    "command": (
        lambda run: change(run / "fliqs/settings.json", command=None),
        ("--model_name_or_path google/vit-tiny",),
    ),
    "settings": (lambda run: (run / "fliqs/settings.json").unlink(), ("How it was made", "All settings")),
    "target": (lambda run: change(run / "fliqs/results.json", target=None), ("Target", "99.31 %")),
    "cost": (lambda run: change(run / "fliqs/results.json", cost=None), ("99.31 %",)),
    "seconds": (lambda run: change(run / "fliqs/results.json", seconds=None), ("Time:", "5 min 22 s")),
    "repaired": (lambda run: change(run / "fliqs/results.json", repaired=False), ("missed the target",)),
    "results": (lambda run: (run / "fliqs/results.json").unlink(), ("top-1", "Target", "Time:", "model-index")),
}


@pytest.mark.parametrize("record", _RECORDS)
def test_what_was_not_recorded_is_not_in_the_card(run: Path, record: str) -> None:
    remove, said = _RECORDS[record]
    before = str(model_card(run))
    assert [text for text in said if text not in before] == []
    remove(run)
    after = str(model_card(run))
    assert [text for text in said if text in after] == []
    assert "None" not in after
    assert "Undefined" not in after


def test_a_bare_checkpoint_gets_a_card_without_any_measurement(run: Path) -> None:
    shutil.rmtree(run / "fliqs")
    card = model_card(run, "user/small")
    assert "The accuracy of this model was not measured" in card.text
    assert "## Results" not in card.text
    assert set(metadata(card)) == {"library_name", "pipeline_tag", "tags"}
    assert len(rows(card, "Formats, layer by layer")) == 14


def test_an_unmeasured_model_is_never_given_the_accuracy_of_another(run: Path) -> None:
    change(run / "fliqs/results.json", accuracy={"fp32": {"top1": 0.93, "correct": 930, "n": 1000}})
    card = model_card(run)
    assert "model-index" not in metadata(card)
    assert rows(card, "Results")[1][:2] == ["**this model**", "not measured"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"top1": 0.93, "correct": 917, "n": 1000}, "top1=0.93 contradicts 917 correct of 1000"),
        ({"top1": 91.7, "correct": 917, "n": 1000}, "contradicts"),
        ({"top1": 1.5, "correct": 3, "n": 2}, "contradicts"),
        ({"top1": 0, "correct": 0, "n": 0}, "contradicts"),
        ({"top1": 0.917}, "needs top1, correct and n"),
    ],
)
def test_contradictory_results_are_refused(run: Path, entry: dict[str, Any], message: str) -> None:
    change(run / "fliqs/results.json", accuracy={"searched": entry})
    with pytest.raises(CheckpointError, match=message):
        model_card(run)


def test_a_validation_is_reported(run: Path) -> None:
    """With the very file that a validation writes."""
    quantized = AutoModelForImageClassification.from_pretrained(run)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    data = [{"image": Image.fromarray(image), "label": i % 5} for i, image in enumerate(pixels)]
    processor = ViTImageProcessorPil.from_pretrained(run)
    result = validate(tiny("vit"), quantized, data, image_processor=processor, batch_size=2, match_labels="index")
    assert "its latency was not measured" in model_card(run).text.lower()
    (run / "fliqs/validation.json").write_text(result.to_json())
    text = model_card(run).text
    drop, latency = result.top1_drop, result.quantized.latency
    interval = f"95 % interval {drop.low * 100:.2f} to {drop.high * 100:.2f}".replace("-", "−")
    assert f"Drop of top-1 accuracy: {drop.value * 100:.2f} points".replace(" -", " −") in text
    assert interval in text
    assert latency is not None
    assert f"{milliseconds(latency.batch_ms)}, original" in text
    assert "its latency was not measured" not in text.lower()


def snippet(card: ModelCard) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return str(code)


def test_the_snippet_runs_as_it_stands(hub: HubServer, run: Path, tmp_path: Path) -> None:
    """From the Hub, and from the folder that the card lies in."""
    push(run, "user/small")
    published = ModelCard(hub.repos["user/small"].files()["README.md"].decode())
    files = {tmp_path / "published.py": published, tmp_path / "local.py": model_card(run)}
    for file, card in files.items():
        file.write_text(snippet(card))
        assert snippet(card).startswith("import fliqs_hf")
    run_all = "import runpy, sys; [runpy.run_path(file) for file in sys.argv[1:]]"
    result = subprocess.run(
        [sys.executable, "-c", run_all, *map(str, files)],
        cwd=run,
        env=hub.environment(tmp_path / "home"),
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    model = AutoModelForImageClassification.from_pretrained(run)
    processor = ViTImageProcessorPil.from_pretrained(run)
    with torch.no_grad():
        label = model(**processor(Image.new("RGB", (32, 32)), return_tensors="pt")).logits.argmax().item()
    assert result.stdout.split() == [model.config.id2label[label]] * 2


def test_base_model_and_licence_can_be_given(run: Path) -> None:
    change(run / "fliqs/settings.json", model_name_or_path="/models/vit", command=None)
    assert not {"base_model", "license"} & set(metadata(model_card(run)))
    data = metadata(model_card(run, base_model="org/vit", license="cc-by-4.0"))
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/vit", "quantized", "cc-by-4.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_model": "/models/vit"}, "base_model='/models/vit' is no name on the Hub"),
        ({"base_model": "a/b/c"}, "base_model='a/b/c'"),
        ({"base_model": "org/vit](javascript:x)"}, "no name on the Hub"),
        ({"license": "Apache License 2"}, "license='Apache License 2' is no identifier"),
        ({"license": "mit\n---"}, "is no identifier"),
        ({"license": ""}, "is no identifier"),
        ({"repo_id": 'user/x")\nimport os'}, "repo_id="),
    ],
)
def test_names_that_the_hub_cannot_know_are_refused(run: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        model_card(run, **arguments)


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("# No metadata\nlicense: mit\n", None),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: 'my own\n  licence'\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\n" + "[" * 5_000 + "\n---\n", None),
    ],
)
def test_the_licence_of_a_local_original_is_taken_from_its_readme(
    run: Path, tmp_path: Path, readme: str, licence: str | None
) -> None:
    original = tmp_path / "original"
    original.mkdir()
    (original / "README.md").write_bytes(readme.encode())
    change(run / "fliqs/settings.json", model_name_or_path=str(original), command=None)
    assert metadata(model_card(run)).get("license") == licence
    assert metadata(model_card(run, license="cc0-1.0"))["license"] == "cc0-1.0"


#: As a name of everything that a card shows.
NASTY = "a|b`c <script>alert(1)<b> [x](javascript:alert(1)) {{ 7 * 7 }} $$ *e* _f_\n---\n# h"


def test_names_from_records_are_shown_and_make_no_markup(run: Path) -> None:
    """The rendered card of a run full of hostile names has the tags of a harmless one, and the names as they are."""
    base = shape_of(run, "harmless")
    nasty, tags, links = shape_of(run, NASTY)
    assert (tags, links) == base[1:]
    assert "49" not in nasty.replace(base[0], "")
    shown = re.sub(r"\s+", " ", NASTY)
    assert re.sub(r"\s+", " ", nasty).count(shown) >= 8
    data = metadata(model_card(run))
    assert data["model-index"][0]["results"][0]["dataset"]["name"].startswith("a|b`c")


def shape_of(run: Path, name: str) -> tuple[str, list[str], list[str]]:
    """Text, tags and links of the card of a run in which everything that has a name has this one."""
    settings = {"model_name_or_path": name, "dataset_name": name, "preset": name, "seed": name, "note": name}
    change(run / "fliqs/settings.json", **settings, versions={name: name}, command=["fliqs-hf", name])
    layers = json.loads((run / "fliqs/layers.json").read_text())
    write(run / "fliqs/layers.json", [*layers[:14], {**layers[-1], "name": name}])
    target = {name: 3}
    accuracy = json.loads((run / "fliqs/results.json").read_text())["accuracy"]
    others = {key: value for key, value in accuracy.items() if key in ("fp32", "searched")}
    change(run / "fliqs/results.json", target=target, accuracy={**others, name: accuracy["fp32"]})
    model = json.loads((run / "config.json").read_text())
    write(run / "config.json", {**model, "model_type": name})
    for figure in (run / "fliqs/figures").iterdir():
        figure.rename(figure.with_name(f"{name.replace('/', '-')}.png"))
    validation = record(FinishedRun.read(run).allocation.summary())
    validation["conditions"] |= {"dataset": name, "device": name}
    write(run / "fliqs/validation.json", validation)
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(model_card(run).text)
    found = Text(rendered)
    links = re.findall(r'(?:href|src)="(?!fliqs/figures/)([^"]*)"', rendered)
    return found.text, [tag for tag in found.tags if tag != "code"], links


def test_the_share_of_a_hardware_profile(run: Path) -> None:
    """Card and report say what the record says, whatever machine they are made on."""
    share = {"native": 0.5, "carried": 0.25, "simulated": 0.125, "nowhere known": 0.125}
    change(run / "fliqs/results.json", hardware={"profile": "mine", "title": "my <chip>", "share": share})
    sentence = "50.00 % are in formats that my <chip> runs natively, 25.00 % in formats that it runs exactly as wider"
    assert sentence in render(model_card(run).text).text
    assert sentence in Text(write_report(run).read_text()).text.replace("\u00a0", " ")
    change(run / "fliqs/results.json", hardware={"profile": "mine", "share": share})
    with pytest.raises(CheckpointError, match=r"hardware: .*is no share of a profile"):
        model_card(run)
