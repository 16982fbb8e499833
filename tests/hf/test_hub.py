"""Publishing with the real client against a Hub on the loopback interface, and loading in another process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from fliqs_hf.errors import CheckpointError, HubError
from fliqs_hf.hf.hub import push
from fliqs_hf.runs.finished import FinishedRun
from tests.helpers.hub_server import TOKEN, HubServer
from tests.helpers.models import images, tiny
from tests.helpers.runs import change, write_run

_LOADER = """
import json, sys
import torch
import fliqs_hf
from transformers import AutoModelForImageClassification

torch.set_num_threads(int(sys.argv[2]))
results = []
for repo_id, kwargs in json.loads(sys.argv[1]):
    try:
        model = AutoModelForImageClassification.from_pretrained(repo_id, **kwargs)
        with torch.no_grad():
            results.append(model(torch.load(sys.argv[3])).logits)
    except OSError as error:
        results.append(str(error))
torch.save(results, sys.argv[4])
"""


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images()).logits


def load_elsewhere(
    hub: HubServer, folder: Path, *wanted: tuple[str, dict[str, Any]], token: str | None = TOKEN
) -> list[Any]:
    """Logits of each (repository, arguments of `from_pretrained`) in one other process, or the error's message."""
    folder.mkdir()
    torch.save(images(), folder / "images.pt")
    arguments = [json.dumps(wanted), str(torch.get_num_threads()), "images.pt", "results.pt"]
    environment = hub.environment(folder / "home", token)
    subprocess.run([sys.executable, "-c", _LOADER, *arguments], cwd=folder, env=environment, check=True, timeout=120)
    return torch.load(folder / "results.pt")


def assert_complete(files: dict[str, bytes], folder: Path) -> None:
    """A repository is loadable: its config is of `folder`, and so are all the weights that it would load."""
    for name in ("config.json", *(file.name for file in FinishedRun.read(folder).weight_files)):
        assert files[name] == (folder / name).read_bytes()


def test_other_processes_get_the_same_logits(hub: HubServer, tmp_path: Path) -> None:
    models = {
        "plain": write_run(tmp_path / "plain", seed=0),
        "sharded": write_run(tmp_path / "sharded", seed=1, shard_size="10KB"),
        "other": write_run(tmp_path / "other", seed=2),
    }
    push(tmp_path / "plain", "user/model")
    push(tmp_path / "other", "user/model", revision="v2")
    push(tmp_path / "sharded", "user/sharded", private=True)
    push(tmp_path / "other", "user/only-checkpoint")
    models["plain"].push_to_hub("user/by-transformers")
    hub.lfs_suffixes = ()
    before = sum(request.startswith("PUT") for request in hub.requests)
    push(tmp_path / "sharded", "user/regular")
    assert sum(request.startswith("PUT") for request in hub.requests) == before > 0
    assert hub.requests.count("POST /api/models/user/regular/commit/main") == 1

    expected = [
        ("user/model", {}, "plain"),
        ("user/model", {"revision": "v2"}, "other"),
        ("user/sharded", {}, "sharded"),
        ("user/only-checkpoint", {}, "other"),
        ("user/by-transformers", {}, "plain"),
        ("user/regular", {}, "sharded"),
    ]
    shards = [name for name in hub.repos["user/sharded"].files() if name.startswith("model-")]
    assert len(shards) > 2
    assert hub.repos["user/sharded"].private
    assert not hub.repos["user/model"].private
    results = load_elsewhere(hub, tmp_path / "client", *((repo_id, kwargs) for repo_id, kwargs, _ in expected))
    for (repo_id, kwargs, name), result in zip(expected, results, strict=True):
        assert torch.equal(result, logits(models[name])), (repo_id, kwargs, result)


def test_private_and_missing_repositories_are_refused_to_strangers(
    hub: HubServer, run_folder: Path, tmp_path: Path
) -> None:
    push(run_folder, "user/secret", private=True)
    push(run_folder, "user/open", private=False)
    wanted = [("user/secret", {}), ("user/missing", {}), ("user/open", {"revision": "missing"}), ("user/open", {})]
    secret, missing, revision, public = load_elsewhere(hub, tmp_path / "client", *wanted, token=None)
    assert "user/secret" in secret
    assert "private" in secret
    assert "user/missing" in missing
    assert "missing" in revision
    assert "revision" in revision
    assert isinstance(public, torch.Tensor)


