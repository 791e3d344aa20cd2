"""Publishing, through the real client against a stand-in for the Hub, and the model card."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from fixtures.processes import PROCESS_TIMEOUT, Popen, launcher, run_process, warm_processes
from fixtures.publishing import (
    OTHER,
    READER,
    SCOPED,
    WRITER,
    Worker,
    hub_environment,
    start_hub,
    write_companions,
    write_evaluation,
    write_run,
)
from fixtures.repository import REPOSITORY
from qwen_vl_sft import tiny
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.publishing import access, push_while_training
from qwen_vl_sft.publishing.access import Target, check_access, redact
from qwen_vl_sft.publishing.card import make_card, training_lines
from qwen_vl_sft.publishing.card_code import python_code
from qwen_vl_sft.publishing.comparison import stale_files
from qwen_vl_sft.publishing.files import collect_files
from qwen_vl_sft.publishing.names import public_name, without_paths
from qwen_vl_sft.publishing.options import PushOptions, check_options, run_push
from qwen_vl_sft.publishing.published_model import read_published_model

COMMIT = {"method": "POST", "path": "/commit/", "times": 1}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    yield from start_hub(tmp_path_factory.mktemp("xet"))


@pytest.fixture(autouse=True)
def no_faults(request):
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").faults()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "charts")
    weights = [folder / "adapter_model.safetensors"]
    write_evaluation(folder / "evaluation", folder, weights, str(tiny.DATA_DIR))
    return folder


@pytest.fixture(scope="module")
def home(hub, tmp_path_factory):
    """A home of the Hub's client, with processes forked that have it and take the stand-in for the Hub, without Xet."""
    folder = tmp_path_factory.mktemp("home")
    with warm_processes(hub_environment(hub, folder, xet=False)):
        yield folder


def make_worker(hub, home, xet):
    worker = Worker(hub_environment(hub, home, xet))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def lfs_worker(hub, home):
    yield from make_worker(hub, home, xet=False)


@pytest.fixture(scope="module")
def xet_worker(hub, tmp_path_factory):
    yield from make_worker(hub, tmp_path_factory.mktemp("home"), xet=True)


@pytest.fixture(params=["lfs", "xet"])
def worker(request):
    """Xet off and on."""
    return request.getfixturevalue(f"{request.param}_worker")


@pytest.fixture
def repo(request):
    """A name that no other test has."""
    return "alice/" + re.sub(r"\W+", "-", request.node.name).strip("-")[-60:].strip("-")


COMPARE_LOGITS = """
import sys, torch
from peft import PeftModel
from qwen_vl_sft import tiny
from qwen_vl_sft.modeling.base_model import load_model
from qwen_vl_sft.config.settings import ModelSettings

def logits(folder):
    base = load_model(ModelSettings(model_name_or_path=str(tiny.MODEL_DIR), dtype="float32"), on_cpu=True)
    if folder:
        base = PeftModel.from_pretrained(base, folder)
    with torch.no_grad():
        return base.eval()(input_ids=torch.arange(10, 40)[None]).logits

here, there = logits({run!r}), logits({repo!r})
assert torch.equal(here, there)
assert not torch.allclose(here, logits(None))
"""


def test_push_pull_and_load(worker, hub, run, repo, tmp_path):
    pushed = worker.push(run, "--repo_id", repo)
    assert pushed.code == 0, pushed.err
    assert f"published   {hub.address}/{repo} (private)" in pushed.out
    assert "compared    15 files on the Hub equal the local ones (15 sent now)" in pushed.out
    hub.log()
    again = worker.push(run, "--repo_id", repo)
    assert "all were there already, so no commit was made" in again.out
    assert not [line for line in hub.log() if line.startswith(("PUT", "POST /api/models")) and "paths-info" not in line]
    assert len(hub.titles(repo)) == 2
    # Anonymous people and other users do not see it.
    for token in (None, OTHER):
        with pytest.raises(urllib.error.HTTPError, match=r"401|404"):
            hub.get(f"/{repo}/resolve/main/README.md", token)
    files = hub.files(repo)
    assert {"adapter_model.safetensors", "README.md", "evaluation/summary.json", "recipe.yaml"} <= set(files)
    assert not [path for path in files if path.startswith(("checkpoint", "runs/")) or path.endswith((".bin", ".pt"))]
    for path, entry in files.items():
        if "lfs" not in entry:
            text = hub.get(f"/{repo}/resolve/main/{path}").decode()
            assert not [
                part for part in (str(run), str(tiny.MODEL_DIR), str(Path.home()) + "/", WRITER) if part in text
            ]
    loaded = worker.code(COMPARE_LOGITS.format(run=str(run), repo=repo), tmp_path)
    assert loaded.code == 0, loaded.err
    # The program of the card, as a reader would run it.
    card = hub.get(f"/{repo}/resolve/main/README.md").decode()
    Image.new("RGB", (80, 60), "red").save(tmp_path / "chart.png")
    answered = worker.code(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], tmp_path)
    assert answered.code == 0, answered.err
    assert answered.out.strip()
    assert WRITER not in pushed.out + pushed.err + again.out + again.err + card + str(hub.titles(repo))


