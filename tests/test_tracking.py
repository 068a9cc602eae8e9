"""Weights & Biases and TensorBoard, with their real clients: every row once, and never in training's way."""

import contextlib
import gzip
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import HERE, RLAMORT, rlamort
from test_learner import SMALL
from wandb.proto import wandb_internal_pb2

import rlamort as ra
from rlamort.config import check_names, fields, read_row
from rlamort.run.track import read_records

COMMON = [
    "td3", "env=Pendulum-v1", "steps=400", "hidden=[16,16]", "warmup_steps=50", "batch_size=16", "checkpoint_every=50",
    "log_every=25", "eval_every=100", "eval_episodes=2", "threads=1", "device=cpu", "video=false", "dir=run",
]  # fmt: skip


LONG = [word.replace("steps=400", "steps=1500") for word in COMMON]  # long enough to be interrupted on any machine


def wandb_records(file):
    """The protocol buffers in a .wandb file, which is framed as LevelDB's log: blocks of 32 KiB, records in fragments."""
    content, at, part = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0:
            at += room
            continue
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last fragment
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def history(run):
    """Rows of all offline files of a run, in order, as {name: value}."""
    rows = []
    for file in sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime):
        for record in wandb_records(file):
            if record.HasField("history"):
                row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                rows.append({k: v for k, v in row.items() if not k.startswith("_")})
    return rows


def scalars(run):
    return [{k: v for k, v in record.items() if not isinstance(v, list)} for record in read_records(run)]


def assert_same_rows(ours, theirs):
    assert [row["env_step"] for row in theirs] == [row["env_step"] for row in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(one)


def test_an_offline_run_holds_every_row_once(tmp_path):
    rlamort("train", *COMMON, "track=wandb", "wandb_mode=offline", "wandb_tags=[a,b]", "wandb_group=g", cwd=tmp_path)
    run = tmp_path / "run"
    assert_same_rows(scalars(run), history(run))
    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    records = list(wandb_records(file))
    (about,) = [r.run for r in records if r.HasField("run")]
    assert (about.project, about.run_group, list(about.tags)) == ("rlamort", "g", ["a", "b"])
    config = {u.key: json.loads(u.value_json) for u in about.config.update}
    assert config["method"] == "td3"
    assert config["versions"]["mujoco"]
    metrics = [r.metric for r in records if r.HasField("metric")]
    assert any(m.glob_name == "*" and m.step_metric == "env_step" for m in metrics)


def test_the_client_of_a_program_that_has_ended_does_not_matter(tmp_path):
    """A program's own W&B client names its service in the environment, and the service ends with the program."""
    tracked = ["track=wandb", "wandb_mode=offline"]
    rlamort("train", *COMMON, *tracked, cwd=tmp_path, WANDB_SERVICE=f"3-1-unix-{tmp_path}/ended")
    assert_same_rows(scalars(tmp_path / "run"), history(tmp_path / "run"))


def test_a_killed_and_resumed_run_is_one_run_with_every_row_once(tmp_path):
    command = [RLAMORT, "train", *LONG, "track=wandb", "wandb_mode=offline", "resume=auto"]
    for delay in (0.6, 1.0, 0.9):
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
    rlamort("train", *LONG, "track=wandb", "wandb_mode=offline", "resume=auto", cwd=tmp_path)
    run = tmp_path / "run"
    files = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) > 1
    assert len({file.name for file in files}) == 1  # one id
    assert_same_rows(scalars(run), history(run))


def test_push_sends_what_was_recorded(tmp_path):
    rlamort("train", *COMMON, cwd=tmp_path)
    (tmp_path / "run" / "videos").mkdir()
    (tmp_path / "run" / "videos" / "step-000000400.mp4").write_bytes(b"a film")
    said = rlamort("push", "run", "wandb_mode=offline", "wandb_project=mine", cwd=tmp_path)
    assert said.stdout == "run: all records are on this machine; `wandb sync run/wandb/offline-run-*` sends them\n"
    assert_same_rows(scalars(tmp_path / "run"), history(tmp_path / "run"))
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert "videos/step-000000400.mp4" in [f.path for r in wandb_records(file) if r.HasField("files") for f in r.files.files]
    rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path)  # nothing is missing, so nothing is sent again
    assert_same_rows(scalars(tmp_path / "run"), history(tmp_path / "run"))
    said = rlamort("push", "run", "wandb_projct=mine", cwd=tmp_path, code=2)
    assert "Did you mean wandb_project" in said.stderr