def test_a_push_is_one_commit_of_everything(hub: HubServer, run_folder: Path) -> None:
    url = push(run_folder, "user/model", commit_message="first")
    repo = hub.repos["user/model"]
    assert repo.messages == ["initial commit", "first"]
    assert url == f"{hub.url}/user/model/commit/{repo.branches['main']}"
    files = repo.files()
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "fliqs/figures/allocation.png",
        "fliqs/report.html",
        "model.safetensors",
        "preprocessor_config.json",
        *(
            f"fliqs/{name}.json"
            for name in (
                "allocation",
                "layers",
                "results",
                "search_space",
                "settings",
                "written",
            )
        ),
        *(f"fliqs/{name}.jsonl" for name in ("metrics", "policy")),
    }
    assert_complete(files, run_folder)
    recorded = json.loads((run_folder / "fliqs/settings.json").read_text())
    command = ["vit.py", *recorded["command"][1:]]  # of recipes/vit.py, a path where the tests run
    assert json.loads(files["fliqs/settings.json"]) == {**recorded, "command": command}
    assert files["fliqs/results.json"] == (run_folder / "fliqs/results.json").read_bytes()
    assert b'from_pretrained("user/model")' in files["README.md"]


def test_a_second_push_replaces_what_is_ours_and_nothing_else(
    hub: HubServer, run_folder: Path, tmp_path: Path
) -> None:
    push(run_folder, "user/model")
    repo = hub.repos["user/model"]
    assert push(run_folder, "user/model") == f"{hub.url}/user/model/commit/{repo.branches['main']}"
    assert len(repo.messages) == 2, "nothing has changed, so there is nothing to commit"

    theirs = {"LICENSE": (b"text", False), "fliqs/figures/photo.jpg": (b"jpeg", False)}
    repo.commit("main", {**repo.commits[repo.branches["main"]], **theirs}, "theirs")
    # Were model.safetensors to stay, it would be loaded instead of the shards, with the new config.
    write_run(tmp_path / "sharded", seed=1, shard_size="10KB", formats=("int8",))
    for name in ("report.html", "figures/allocation.png", "policy.jsonl"):
        (tmp_path / "sharded" / "fliqs" / name).unlink()
    push(tmp_path / "sharded", "user/model")
    files = repo.files()
    assert_complete(files, tmp_path / "sharded")
    gone = {"model.safetensors", "fliqs/report.html", "fliqs/figures/allocation.png", "fliqs/policy.jsonl"}
    assert not gone & set(files)
    assert set(theirs) <= set(files)

    push(run_folder, "user/model")
    files = repo.files()
    assert_complete(files, run_folder)
    assert not [name for name in files if name.startswith("model-") or name.endswith("index.json")]


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(
    ("kind", "times"), [("put", 2), ("commit", 2), ("commit-error", 2), ("commit-response", 1), ("concurrent", 1)]
)
def test_a_fault_that_passes_is_survived(hub: HubServer, run_folder: Path, kind: str, times: int) -> None:
    hub.fault(kind, times)
    url = push(run_folder, "user/model", commit_message="ours")
    repo = hub.repos["user/model"]
    assert not hub.take_fault(kind), "the fault has not happened"
    assert_complete(repo.files(), run_folder)
    assert [name for name in repo.files() if name.endswith(".safetensors")] == ["model.safetensors"]
    assert repo.messages.count("ours") == 1
    assert url.endswith(repo.branches["main"])


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("kind", ["put", "commit", "commit-error"])
def test_a_lasting_fault_leaves_the_old_model(hub: HubServer, run_folder: Path, tmp_path: Path, kind: str) -> None:
    push(run_folder, "user/model")
    head = hub.repos["user/model"].branches["main"]
    write_run(tmp_path / "new", seed=1)
    hub.fault(kind, 1000)
    with pytest.raises(HubError, match=r"user/model: .*attempts: 3.*never a part\. Push again"):
        push(tmp_path / "new", "user/model")
    assert hub.repos["user/model"].branches["main"] == head

    hub.fault(kind, 0)
    push(tmp_path / "new", "user/model")
    assert_complete(hub.repos["user/model"].files(), tmp_path / "new")


@pytest.mark.usefixtures("no_pauses")
def test_a_lost_pull_request_is_not_made_twice(hub: HubServer, run_folder: Path) -> None:
    push(run_folder, "user/model")
    hub.fault("commit-response", 1)
    with pytest.raises(HubError, match="attempts: 1"):
        push(run_folder, "user/model", commit_message="proposal", create_pr=True, card=_card("changed"))
    assert hub.repos["user/model"].messages.count("proposal") == 1


def _card(text: str) -> Any:
    return huggingface_hub.ModelCard(f"---\ntags: [fliqs]\n---\n\n{text}\n")


def test_a_pull_request_leaves_main_alone(hub: HubServer, run_folder: Path, tmp_path: Path) -> None:
    push(run_folder, "user/model")
    head = hub.repos["user/model"].branches["main"]
    write_run(tmp_path / "new", seed=1)
    assert push(tmp_path / "new", "user/model", create_pr=True) == f"{hub.url}/user/model/discussions/1"
    assert hub.repos["user/model"].branches["main"] == head
    assert_complete(hub.repos["user/model"].files("refs/pr/1"), tmp_path / "new")