def test_another_process_loads_nothing_without_the_token(lfs_worker, hub, run, tmp_path):
    assert lfs_worker.push(run, "--repo_id", "hidden").code == 0
    code = "from huggingface_hub import snapshot_download; snapshot_download('alice/hidden')"
    assert "RepositoryNotFoundError" in lfs_worker.code(code, tmp_path, token="").err


@pytest.mark.parametrize(
    ("xet", "fault"),
    [(False, {"method": "PUT", "path": "/_lfs/", "skip": 1}), (True, {"method": "POST", "path": "/commit/"})],
    ids=["lfs", "xet"],
)
def test_a_killed_push_goes_on_when_run_again(xet, fault, hub, home, repo, tmp_path, request):
    run = write_run(tmp_path / "run", seed=int(xet) + 5)
    # A second large file, so that one is there and one is not.
    # A NUL in its beginning, which the client sends ahead, makes it one.
    (run / "loss.png").write_bytes(b"\0" + os.urandom(1000))
    hub.faults({**fault, "times": 1, "kind": "hang"})
    process = Popen(
        [sys.executable, "scripts/push.py", "--run", run, "--repo_id", repo],
        cwd=REPOSITORY,
        env=hub_environment(hub, tmp_path / "home" if xet else home, xet),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        seen = []
        until = time.monotonic() + PROCESS_TIMEOUT
        while not any(line.endswith(" hangs") for line in seen):
            assert process.poll() is None, seen
            assert time.monotonic() < until, seen
            time.sleep(0.1)
            seen += hub.log()
        assert seen[-1].endswith(" hangs")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(hub.files(repo)) == []
    hub.faults()
    worker = request.getfixturevalue("xet_worker" if xet else "lfs_worker")
    again = worker.push(run, "--repo_id", repo)
    assert again.code == 0, again.err
    assert "compared    14 files" in again.out
    assert len([line for line in hub.log() if line.startswith("PUT")]) == (0 if xet else 1)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"kind": "drop"}, "the connection failed"),
        ({"kind": "status", "status": 500}, "the Hub failed (500: injected); try again later"),
        ({"kind": "status", "status": 403}, "this token may not do that (403: injected)"),
    ],
    ids=["dropped", "failed", "refused"],
)
def test_a_commit_that_fails_is_told_and_run_again(worker, fault, told, hub, run, repo):
    hub.faults({**COMMIT, **fault})
    failed = worker.push(run, "--repo_id", repo)
    assert failed.code == 2
    assert failed.err.count("error: ") == 1
    assert told in failed.err
    assert "Nothing was committed; push again: what has arrived is not sent twice" in failed.err
    assert "Traceback" not in failed.err
    assert WRITER not in failed.err
    assert list(hub.files(repo)) == []
    hub.log()
    again = worker.push(run, "--repo_id", repo)
    assert again.code == 0, again.err
    assert not [line for line in hub.log() if line.startswith("PUT")]


def test_a_dropped_upload_is_sent_again(lfs_worker, hub, repo, tmp_path):
    run = write_run(tmp_path / "run", seed=9)
    hub.faults({"method": "PUT", "path": "/_lfs/", "times": 1, "kind": "drop"})
    pushed = lfs_worker.push(run, "--repo_id", repo)
    assert pushed.code == 0, pushed.err


def test_xet_without_its_token_is_told(xet_worker, hub, repo, tmp_path):
    run = write_run(tmp_path / "run", seed=10)
    hub.faults({"method": "GET", "path": "xet-write-token", "times": 20, "kind": "status", "status": 403})
    failed = xet_worker.push(run, "--repo_id", repo)
    assert failed.code == 2
    assert failed.err.startswith("error: push: ")
    assert failed.err.count("\n") == 1
    hub.faults()
    assert xet_worker.push(run, "--repo_id", repo).code == 0


def test_a_commit_whose_reply_is_lost_is_found(worker, hub, run, repo):
    hub.faults({**COMMIT, "kind": "late"})
    pushed = worker.push(run, "--repo_id", repo)
    assert pushed.code == 0, pushed.err
    assert "compared    15 files" in pushed.out
    assert len(hub.titles(repo)) == 2


def test_a_file_that_differs_on_the_hub_is_named_and_mended(lfs_worker, hub, run, repo):
    hub.faults({**COMMIT, "kind": "tamper", "file": "adapter_config.json"})
    pushed = lfs_worker.push(run, "--repo_id", repo)
    assert pushed.code == 2
    assert "1 of 15 files differ (adapter_config.json: other content)" in pushed.err
    mended = lfs_worker.push(run, "--repo_id", repo)
    assert "15 files on the Hub equal the local ones (1 sent now)" in mended.out
    hub.tamper("recipe.yaml")
    assert "(1 sent now)" in lfs_worker.push(run, "--repo_id", repo).out


def test_a_branch_is_made_and_main_stays(lfs_worker, hub, run, repo):
    pushed = lfs_worker.push(run, "--repo_id", repo, "--branch", "v2")
    assert f"{hub.address}/{repo}/tree/v2" in pushed.out, pushed.err
    assert list(hub.files(repo)) == []
    assert "README.md" in hub.files(repo, "v2")
    assert ', "v2"\n' in hub.get(f"/{repo}/resolve/v2/README.md").decode()