@pytest.fixture
def killed(tmp_path):
    """A function that kills a run, without a tracker, once it has recorded that step."""

    def kill(step, checkpoint_every):
        command = [RLAMORT, "train", *LONG, f"checkpoint_every={checkpoint_every}"]
        run = tmp_path / "run"
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
            while not any(record["env_step"] >= step for record in read_records(run)):
                assert process.poll() is None
            process.kill()
        return run

    return kill


def test_what_a_resume_writes_again_is_not_pushed_before(killed, tmp_path):
    run = killed(525, checkpoint_every=500)
    recorded = scalars(run)
    assert recorded[-1]["env_step"] > 500
    said = rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path).stdout
    assert "run: all records up to its newest checkpoint are on this machine" in said
    assert said.endswith("; `rlamort resume run` writes the later ones again\n")
    assert_same_rows([row for row in recorded if row["env_step"] <= 500], history(run))
    rlamort("resume", "run", "track=wandb", "wandb_mode=offline", cwd=tmp_path)
    assert_same_rows(scalars(run), history(run))
    assert rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path).stdout.startswith("run: all records are on this machine")
    assert_same_rows(scalars(run), history(run))


def test_before_its_first_checkpoint_nothing_of_a_run_is_pushed(killed, tmp_path):
    run = killed(25, checkpoint_every=1500)
    said = rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path, code=2).stderr
    assert "run: it has no checkpoint yet, so `rlamort resume run` writes its records again; none is final" in said
    rlamort("resume", "run", "track=wandb", "wandb_mode=offline", cwd=tmp_path)
    assert_same_rows(scalars(run), history(run))


def test_a_finished_run_is_pushed_whole_though_its_checkpoints_are_damaged(tmp_path):
    """No resume writes any of it again."""
    rlamort("train", *COMMON, cwd=tmp_path)
    run = tmp_path / "run"
    for step in (run / "ckpt").glob("step_*"):
        (step / "state.safetensors").write_bytes(b"")
    assert rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path).stdout.startswith("run: all records are on this machine")
    assert_same_rows(scalars(run), history(run))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 400", "steps: 500"))
    said = rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path, code=2).stderr
    assert "none of its 2 checkpoints can be used" in said


