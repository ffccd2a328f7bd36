"""consistency-sample on many images: killed, resumed, by several processes, and never mixed with other images."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from composing import composed
from consistency.api import Model
from consistency.checkpoints.native import load_denoiser, save_denoiser
from consistency.commands import checks, processes
from consistency.commands.image_parts import ImageParts
from consistency.commands.sample import find_devices, sample, trajectory
from consistency.data.image_files import image_grid, read_images
from consistency.sampling.samplers import ConsistencySampler, OdeSampler, sample_dpm2, sample_heun
from consistency.sampling.wrappers import guided, in_full_batches


@pytest.fixture
def ckpt(make_denoiser, tmp_path):
    return save_denoiser(make_denoiser(num_classes=3), tmp_path / "model", {"method": "ConsistencyTraining"})


def options(ckpt, out, *more):
    return [f"ckpt={ckpt}", f"out={out}", "device=cpu", "num_samples=21", "batch_size=4", *more]


def checked(*overrides):
    cfg = composed("sample", *overrides)
    checks.check("sample", cfg)
    return cfg


def draw(ckpt, out, *more):
    return sample(checked(*options(ckpt, out, *more)))


def digests(out):
    files = sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("ending", ["", ".npz"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, None), (signal.SIGTERM, 143)])
def test_stopped_and_resumed_gives_the_same_files(ckpt, tmp_path, monkeypatch, caplog, ending, number, code):
    whole = draw(ckpt, tmp_path / f"whole{ending}")
    write, calls = ImageParts.write, count()

    def write_until_stopped(self, batch, images):
        if next(calls) == 3:
            signal.raise_signal(number)
        write(self, batch, images)

    monkeypatch.setattr(ImageParts, "write", write_until_stopped)
    with caplog.at_level("INFO"), pytest.raises(KeyboardInterrupt if code is None else SystemExit) as caught:
        draw(ckpt, tmp_path / f"stopped{ending}")
    assert code is None or caught.value.code == code
    assert "stopped at 12 of 21 images; the same command goes on" in caplog.text

    drawn = []
    monkeypatch.setattr(
        ImageParts, "write", lambda self, batch, images: (drawn.append(batch), write(self, batch, images))
    )
    stopped = draw(ckpt, tmp_path / f"stopped{ending}")
    assert drawn == [3, 4, 5]
    assert list(digests(whole).values()) == list(digests(stopped).values())
    assert not list(tmp_path.glob("*.partial"))

    with caplog.at_level("INFO"):
        draw(ckpt, tmp_path / f"stopped{ending}")
    assert "finished already: 21 images" in caplog.text
    assert drawn == [3, 4, 5]


@pytest.mark.slow
def test_processes_end_with_their_killed_parent_and_draw_the_same_bits(ckpt, tmp_path):
    many = ("num_samples=9000", "batch_size=50")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [Path(sys.executable).parent / "consistency-sample", *options(ckpt, "two.npz", *many, "devices=2")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    folder = tmp_path / "two.npz.partial"
    deadline = time.monotonic() + 600
    while not list(folder.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, children))
    assert len(children) >= 2
    assert 1 <= len(list(folder.rglob("*.png"))) < 9000
    two = draw(ckpt, tmp_path / "two.npz", *many)
    one = draw(ckpt, tmp_path / "one.npz", *many)
    assert digests(two) == digests(one)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_fails_in_a_process_is_the_error_of_the_command(ckpt, tmp_path):
    digest = processes.weights_digest(load_denoiser(ckpt))
    job = processes.Job(str(ckpt), None, digest, 1.0, ConsistencySampler([3, 5]), seed=0, labels=None)
    with pytest.raises(ValueError, match="multistep levels must decrease"):
        processes.sample_on([torch.device("cpu")], job, ImageParts(tmp_path, 4, 4), [0], print)


@pytest.mark.slow
def test_processes_of_torchrun_share_the_batches(ckpt, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [Path(sys.executable).parent / "consistency-sample", *options(ckpt, "two.npz")]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert digests(tmp_path / "two.npz") == digests(draw(ckpt, tmp_path / "one.npz"))


@pytest.mark.parametrize("name", ["folder", "images.npz"])
def test_guidance_reaches_the_images(make_denoiser, tmp_path, name):
    denoiser = make_denoiser(num_classes=3, label_dropout=0.1)
    ckpt = save_denoiser(denoiser, tmp_path / "model", {"method": "ConsistencyTraining"})
    model = Model(denoiser, device="cpu", batch_size=4)
    expected = model.sample(21, guidance=-2.0)
    assert not torch.equal(expected, model.sample(21))
    assert torch.equal(read_images(draw(ckpt, tmp_path / name, "guidance=-2")), expected)


def test_processes_guide_too(make_denoiser, tmp_path):
    denoiser = make_denoiser(num_classes=3, label_dropout=0.1).eval()
    ckpt = save_denoiser(denoiser, tmp_path / "model", {"method": "ConsistencyTraining"})
    job = processes.Job(str(ckpt), None, processes.weights_digest(denoiser), 3.0, ConsistencySampler(), 0, None)
    x, sigma, labels = torch.randn(2, 1, 4, 4), torch.ones(2), torch.tensor([0, 2])
    assert torch.equal(job.model(torch.device("cpu"))(x, sigma, labels), guided(denoiser, 3.0)(x, sigma, labels))


def test_settings_that_drew_nothing_bind_nothing(ckpt, tmp_path):
    with pytest.raises(ValueError, match="multistep levels must decrease"):
        draw(ckpt, tmp_path / "out", "sampler=multistep", "sampler.mid_sigmas=[3,5]")
    draw(ckpt, tmp_path / "out", "sampler=multistep", "sampler.mid_sigmas=[5,3]")


def test_damaged_files_are_drawn_again(ckpt, tmp_path):
    out = draw(ckpt, tmp_path / "out")
    before = digests(out)
    (out / "00005.png").write_bytes((out / "00005.png").read_bytes()[:-9])
    (out / "00009.png").write_bytes(b"")
    (out / "00020.png").unlink()
    draw(ckpt, tmp_path / "out")
    assert digests(out) == before


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("seed=1", "seed is 1 now, 0 there"),
        ("num_samples=22", "num_samples is 22 now, 21 there"),
        ("batch_size=5", "batch_size is 5 now, 4 there"),
        ("labels=[0,1]", r"labels is \[0, 1\] now, null there"),
        ("sampler=multistep", r"sampler.mid_sigmas is \[0.821\] now, \[\] there"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".npz"])
def test_other_settings_are_refused(ckpt, tmp_path, ending, option, words):
    out = draw(ckpt, tmp_path / f"out{ending}")
    before = digests(out)
    with pytest.raises(ValueError, match=words) as caught:
        draw(ckpt, out, option)
    assert "\n" not in str(caught.value)
    assert digests(out) == before


def test_naming_the_sampler_that_the_model_takes_anyway_changes_nothing(ckpt, tmp_path):
    before = digests(draw(ckpt, tmp_path / "out"))
    assert digests(draw(ckpt, tmp_path / "out", "sampler=onestep")) == before


def test_other_weights_are_refused(ckpt, make_denoiser, tmp_path):
    draw(ckpt, tmp_path / "out")
    save_denoiser(make_denoiser(num_classes=3), ckpt, {})
    with pytest.raises(ValueError, match="weights_digest is"):
        draw(ckpt, tmp_path / "out")


@pytest.mark.parametrize("name", ["out.npz", "out.png", "out"])
def test_what_others_made_stays(ckpt, tmp_path, name):
    path = tmp_path / name if "." in name else tmp_path / name / "mine.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match="name a new"):
        draw(ckpt, tmp_path / name)
    assert path.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == sorted([ckpt, tmp_path / name])


def test_hidden_files_of_others_stay(ckpt, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".download.partial").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        draw(ckpt, tmp_path / "out")
    assert (tmp_path / "out" / ".download.partial").read_text() == "mine"


def test_folder_that_is_not_finished_is_not_read(ckpt, tmp_path):
    out = draw(ckpt, tmp_path / "out")
    assert len(read_images(out)) == 21
    content = json.loads((out / "sampling.json").read_text())
    (out / "sampling.json").write_text(json.dumps({**content, "finished": False}))
    with pytest.raises(ValueError, match="is not complete"):
        read_images(out)


def test_npz_and_folder_and_grid_hold_the_same_images(ckpt, tmp_path):
    arrays = np.load(draw(ckpt, tmp_path / "a.npz", "labels=balanced"))
    assert arrays["arr_1"].tolist() == [0, 1, 2] * 7
    assert torch.equal(read_images(draw(ckpt, tmp_path / "a", "labels=balanced")), read_images(tmp_path / "a.npz"))
    grid = Image.open(draw(ckpt, tmp_path / "a.png", "labels=balanced"))
    shown = image_grid(read_images(tmp_path / "a"))
    assert np.array_equal(np.asarray(grid), shown.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("total", "first", "last"), [(10_000, "00000.png", "09999.png"),
                                                      (10_001, "00000/00000.png", "10000/10000.png"),
                                                      (200_000, "000000/000000.png", "199000/199999.png")])  # fmt: skip
def test_layout_of_many_images(tmp_path, total, first, last):
    parts = ImageParts(tmp_path, total, 4)
    end = (total - 1) // 4
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 1, 2, 2)
    size = len(parts.indices(end))
    parts.write(end, images[4 : 4 + size])
    parts.write(0, images[:4])
    assert (tmp_path / first).exists()
    assert (tmp_path / last).exists()
    assert read_images(tmp_path)[:, 0, 0, 0].tolist() == list(range(4 + size))
    assert parts.missing() == list(range(1, end))


@pytest.mark.parametrize(
    ("sampler", "evaluations", "frames"),
    [
        (ConsistencySampler([10, 3.0, 0.8]), 4, 4),
        (OdeSampler(sample_heun, num_steps=3), 5, 5),
        (OdeSampler(sample_dpm2, num_steps=3), 6, 7),  # its last step goes on from a midpoint
    ],
)
def test_trajectory(make_denoiser, record, sampler, evaluations, frames):
    boundary = 0.0 if isinstance(sampler, OdeSampler) else 0.002
    denoiser = make_denoiser(boundary=boundary, num_classes=3).eval()
    if isinstance(sampler, OdeSampler):
        denoiser.sigma_min = 1.0  # from lower down, no step to 0 is seen in whole grey levels
    calls = record(denoiser)
    result = trajectory(denoiser, sampler, num_samples=5, seed=0, batch_size=5, labels=None)
    assert (len(calls), result.shape) == (evaluations, (frames, 5, 1, 4, 4))
    parts = trajectory(denoiser, sampler, num_samples=5, seed=0, batch_size=2, labels=None)
    assert (parts.int() - result.int()).abs().max() <= 1
    first = denoiser(calls[0].x, calls[0].sigma, calls[0].labels)
    assert torch.equal(result[0], (first * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))


def test_strip_and_gif(ckpt, tmp_path):
    steps = ("sampler=multistep", "sampler.mid_sigmas=[10,0.8]", "num_samples=5", "trajectory=true")
    strip = np.asarray(Image.open(draw(ckpt, tmp_path / "strip.png", *steps)))
    assert strip.shape == (2 + 5 * 34, 2 + 3 * 34, 3)
    images = read_images(draw(ckpt, tmp_path / "single", *steps[:3]))
    column = image_grid(images, columns=1).permute(1, 2, 0).numpy()
    assert np.array_equal(strip[:, -36:], column)  # the last is the sample
    assert Image.open(draw(ckpt, tmp_path / "frames.gif", *steps)).n_frames == 3
    draw(ckpt, tmp_path / "frames.gif", *steps)  # its own may be replaced


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["out=a.png", "num_samples=4097"], "num_samples is 4097; allowed: at most 4,096"),
        (["out=a.gif"], "gif with trajectory=true"),
        (["out=a.jpg"], "out is a.jpg; allowed"),
        (["out=a", "trajectory=true"], "out is a; allowed"),
        (["out=a.png", "trajectory=true", "num_samples=65"], "num_samples is 65; allowed: at most 64"),
        (["out=a", "devices=0"], "devices is 0"),
        (["out=a", "devices=all"], "devices is all"),
        (["out=a.png", "devices=2"], "devices is 2; allowed: 1 or auto"),
        (["labels=some"], "labels is some; allowed: a label, a list"),
        (["guidance=much"], "guidance is much"),
    ],
)
def test_mistakes_are_one_line(overrides, words):
    with pytest.raises(ValueError, match=words) as caught:
        checked("ckpt=x", *overrides)
    assert "\n" not in str(caught.value)


def test_devices(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert find_devices("auto", "cpu", cpu) == [cpu]
    assert find_devices(3, "cpu", cpu) == [cpu] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_devices("auto", "auto", torch.device("cuda")) == [torch.device("cuda", r) for r in range(4)]
    assert find_devices("auto", "cuda:0", gpu) == [gpu]
    assert find_devices(1, "cuda", gpu) == [gpu]
    for count_, name in ((5, "cuda"), (2, "cuda:0")):
        with pytest.raises(ValueError, match=f"devices is {count_}"):
            find_devices(count_, name, gpu)


def test_full_batches_give_the_same_images(make_denoiser, record):
    model = make_denoiser(num_classes=3).eval()
    x, sigma, labels = torch.randn(5, 1, 8, 8), torch.full((5,), 3.0), torch.tensor([0, 1, 2, 0, 1])
    whole, calls = model(x, sigma, labels), record(model)
    full = in_full_batches(model, 5)
    with torch.no_grad():
        assert torch.equal(full(x, sigma, labels), whole)
        torch.testing.assert_close(full(x[:2], sigma[:2], labels[:2]), whole[:2])
    assert [len(call.x) for call in calls] == [5, 5]
    assert full.image_shape == model.image_shape


@pytest.mark.slow
def test_a_compiled_network_is_compiled_once_though_the_last_batch_is_smaller(ckpt, tmp_path):
    compiled = []

    def backend(module, inputs):
        compiled.append(len(inputs))
        return module.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, "counts_for_this_test")
    draw(ckpt, tmp_path / "plain")
    for devices, out in ((1, "one"), (2, "two")):
        if devices == 1:
            draw(ckpt, tmp_path / out, "compile=counts_for_this_test")
        else:
            draw(ckpt, tmp_path / out, "compile=eager", "devices=2")
        assert len(compiled) == 1
        same = read_images(tmp_path / out).int() - read_images(tmp_path / "plain").int()
        assert same.abs().max() <= 1
        assert len(read_images(tmp_path / out)) == 21


def test_how_the_network_is_run_is_a_setting_of_the_images(ckpt, tmp_path):
    """As it always was, nothing is written of it, and folders of earlier versions go on."""
    for number, options in enumerate((["dtype=bf16"], ["channels_last=true"], ["compile=eager"])):
        plain, other = tmp_path / f"plain{number}", tmp_path / f"other{number}"
        draw(ckpt, plain)
        draw(ckpt, other, *options)
        name, value = options[0].split("=")
        assert name not in json.loads((plain / "sampling.json").read_text())["settings"]
        assert str(json.loads((other / "sampling.json").read_text())["settings"][name]).lower() == value
        with pytest.raises(ValueError, match=f"other settings: {name}"):
            draw(ckpt, plain, *options)
        with pytest.raises(ValueError, match=f"other settings: {name}"):
            draw(ckpt, other)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("compile=nonsense", "compile is nonsense; allowed: true, false"),
        ("compile=3", "compile is 3"),
        ("dtype=fp8", "dtype is fp8"),
        ("dtype=fp16", "fp16 on a CPU"),
        ("channels_last=1", "channels_last is 1"),
    ],
)
def test_ways_to_run_that_do_not_exist_are_refused_before_anything_is_begun(ckpt, tmp_path, option, words):
    with pytest.raises(ValueError, match=words):
        draw(ckpt, tmp_path / "out", option)
    assert not (tmp_path / "out").exists()