@pytest.mark.parametrize("kind", ["status", "late"])
def test_a_pull_request_is_opened_once(lfs_worker, hub, run, repo, kind):
    if kind == "late":
        hub.faults({**COMMIT, "kind": "late"})
    for _ in range(2):
        pushed = lfs_worker.push(run, "--repo_id", repo, "--create_pr")
        assert pushed.code == 0, pushed.err
        assert f"published   {hub.address}/{repo}/discussions/1 (private)" in pushed.out
        assert " on refs/pr/1\n" in pushed.out
    assert list(hub.files(repo)) == []
    assert "README.md" in hub.files(repo, "refs/pr/1")
    assert len(json.loads(hub.get(f"/api/models/{repo}/discussions"))["discussions"]) == 1


def test_files_of_a_former_push_go_and_those_of_others_stay(lfs_worker, hub, run, repo, tmp_path):
    assert lfs_worker.push(run, "--repo_id", repo).code == 0
    upload = (
        "from huggingface_hub import upload_file\nupload_file(path_or_fileobj=b'mine', path_in_repo={!r}, repo_id={!r})"
    )
    assert lfs_worker.code(upload.format("NOTES.md", repo), tmp_path).code == 0
    other = write_run(tmp_path / "other", seed=3)
    # Named as a file that pushes bring, and of somebody else.
    assert lfs_worker.code(upload.format("vocab.json", repo), tmp_path).code == 0
    pushed = lfs_worker.push(other, "--repo_id", repo)
    assert "removed     1 file(s): evaluation/summary.json\n" in pushed.out, pushed.err
    assert hub.messages(repo)[0] == "Removed: evaluation/summary.json."
    assert "evaluation/summary.json" not in hub.files(repo)
    assert {"NOTES.md", "vocab.json"} <= set(hub.files(repo))
    assert lfs_worker.code(upload.format("README.md", repo), tmp_path).code == 0
    assert "all were there already" in lfs_worker.push(other, "--repo_id", repo, "--keep_card").out
    assert hub.get(f"/{repo}/resolve/main/README.md") == b"mine"


def test_a_card_that_cannot_be_looked_for_is_told(lfs_worker, hub, run, repo):
    assert lfs_worker.push(run, "--repo_id", repo).code == 0
    hub.faults({"method": "HEAD", "path": "README.md", "times": 20, "kind": "status", "status": 503})
    failed = lfs_worker.push(run, "--repo_id", repo, "--keep_card")
    assert failed.code == 2
    assert failed.err.startswith(f"error: push: {repo}, main: the Hub failed (503")
    assert "Nothing was committed" in failed.err
    assert failed.err.count("\n") == 1


def test_a_new_branch_keeps_the_card_of_main(lfs_worker, hub, run, repo, tmp_path):
    assert lfs_worker.push(run, "--repo_id", repo).code == 0
    code = (
        "from huggingface_hub import CommitOperationAdd, HfApi\n"
        "added = [CommitOperationAdd(path, b'mine') for path in ('README.md', 'pytorch_model.bin')]\n"
        f"HfApi().create_commit({repo!r}, added, commit_message='mine')"
    )
    assert lfs_worker.code(code, tmp_path).code == 0
    # Nothing is to be sent, and weights of somebody else are to go from the branch: a failure is not taken for success.
    hub.faults({**COMMIT, "kind": "status", "status": 500})
    failed = lfs_worker.push(run, "--repo_id", repo, "--keep_card", "--branch", "v2")
    assert "Nothing was committed" in failed.err, failed.out
    for branch in ("v2", "v3"):
        pushed = lfs_worker.push(run, "--repo_id", repo, "--keep_card", "--branch", branch)
        assert "removed     1 file(s): pytorch_model.bin" in pushed.out
        assert "(0 sent now)" in pushed.out
        assert hub.get(f"/{repo}/resolve/{branch}/README.md") == b"mine"


FOREIGN = [
    "config.json", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]  # fmt: skip


def test_weights_of_somebody_else_stay(lfs_worker, hub, run, repo, tmp_path):
    code = (
        "from huggingface_hub import CommitOperationAdd, HfApi\napi = HfApi()\n"
        f"api.create_repo({repo!r}, private=True)\n"
        f"added = [CommitOperationAdd(path, path.encode()) for path in {FOREIGN!r}]\n"
        f"api.create_commit({repo!r}, added, commit_message='mine')"
    )
    made = lfs_worker.code(code, tmp_path)
    assert made.code == 0, made.err
    for words in ([], ["--create_pr"]):
        hub.log()
        refused = lfs_worker.push(run, "--repo_id", repo, *words)
        assert refused.code == 2
        assert f"{repo}, main holds another model (model-00001-of-00002.safetensors, " in refused.err
        assert "or a new branch with --branch" in refused.err
        assert refused.err.count("\n") == 1
        assert not [line for line in hub.log() if line.startswith("POST") and "/commit/" in line]
    pushed = lfs_worker.push(run, "--repo_id", repo, "--branch", "adapter")
    assert pushed.code == 0, pushed.err
    assert "removed     3 file(s): model-00001-of-00002.safetensors, model-0" in pushed.out
    assert "adapter_model.safetensors" in hub.files(repo, "adapter")
    assert set(hub.files(repo)) == set(FOREIGN)