@pytest.mark.parametrize(
    ("token", "repo_id", "kwargs", "message"),
    [
        (None, "user/model", {}, "status 401.*hf auth login"),
        (None, "model", {}, "model: whose.*hf auth login"),
        ("hf_wrong", "user/model", {}, "status 401 .*Invalid credentials.*HF_TOKEN"),
        (TOKEN, "another/model", {}, "status 403.*another/model.*write permission"),
        (TOKEN, "user/model", {"revision": "refs/pr/7"}, r"status 404.*refs/pr/7.*check the name"),
        (TOKEN, "user/a/b", {}, "'user/a/b' is no name of a repository"),
    ],
)
def test_refusals_name_the_remedy(
    hub: HubServer,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    repo_id: str,
    kwargs: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=message):
        push(run_folder, repo_id, token=token, **kwargs)
    assert not any("model.safetensors" in repo.files() for repo in hub.repos.values())
    assert not hub.objects


def test_the_own_namespace_is_the_default(hub: HubServer, run_folder: Path) -> None:
    push(run_folder, "model")
    assert b'from_pretrained("user/model")' in hub.repos["user/model"].files()["README.md"]


def test_private_is_never_published_in_a_public_repository(hub: HubServer, run_folder: Path) -> None:
    push(run_folder, "user/model", card=_card("public"))
    with pytest.raises(HubError, match="is public"):
        push(run_folder, "user/model", private=True)
    assert len(hub.repos["user/model"].messages) == 2


@pytest.mark.usefixtures("no_pauses")
def test_no_connection(hub: HubServer, run_folder: Path) -> None:
    hub.__exit__()
    with pytest.raises(HubError, match=rf"{hub.url} could not be reached.*Push again"):
        push(run_folder, "user/model")


def test_offline_mode(hub: HubServer, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        push(run_folder, "user/model")
    assert not hub.requests


def test_an_access_token_is_not_published(hub: HubServer, run_folder: Path) -> None:
    change(run_folder / "fliqs/settings.json", command=["recipes/vit.py", "--hub_token", TOKEN])
    with pytest.raises(HubError, match=r"(README\.md|fliqs/settings\.json) holds what looks like an access token"):
        push(run_folder, "user/model")
    assert not hub.repos


def _without_shard(run: Path) -> None:
    sorted(run.glob("model-*"))[1].unlink()


def _truncated(run: Path) -> None:
    shard = sorted(run.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def _without_weights(run: Path) -> None:
    for file in run.glob("model*"):
        file.unlink()


def _wrong_index(run: Path) -> None:
    index = run / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    first, last = sorted(set(weights.values()))[:2]
    change(index, weight_map={name: last if file == first else file for name, file in weights.items()})


def _stale_fp32_weights(run: Path) -> None:
    tiny("vit").save_pretrained(run / "fliqs/fp32")
    shutil.copy(run / "fliqs/fp32" / "model.safetensors", run)


def _other_allocation(run: Path) -> None:
    allocation = json.loads((run / "fliqs/allocation.json").read_text())
    allocation["classifier"]["weight"] = "int2"
    (run / "fliqs/allocation.json").write_text(json.dumps(allocation))


def _not_quantized(run: Path) -> None:
    change(run / "config.json", quantization_config=None)


def _still_searching(run: Path) -> None:
    change(run / "config.json", quantization_config={"quant_method": "fliqs", "search_space": ["int4"]})


def _without_processor(run: Path) -> None:
    (run / "preprocessor_config.json").unlink()


def _without_config(run: Path) -> None:
    (run / "config.json").unlink()


def _broken_json(run: Path) -> None:
    (run / "fliqs/results.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_shard, r"index\.json points at model-00002-.*, which is missing"),
        (_truncated, r"model-00002-.* is not a complete safetensors file"),
        (_without_weights, r"has no model\.safetensors and no"),
        (_wrong_index, r"says that '.*' is in model-00002-.*, but it is not"),
        (_stale_fp32_weights, r"is packed in e4m3, but the weight files hold F32"),
        (_other_allocation, r"allocation\.json is not the allocation that the model is packed by"),
        (_not_quantized, "not quantized by fliqs_hf"),
        (_still_searching, "still being searched"),
        (_without_processor, r"has no preprocessor_config\.json"),
        (_without_config, r"has lost the config\.json of its model"),
        (_broken_json, r"cannot read .*results\.json"),
    ],
)
def test_an_unfinished_run_is_refused_before_anything_is_sent(
    hub: HubServer, tmp_path: Path, damage: Any, message: str
) -> None:
    write_run(tmp_path / "run", shard_size="10KB")
    damage(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        push(tmp_path / "run", "user/model")
    assert not hub.requests