def test_a_run_that_begins_anew_is_another_one_there(tmp_path):
    """Stable-Baselines3's have no checkpoints; without an agent either, there is nothing that beginning anew would lose."""
    few = [word for word in COMMON if word != "td3"]
    rlamort("train", "sb3/td3", *few, "steps=100", cwd=tmp_path)
    assert rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path).stdout.startswith("run: all records are on this machine")
    before = scalars(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "agent")
    done = rlamort("resume", "run", "steps=150", "track=wandb", "wandb_mode=offline", cwd=tmp_path)
    assert "begins anew, and the 100 steps that it has recorded are lost" in done.stderr
    assert_same_rows([*before, *scalars(tmp_path / "run")], history(tmp_path / "run"))
    assert len({file.name for file in (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")}) == 2


class Recorder(BaseHTTPRequestHandler):
    """As much of a Weights & Biases server as its client needs, which keeps the history rows that arrive."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):  # the base class's name
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        rows, answer = self.server.rows, {}
        if self.path == "/graphql":
            project = {"id": "p", "name": "rlamort", "entity": {"id": "e", "name": "me"}}
            bucket = {
                "id": "b", "name": "r", "displayName": "r", "description": "", "config": "{}", "tags": [],
                "wandbConfig": json.dumps({"t": 1} if rows else {}),  # telemetry: by that its client knows a run of old
                "sweepName": None, "summaryMetrics": "{}", "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
                "historyLineCount": len(rows), "historyTail": json.dumps([json.dumps(rows[-1])] if rows else []),
                "project": project,
            }  # fmt: skip
            known = {"model": {"id": "p", "name": "rlamort", "entity": project["entity"], "bucket": bucket if rows else None}}
            viewer = {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
            info = {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}
            files = {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
            upsert = {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
            answer = {"data": {**viewer, **info, **known, **files, **upsert}}
        elif self.path.endswith("/file_stream"):
            if self.server.refuses:
                self.send_response(500)
                self.send_header("content-length", "0")
                self.end_headers()
                return
            part = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if part:
                del rows[part["offset"] :]
                rows += [json.loads(line) for line in part["content"]]
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.fixture
def recorder(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.rows, server.refuses = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    yield server
    server.shutdown()
    server.server_close()


def arrived(server):
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in server.rows]


def test_an_online_run_arrives_row_by_row(recorder, tmp_path):
    rlamort("train", *COMMON, "track=wandb", cwd=tmp_path)
    assert_same_rows(scalars(tmp_path / "run"), arrived(recorder))


def test_wandb_sync_uploads_an_interrupted_offline_run_whole(recorder, tmp_path):
    command = [RLAMORT, "train", *LONG, "track=wandb", "wandb_mode=offline"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    rlamort("resume", "run", cwd=tmp_path)
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"), key=lambda f: f.stat().st_mtime)
    assert len(folders) == 2
    for folder in folders:
        subprocess.run([RLAMORT.parent / "wandb", "sync", folder], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert_same_rows(scalars(tmp_path / "run"), arrived(recorder))


def test_agents_become_artifacts_on_request_and_no_more_than_asked(tmp_path):
    rlamort("train", *COMMON, "track=wandb", "wandb_mode=offline", "wandb_artifacts=2", cwd=tmp_path)
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    artifacts = [r.request.log_artifact.artifact for r in wandb_records(file) if r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in wandb_records(file) if r.HasField("artifact")]
    assert 1 <= len(artifacts) <= 2
    assert {c.path for c in artifacts[0].manifest.contents} == {"agent.json", "agent.safetensors"}


def test_what_did_not_come_through_is_sent_by_push_and_nothing_twice(recorder, tmp_path):
    """The client is handed rows that the server no longer takes, and is ended with the run."""
    rlamort("train", *COMMON, "track=wandb", cwd=tmp_path)
    recorder.refuses = True
    said = rlamort("resume", "run", "steps=600", "track_timeout=3", cwd=tmp_path).stderr
    assert "waiting up to 3 s for wandb to upload the last records; Ctrl-C skips that" in said
    assert "not all records are uploaded" in said
    assert 0 < len(arrived(recorder)) < len(scalars(tmp_path / "run"))
    recorder.refuses = False
    assert rlamort("push", "run", cwd=tmp_path).stdout == "run: all records are sent\n"
    assert_same_rows(scalars(tmp_path / "run"), arrived(recorder))
    rlamort("push", "run", cwd=tmp_path)
    assert_same_rows(scalars(tmp_path / "run"), arrived(recorder))


def test_push_without_a_login_or_a_server_is_one_message(tmp_path):
    rlamort("train", *COMMON, "steps=60", cwd=tmp_path)
    nobody = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    said = rlamort("push", "run", cwd=tmp_path, code=2, **nobody).stderr
    assert re.fullmatch(r"rlamort: wandb: .*wandb login.*; or give wandb_mode=offline, which needs no account\n", said)
    said = rlamort("push", "run", "track_timeout=2", cwd=tmp_path, code=2, **nobody | {"WANDB_API_KEY": "x" * 40}).stderr
    assert re.fullmatch(r"rlamort: wandb: no answer within 2 s, track_timeout waits longer \(.*\)\n", said)
    said = rlamort("push", "run", "wandb_mode=disabled", cwd=tmp_path, code=2).stderr
    assert said == "rlamort: wandb_mode=disabled: nothing would be sent; online or offline is needed\n"
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "run: it has recorded nothing yet" in rlamort("push", "run", cwd=tmp_path, code=2).stderr


def test_ctrl_c_ends_the_wait_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    command = [RLAMORT, "train", *COMMON, "steps=60", "track=wandb", "track_timeout=300"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.readline()
        assert said.startswith("waiting up to 300 s for wandb to upload the last records; Ctrl-C skips that")
        family, until = [], time.monotonic() + 60
        while len(family) < 2 and time.monotonic() < until:  # the mirror, and its client's own process
            family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert "not all records are uploaded" in process.stderr.read()
        assert process.stdout.read().splitlines()[-1] == "run"
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path)
    assert_same_rows(scalars(tmp_path / "run"), history(tmp_path / "run"))


class Refuses(BaseHTTPRequestHandler):
    def do_POST(self):  # the base class's name
        self.send_response(500)
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def endpoint(kind):
    """A loopback address that answers 500, accepts and never answers, or is not there."""
    if kind == "500":
        server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
        server.server_close()
    else:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            if kind == "hangs":
                listening.listen()
                yield listening.getsockname()[1]
                return
            port = listening.getsockname()[1]
        yield port


@pytest.mark.parametrize("kind", ["500", "hangs", "gone"])
def test_a_backend_that_fails_costs_one_warning_and_no_record(kind, tmp_path, monkeypatch):
    fields_given = {
        **SMALL, "eval_every": 60, "eval_episodes": 2, "log_every": 50, "checkpoint_every": 40, "track_timeout": 2.0,
    }  # fmt: skip
    with endpoint(kind) as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        agent = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), track="wandb", **fields_given)
        agent.learn(200)
        with pytest.warns(UserWarning, match=r"not all records are uploaded .*`rlamort push .*` sends them") as said:
            agent.close()
    assert len(said) == 1
    assert [r["env_step"] for r in read_records(tmp_path / "run") if "eval/return" in r] == [60, 120, 180, 200]
    monkeypatch.delenv("WANDB_BASE_URL")
    rlamort("push", "run", "wandb_mode=offline", cwd=tmp_path)
    assert_same_rows(scalars(tmp_path / "run"), history(tmp_path / "run"))


def test_a_backend_that_dies_costs_one_warning(tmp_path):
    fields_given = {**SMALL, "eval_every": 60, "eval_episodes": 2, "checkpoint_every": 20, "wandb_mode": "offline"}
    agent = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), track="wandb", **fields_given)
    agent.learn(40)
    agent.durable.mirrors[0].process.kill()
    agent.durable.mirrors[0].process.wait()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        agent.learn(200, reset_num_timesteps=False)
        agent.close()
    assert len([w for w in said if "not all records are uploaded" in str(w.message)]) == 1


def test_tensorboard_gets_the_same_rows(tmp_path):
    rlamort("train", *COMMON, "track=[tensorboard]", cwd=tmp_path)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    ours = [(r["env_step"], r["eval/return"]) for r in scalars(tmp_path / "run") if "eval/return" in r]
    assert [(e.step, e.value) for e in events.Scalars("eval/return")] == [(s, pytest.approx(v)) for s, v in ours]


def test_what_cannot_be_tracked_is_said_at_once(tmp_path, monkeypatch):
    with pytest.raises(ra.UserError, match=r"track=wandb: .* dir is needed too"):
        ra.TD3("Pendulum-v1", track="wandb")
    with pytest.raises(ra.UserError, match="track=wandbb: none, wandb, tensorboard or a list of"):
        ra.TD3("Pendulum-v1", track="wandbb", dir=str(tmp_path / "run"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ra.UserError, match="tensorboard is not installed; pip install tensorboard"):
        ra.TD3("Pendulum-v1", track="tensorboard", dir=str(tmp_path / "run"))


def test_runs_of_a_multirun_share_a_group(tmp_path):
    arguments = [a for a in COMMON if not a.startswith(("dir", "steps"))]
    rlamort("train", *arguments, "steps=60", "-m", "seed=0,1", cwd=tmp_path)
    groups = {yaml.safe_load(file.read_text())["wandb_group"] for file in (tmp_path / "runs").glob("*/config.yaml")}
    assert len(groups) == 1
    assert groups.pop().startswith("td3-")


def test_the_shipped_sweep_names_keys_that_exist(tmp_path):
    sweep = yaml.safe_load((HERE.parent / "configs" / "wandb-sweep.yaml").read_text())
    check_names(sweep["parameters"], fields(read_row("sac")))
    command = sweep["command"]
    assert command[:3] == ["rlamort", "train", "sac"]
    chosen = ["learning_rate=0.0005", "batch_size=128", "seed=1"]
    words = [w for word in command for w in (chosen if word == "${args_no_hyphens}" else [word])]
    quick = [*words[1:], "steps=30", "warmup_steps=20", "wandb_mode=offline", "dir=run", "eval_episodes=1"]
    rlamort(*[w for w in quick if w != "steps=20_000"], cwd=tmp_path, WANDB_RUN_ID="fromsweep")
    assert json.loads((tmp_path / "run" / "mirror" / "wandb.json").read_text())["id"] == "fromsweep"


@pytest.mark.parametrize("backend", ["tensorboard", "wandb"])
def test_a_first_record_may_be_long_in_coming(backend, tmp_path):
    """The process that copies records is there before the file is."""
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), track=backend, wandb_mode="offline", **SMALL)
    learner.close()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    # In a process of its own, as mirrors run: the W&B client names its service in the environment of its process,
    # and every command started later from this one would share it.
    copier = [sys.executable, "-P", "-m", "rlamort.run.mirror", str(tmp_path / "run"), backend]
    subprocess.run(copier, input=b"0\npreempted\nend\n", check=True, timeout=120)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""