SHARDS = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "published.json"}


@pytest.mark.parametrize(
    ("there", "listed", "published", "removed"),
    [
        (SHARDS | {"x"}, SHARDS | {"gone"}, {"model.safetensors"}, sorted(SHARDS)),
        (SHARDS | {"merge.json"}, SHARDS | {"merge.json"}, SHARDS, ["merge.json"]),
        (SHARDS, set(), {"model.safetensors"}, None),
        ({"model.safetensors"}, set(), {"model.safetensors"}, []),
        (SHARDS, SHARDS, ADAPTER, None),
        (ADAPTER, ADAPTER, SHARDS, None),
        ({"pytorch_model.bin"}, set(), ADAPTER, None),
        ({"config.json", "notes/model.safetensors", "model-q4.gguf"}, set(), ADAPTER, []),
    ],
    ids=["own shards", "own merge", "their shards", "replaced", "own model", "own adapter", "pickle", "no weights"],
)
def test_only_what_a_push_has_listed_is_removed(there, listed, published, removed):
    if removed is None:
        with pytest.raises(UserError, match="alice/x, main holds another model"):
            stale_files(there, listed, published, "alice/x, main", all_on_main=False)
        # From a branch that is main's commit nothing is lost.
        removed = sorted(path for path in there - published if path.endswith(("safetensors", "bin", "index.json")))
        assert set(removed) <= set(stale_files(there, listed, published, "alice/x, v2", all_on_main=True))
    else:
        assert stale_files(there, listed, published, "alice/x, main", all_on_main=False) == removed


RIGHTS = {
    "no token": ("", "alice/x", [], "there is no token for the Hub; log in with `hf auth login`"),
    "unknown token": ("hf_nobodyKnowsThis", "alice/x", [], "the Hub does not know this token"),
    "read-only token": (READER, "alice/x", [], "the token 'laptop' of alice may only read"),
    "other account": (WRITER, "bob/x", [], "bob is another account. Name alice/x"),
    "reader of an organization": (WRITER, "museum/x", [], "alice is in museum as read"),
    "fine-grained elsewhere": (SCOPED, "alice/x", [], "is fine-grained and may not write to alice/x"),
    "malformed": (WRITER, "a/b/c", [], "--repo_id: 'a/b/c' is not the name of a repository"),
    "public meant private": (WRITER, "alice/open", [], "exists and is public, but you asked for a private one"),
    "private meant public": (WRITER, "alice/closed", ["--public"], "exists and is private"),
    "somebody's repository": (OTHER, "alice/open", ["--public"], "bob may not write to alice/open"),
    "branch and request": (WRITER, "alice/x", ["--branch", "v2", "--create_pr"], "exclude each other"),
}


@pytest.mark.parametrize("name", RIGHTS)
def test_missing_rights_are_one_message_and_change_nothing(name, lfs_worker, hub, run):
    if not {"alice/open", "alice/closed"} <= shown(hub):
        assert lfs_worker.push(run, "--repo_id", "open", "--public").code == 0
        assert lfs_worker.push(run, "--repo_id", "closed").code == 0
    token, repo, words, told = RIGHTS[name]
    hub.log()
    failed = lfs_worker.push(run, "--repo_id", repo, *words, token=token)
    assert failed.code == 2
    assert failed.err.startswith("error: ")
    assert told in failed.err
    assert failed.err.count("\n") == 1
    assert not token or token not in failed.err
    assert not [line for line in hub.log() if line.startswith(("POST", "PUT"))]


def shown(hub):
    found = set()
    for repo in ("alice/open", "alice/closed"):
        try:
            hub.get(f"/api/models/{repo}")
            found.add(repo)
        except urllib.error.HTTPError:
            pass
    return found


def test_an_organization_and_a_fine_grained_token(lfs_worker, hub, run):
    assert lfs_worker.push(run, "--repo_id", "lab/x", token=SCOPED).code == 0
    assert "README.md" in hub.files("lab/x")


def test_the_hub_out_of_reach(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(access, "is_offline_mode", lambda: True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_access(Target("alice/x"))
    monkeypatch.setattr(access, "is_offline_mode", lambda: False)
    # The client itself refuses every request in these tests' own process, as if there were no network.
    monkeypatch.setattr(access, "HfApi", partial(access.HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(UserError, match=r"^push: http://127.0.0.1:9: the connection failed"):
        check_access(Target("alice/x"))


def test_tokens_are_blotted_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plainsecret")
    text = redact("Authorization: Bearer abc.def plainsecret\nhf_AbCdEfGh123")
    assert text == "Authorization: *** *** ***"


def test_a_file_with_the_token_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_leakedIntoAFile")
    leaking = write_run(tmp_path / "run")
    (leaking / "system_message.txt").write_text("Answer. hf_leakedIntoAFile")
    with pytest.raises(UserError, match=r"system_message\.txt holds the token") as told:
        collect_files(read_published_model(leaking), "card")
    assert "hf_leaked" not in str(told.value)


def test_names_of_this_machine_are_taken_out():
    assert public_name("/data/sets/chartqa") == "local:chartqa"
    assert public_name("/home/alice") == "local:here"
    assert public_name("Qwen/Qwen2-VL-7B-Instruct") == "Qwen/Qwen2-VL-7B-Instruct"
    assert public_name(str(tiny.MODEL_DIR)) == "builtin:tiny-qwen2-vl"
    elsewhere = "/opt/my env/qwen_vl_sft/tiny/assets"
    assert public_name(f"{elsewhere}/model") == "builtin:tiny-qwen2-vl"
    assert public_name(f"{elsewhere}/model/more") == "local:more"
    assert without_paths(f"{elsewhere}/data [test]") == "builtin:tiny-charts [test]"
    cleaned = without_paths(
        {
            "source": "/home/alice/my data/charts [train[:10%]]",
            "said": "read /mnt/disk/x.json, see https://huggingface.co/a/b and 3/4",
            "builtin": f"{tiny.DATA_DIR} [val]",
            "numbers": [1, None, True],
        }
    )
    assert cleaned == {
        "source": "local:charts [train[:10%]]",
        "said": "read local:x.json, see https://huggingface.co/a/b and 3/4",
        "builtin": "builtin:tiny-charts [val]",
        "numbers": [1, None, True],
    }


def card_of(publication, repo_id="alice/name", licence=None):
    text = make_card(publication, repo_id, "main", licence or {}, stated=bool(licence))
    return ModelCard(text), text


def test_the_card_of_an_adapter(run):
    card, text = card_of(read_published_model(run, base_model="Qwen/Qwen2-VL-2B-Instruct"), licence={"license": "mit"})
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen2-VL-2B-Instruct", "adapter")
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("peft", "image-text-to-text", "mit")
    [headline] = [result for result in card.data.eval_results if result.metric_type == "relaxed_accuracy"]
    assert headline.metric_value == 95.0
    assert headline.dataset_split == "val"
    assert headline.metric_args["rows"] == 20
    assert f"95% interval {headline.metric_args['low']} to {headline.metric_args['high']}" in headline.metric_name
    assert "| relaxed_accuracy, all (20 rows) | 0.0 [0.0, 0.0] | 40.0 [" in text
    assert "Against `prompted` on the same rows: +55.0 points [" in text
    assert "> Answer with one word." in text
    assert "min_pixels 3,136 and max_pixels 12,544" in text
    limits = re.search(r"--mm-processor-kwargs '(.*)'", text)[1]
    assert json.loads(limits) == {"size": {"shortest_edge": 3136, "longest_edge": 12544}}
    assert "needs transformers 5: " in text
    assert "--lora-modules name=alice/name" in text
    assert "--max-lora-rank 8" in text
    assert "Training data: the run does not record its licence." in text
    assert "This model: mit." in text
    for word in (str(run), str(REPOSITORY), str(Path.home()) + "/"):
        assert word not in text


def test_a_card_names_the_step_of_the_weights_that_it_publishes(tmp_path):
    def text_of(folder):
        return card_of(read_published_model(folder, base_model="Qwen/Qwen2-VL-2B-Instruct"))[1]

    last = write_run(tmp_path / "last")
    assert "the best of the run" not in text_of(last)
    best = write_run(tmp_path / "best", load_best_model_at_end=True, metric_for_best_model="relaxed_accuracy")
    told = "the weights of step 2 of 3, the best of the run's evaluations by `relaxed_accuracy`"
    for recorded in (False, True):  # by an earlier version, which names the checkpoint alone, and by this one
        if recorded:
            metrics = json.loads((best / "metrics.json").read_text())
            (best / "metrics.json").write_text(json.dumps(metrics | {"best_checkpoint": "", "step_of_weights": 2}))
        text = text_of(best)
        assert told in text
        assert "| steps | 3, 1.00 epochs |\n| weights | of step 2, the best of the run's evaluations |" in text


def test_the_card_of_chartqa_without_evaluation(tmp_path):
    run = write_run(tmp_path / "run", dataset_name="HuggingFaceM4/ChartQA", load_in_4bit=True)
    publication = read_published_model(run, base_model="Qwen/Qwen2-VL-2B-Instruct")
    card, text = card_of(publication)
    assert card.data.datasets == ["HuggingFaceM4/ChartQA"]
    assert card.data.eval_results is None
    assert "license" not in card.data.to_dict()
    assert "Not evaluated" in text
    assert "`HuggingFaceM4/ChartQA` is licensed GPL-3.0." in text
    assert "bnb_4bit_quant_type=" in python_code(publication, "alice/name", "main")
    longer = replace(publication.recipe, run=replace(publication.recipe.run, max_new_tokens=300))
    assert "max_new_tokens=300" in python_code(replace(publication, recipe=longer), "alice/name", "main")
    assert "scripts/merge.py --nf4_aware" in text
    published = {file.path: file for file in collect_files(publication, text)}
    config = json.loads(published["adapter_config.json"].content)
    assert config["base_model_name_or_path"] == "Qwen/Qwen2-VL-2B-Instruct"
    recipe = yaml.safe_load(published["recipe.yaml"].content)
    assert recipe["model_name_or_path"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert recipe["output_dir"] == "runs/run"
    assert not [name for name in recipe if name.startswith(("hub_", "push"))]
    assert "push" not in json.loads(published["metrics.json"].content)
    read_recipe(None, recipe)


def test_the_card_of_an_adapter_for_a_base_in_fp8_names_the_model_that_was_trained(tmp_path):
    run = write_run(tmp_path / "run", load_in_fp8="emulation", fp8_backward=False)
    _, text = card_of(read_published_model(run, base_model="Qwen/Qwen2-VL-2B-Instruct"))
    assert (
        "The base model's weights while training: FP8 (e4m3) weights, forward products in FP8, emulated in float32, else"
        " float32.\nThe libraries below compute it otherwise; `scripts/merge.py --fp8_aware` keeps its weights of training."
    ) in text
    write_run(tmp_path / "plain")
    assert "fp8" not in card_of(read_published_model(tmp_path / "plain"))[1].lower()


def test_the_cards_of_full_and_merged_models(run, tmp_path):
    import shutil

    full = tmp_path / "full"
    full.mkdir()
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        shutil.copy(tiny.MODEL_DIR / name, full)
    merged = tmp_path / "merged"
    shutil.copytree(full, merged)
    write_companions(full, use_peft=False, lora_r=None, model_name_or_path="Qwen/Qwen2-VL-2B-Instruct")
    card, text = card_of(read_published_model(full))
    assert (card.data.library_name, card.data.to_dict()["base_model_relation"]) == ("transformers", "finetune")
    assert "fine-tuned in full" in text
    assert "peft" not in python_code(read_published_model(full), "alice/name", "main")
    report = {"run": str(run), "base": "Qwen/Qwen2-VL-2B-Instruct", "base_revision": "abc123", "dtype": "bfloat16"}
    shutil.copy(run / "recipe.yaml", merged)
    for flags, way in (
        ({"nf4_aware": True}, "the 4-bit weights of training, dequantized"),
        ({"nf4_aware": False, "fp8_aware": True}, "the FP8 weights of training, dequantized"),
        ({"nf4_aware": False}, "its original weights"),
    ):
        (merged / "merge.json").write_text(json.dumps(report | flags))
        text = card_of(read_published_model(run, model=merged))[1]
        assert f"The adapter was added to {way},\nand the sum stored in bfloat16" in text
    publication = read_published_model(run, model=merged)
    card, text = card_of(publication)
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    # The scores are the adapter's, so they are told but not filed as the merged model's.
    assert card.data.eval_results is None
    assert "before the merge; the merged model itself was not scored" in text
    assert "at revision `abc123`" in text
    paths = [file.path for file in collect_files(publication, text)]
    assert {"model.safetensors", "config.json", "merge.json", "metrics.json"} <= set(paths)
    assert "adapter_model.safetensors" not in paths
    with pytest.raises(UserError, match="was merged from"):
        read_published_model(write_run(tmp_path / "other"), model=merged)


def test_a_checkpoint_says_its_step_under_any_name(run, tmp_path):
    import shutil

    shutil.copy(run / "recipe.yaml", tmp_path)
    for name in ("checkpoint-4", "checkpoint-best"):
        (tmp_path / name).mkdir()
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(run / file, tmp_path / name)
    (tmp_path / "best").symlink_to("checkpoint-4")
    steps = {name: read_published_model(tmp_path / name).step for name in ("checkpoint-4", "best")}
    assert steps == {"checkpoint-4": 4, "best": 4}
    with pytest.raises(UserError, match=r"checkpoint-best does not say which step .* name the folder checkpoint-STEP"):
        read_published_model(tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-best/trainer_state.json").write_text('{"global_step": 7}')
    assert read_published_model(tmp_path / "checkpoint-best").step == 7


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "| rows of a step | 8 = 8 a process x 1 x 1 accumulated |"),
        (
            {"packing": True, "global_batch_size": 64, "tokens_per_batch": 8192},
            "| rows of a step | 64, packed into micro-batches of at most 8,192 tokens |",
        ),
        ({"packing": True, "global_batch_tokens": 65536}, "| tokens of a step | about 65,536 |"),
        (
            {"packing": True, "gradient_accumulation_steps": 3},
            "| rows of a step | 24 = 8 a process x 1 x 3 accumulated |",
        ),
    ],
    ids=["padded", "packed rows", "packed tokens", "packed, accumulated"],
)
def test_the_card_says_what_a_step_takes(run, keys, told):
    keys = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1} | keys
    publication = read_published_model(run)
    text = "\n".join(training_lines(replace(publication, recipe=read_recipe(run / "recipe.yaml", keys))))
    assert told in text
    assert text.count(" of a step |") == 1


def test_the_card_says_what_kind_of_adapter_it_is_and_what_trained_beside_it(run):
    publication = read_published_model(run)

    def told(**keys) -> str:
        recipe = read_recipe(run / "recipe.yaml", keys)
        return "\n".join(training_lines(replace(publication, recipe=recipe)))

    assert not [word for word in ("DoRA", "rank-stabilized", "in full") if word in told()]
    assert re.search(
        r"\| LoRA \| r=\d+, alpha=\d+, dropout=[\d.]+, DoRA, rank-stabilized, on ", told(use_dora=True, use_rslora=True)
    )
    assert "| trained in full beside it | `embed_tokens`, `routers` |" in told(
        lora_modules_to_save=["embed_tokens"], train_router=True
    )


def test_what_cannot_be_published_is_told(run, tmp_path):
    local = tmp_path / "base"
    local.mkdir()
    config = json.loads((run / "adapter_config.json").read_text())
    other = write_run(tmp_path / "run")
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(local)}))
    with pytest.raises(UserError, match="give the Hub id of the same model with --base_model"):
        read_published_model(other)
    with pytest.raises(UserError, match=f"is of {run}, another model"):
        read_published_model(write_run(tmp_path / "third"), evaluation=run / "evaluation")
    with pytest.raises(UserError, match=r"holds no merge\.json"):
        read_published_model(run, model=local)
    with pytest.raises(UserError) as told:
        check_options(PushOptions(run, "a b", branch="x..y", create_pr=True, license="My Licence"))
    assert len(told.value.problems) == 4


def test_an_evaluation_of_former_weights_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    weights = run / "adapter_model.safetensors"
    write_evaluation(run / "evaluation", run, [weights], "x")
    read_published_model(run)
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UserError, match="is of other weights"):
        read_published_model(run)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"system_message": "Be brief."}, 'Evaluated with the system message "Be brief." instead of the one below, so'),
        ({"system_message": ""}, "Evaluated with no system message instead of the one below, so"),
        ({"max_pixels": 50176}, "Evaluated with `max_pixels` 50,176 instead of 12,544, so"),
    ],
    ids=["other prompt", "no prompt", "other pixels"],
)
def test_scores_of_other_settings_are_told_and_not_filed(run, tmp_path, settings, told):
    other = write_evaluation(tmp_path / "other", run, [], str(tiny.DATA_DIR), **settings)
    card, text = card_of(read_published_model(run, evaluation=other))
    assert told in text
    assert card.data.eval_results is None
    assert ("Training and evaluation put this" in text) == ("system_message" not in settings)
    assert "| relaxed_accuracy, all (20 rows) |" in text


def test_scores_of_the_settings_of_training_are_filed(run):
    card, text = card_of(read_published_model(run))
    assert card.data.eval_results
    assert "Training and evaluation put this" in text
    assert "Evaluated with" not in text


@pytest.mark.parametrize(
    ("settings", "is_other"),
    [
        ({"model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"}, True),
        ({"model_revision": "abc"}, True),
        ({"model_revision": "c0ffee"}, False),
        ({}, False),
    ],
    ids=["model", "revision", "the commit that was main", "same"],
)
def test_an_evaluation_of_another_base_is_refused(tmp_path, settings, is_other):
    run = write_run(tmp_path / "run", model_name_or_path="Qwen/Qwen2-VL-2B-Instruct")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"base_commit": "c0ffee"}))
    write_evaluation(run / "evaluation", run, [], "x", **settings)
    if not is_other:
        assert read_published_model(run).evaluation
        return
    with pytest.raises(UserError, match=r"has scored on the base model Qwen.*evaluate again with --overwrite"):
        read_published_model(run)


def test_a_base_folder_that_was_moved_keeps_its_evaluation(tmp_path):
    gone, there = tmp_path / "gone/qwen", tmp_path / "there/qwen"
    there.mkdir(parents=True)
    run = write_run(tmp_path / "run", model_name_or_path=str(gone))
    write_evaluation(run / "evaluation", run, [], "x", model_name_or_path=str(there))
    read_published_model(run)
    gone.mkdir(parents=True)
    with pytest.raises(UserError, match="has scored on the base model"):
        read_published_model(run)


def test_a_run_that_was_moved_keeps_its_evaluation(tmp_path):
    run = write_run(tmp_path / "run")
    write_evaluation(run / "evaluation", run, [run / "adapter_model.safetensors"], "x")
    moved = run.rename(tmp_path / "moved")
    publication = read_published_model(moved)
    assert publication.evaluated_as_published
    assert "before the merge" not in card_of(publication)[1]


def test_dry_run_shows_files_and_card_and_asks_nobody(run):
    text = run_push(PushOptions(run, "alice/name", dry_run=True))
    assert text.startswith("15 files, ")
    assert "to alice/name (private if new), main\n" in text
    assert "  adapter_config.json  (made for the Hub)\n" in text
    assert "obsolete files from our previous push of the same kind of model are deleted there" in text
    assert "model-index:" in text


def test_the_real_script_says_what_is_missing(tmp_path):
    finished = run_process("scripts/push.py", "--run", tmp_path / "gone", "--repo_id", "me/x")
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: --run: ")


TRAINING = {
    "recipe": "recipes/quickstart.yaml",
    "max_steps": 3,
    "max_train_samples": 24,
    "per_device_train_batch_size": 4,
    "global_batch_size": 8,
    "eval_strategy": "no",
    "predict_with_generate": "false",
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": "false",
    "dataloader_num_workers": 0,
    "report_to": "none",
    "push_to_hub": "true",
    "hub_strategy": "every_save",
    "hub_always_push": "true",
}


def train(hub, token, home, *words):
    """Train on two processes that take the stand-in for the Hub."""
    env = hub_environment(hub, home, xet=False) | {"HF_TOKEN": token}
    recipe = [word for name, value in TRAINING.items() for word in (f"--{name}", str(value))]
    return run_process(*launcher("cpu"), "scripts/sft.py", *recipe, *words, env=env)


def test_training_pushes_and_reports_what_failed_meanwhile(hub, home, tmp_path):
    hub.faults({**COMMIT, "kind": "status", "status": 500})
    run = tmp_path / "run"
    finished = train(hub, WRITER, home, "--output_dir", run, "--hub_model_id", "trained")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "publish     trained, main, private, with every checkpoint, and at the end" in finished.stdout
    assert (
        "warning: the push of step 1 while training failed: alice/trained, main: the Hub failed (500" in finished.stderr
    )
    assert "checkpoints 2 of 3 published while training" in finished.stdout
    assert "files on the Hub equal the local ones" in finished.stdout
    pushed = json.loads((run / "metrics.json").read_text())["push"]
    assert pushed["while_training"]["published"] == [2, 3]
    assert list(pushed["while_training"]["failed"]) == ["1"]
    assert hub.titles("alice/trained")[:3] == [
        "Upload trained: adapter",
        "Upload trained: adapter at step 3",
        "Upload trained: adapter at step 2",
    ]
    assert not (run / ".pushing").exists()
    text = "".join(file.read_text() for file in run.glob("*.*") if file.suffix in (".json", ".yaml", ".jsonl", ".txt"))
    assert WRITER not in text + finished.stdout + finished.stderr


def test_training_does_not_start_without_the_right_to_push(hub, home, tmp_path):
    run = tmp_path / "run"
    finished = train(hub, READER, home, "--output_dir", run, "--hub_model_id", "never")
    assert finished.returncode != 0
    assert "error: push: the token 'laptop' of alice may only read" in finished.stderr
    assert "exitcode  : 2" in finished.stderr
    assert "model       " not in finished.stdout
    assert not run.exists()
    assert READER not in finished.stdout + finished.stderr


def test_a_final_push_that_fails_leaves_the_run_and_says_how(run, monkeypatch, tmp_path):
    def fail(*arguments):
        raise UserError("push: alice/x, v2: the Hub failed (500)")

    copied = write_run(tmp_path / "run")
    recipe = read_recipe(copied / "recipe.yaml", {"push_to_hub": True, "hub_model_id": "alice/x", "hub_revision": "v2"})
    target = push_while_training.target_of(recipe)
    allowed = access.Access(access.HfApi(token=False), target, "alice", exists=False, private=True)
    monkeypatch.setattr(push_while_training, "publish", fail)
    with pytest.raises(UserError) as told:
        push_while_training.PushWhileTraining(recipe, allowed).finish()
    assert "training has finished and" in str(told.value)
    assert f"python scripts/push.py --run {copied} --repo_id alice/x --branch v2" in str(told.value)
    assert "the Hub failed (500)" in json.loads((copied / "metrics.json").read_text())["push"]["failed"]
    assert (copied / "adapter_model.safetensors").is_file()


BAD_RECIPES = {
    "base of this machine": ({"model_name_or_path": "{here}"}, "nobody else could load the adapter without it"),
    "bad name": ({"hub_model_id": "a/b/c"}, "hub_model_id: 'a/b/c' is not the name of a repository"),
    "bad branch": ({"hub_revision": "refs/pr/1"}, "hub_revision: 'refs/pr/1' is not the name of a branch"),
    "no checkpoints": ({"hub_strategy": "every_save", "save_strategy": "no"}, "save_strategy is no"),
    "strategy of transformers": ({"hub_strategy": "checkpoint"}, "hub_strategy: 'checkpoint' is not"),
    "token in a recipe": ({"hub_token": "hf_x"}, "a token does not belong in a recipe"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_recipe_that_cannot_push(name, tmp_path):
    from qwen_vl_sft.distributed.context import DistributedContext
    from qwen_vl_sft.training.resolve import resolve

    changes, told = BAD_RECIPES[name]
    keys = {
        "model_name_or_path": "builtin:tiny-qwen2-vl",
        "dataset_name": "builtin:tiny-charts",
        "output_dir": str(tmp_path / "run"),
        "dtype": "float32",
        "bf16": False,
        "report_to": "none",
        "push_to_hub": True,
        **{key: value.format(here=tmp_path) for key, value in changes.items()},
    }
    with pytest.raises(UserError) as problem:
        resolve(read_recipe(None, keys), DistributedContext("single", 1, 0, 0, True))
    assert told in str(problem.value)
