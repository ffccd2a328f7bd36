"""What several test files share: seeds, tiny models, a trainer that writes nothing, recorders, golden numbers."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from consistency.methods.base import Random
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.models.register import register_network
from consistency.models.unet import UNet
from snapshots import weights_of_rule

DATA = Path(__file__).parent / "data"

# Files that take longest: begun first, they leave no worker idle at the end.
LONGEST = (
    "test_sweep",
    "test_distributed",
    "test_faults",
    "test_extension",
    "test_docs_code",
    "test_cli",
    "test_resume",
    "test_configs",
    "test_against_others",
)

# The tests, and the commands that they start, must not depend on what the shell of the moment is set to.
for name in list(os.environ):
    if name.startswith(("SLURM_", "WANDB_", "HYDRA_", "CONSISTENCY_", "TORCHELASTIC_", "MLFLOW_")):
        del os.environ[name]
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "COLUMNS", "FORCE_COLOR", "PYTHONOPTIMIZE"):
    os.environ.pop(name, None)
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The longest files first, in that order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@register_network("tiny_test_network")
class TinyNetwork(nn.Module):
    """F(x, c_noise) = scale tanh(x + shift c_noise) + offset: an explicit function in place of the UNet."""

    in_channels, image_size, num_classes = 1, 2, 0

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.offset = nn.Parameter(torch.zeros(()))
        self.shift = shift

    def forward(self, x, c_noise, labels=None):
        return self.scale * torch.tanh(x + self.shift * c_noise.view(-1, 1, 1, 1)) + self.offset


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_network():
    return TinyNetwork


@pytest.fixture
def make_unet():
    """The smallest UNet, 4x4 grey images by default, with random weights everywhere (a fresh one is nearly zero)."""

    def make(*, random_weights=True, **options):
        small = {"image_size": 4, "in_channels": 1, "channels": 8, "channel_mult": [1], "num_blocks": 1}
        network = UNet(**{**small, "attention_resolutions": [], **options})
        if random_weights:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.normal_(std=0.3)
        return network

    return make


@pytest.fixture
def make_denoiser(make_unet):
    """A denoiser around `make_unet`; `boundary` and `label_dropout` are the denoiser's, the rest the network's."""

    def make(*, boundary=0.002, label_dropout=0.0, **options):
        return Denoiser(make_unet(**options), EDM(boundary=boundary), label_dropout=label_dropout)

    return make


@pytest.fixture
def fixed_random():
    """Random numbers for `Method.step`, chosen beforehand: levels (sigma, or a pair) and noise [B, C, H, W]."""

    def make(levels, noise):
        random = Random()
        random.uniform = lambda x: levels
        random.normal = lambda x: noise
        return random

    return make


@pytest.fixture
def record():
    """Watch the calls of a denoiser: x, sigma, labels and whether it was in train mode, one entry a call."""

    def start(module):
        calls = []

        def note(module, args):
            x, sigma, labels = (*args, None)[:3]
            calls.append(SimpleNamespace(x=x, sigma=sigma, labels=labels, training=module.training))

        module.register_forward_pre_hook(note)
        return calls

    return start


@pytest.fixture
def fit(tmp_path):
    """Train a method on random images for `steps` optimizer steps; returns the trainer."""

    import lightning as L  # takes seconds, which the process that only gives out tests does not need

    def run(method, *, steps=1, callbacks=(), accumulate=1, batch_size=4, images=None, labels=None):
        batches = steps * accumulate
        shape = (batches * batch_size, *method.denoiser.image_shape)
        images = torch.rand(shape) * 2 - 1 if images is None else images
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(method, loader)
        return trainer

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with finished runs of six steps, `outputs/smoke_edm` and `smoke_ict`; who changes one copies it."""
    from running import SHORT, run

    folder = tmp_path_factory.mktemp("trained")
    for method in ("edm", "ict"):
        run(folder, f"smoke_{method}", f"experiment=smoke_{method}", *SHORT)
    return folder


@pytest.fixture
def golden():
    """Numbers made by running openai/consistency_models: (tensors, how they were made)."""

    def read(name):
        return load_file(DATA / f"{name}.safetensors"), json.loads((DATA / f"{name}.json").read_text())

    return read


@pytest.fixture
def published(golden):
    """A network's golden numbers: (state dict of the original code, tensors, how they were made)."""

    def rebuild(name):
        tensors, how = golden(name)
        state = {key: torch.from_numpy(weights_of_rule(key, shape)) for key, shape in how["parameters"].items()}
        if "fourier_freqs" in tensors:
            state["model.map_noise.freqs"] = tensors["fourier_freqs"]
        return state, tensors, how

    return rebuild
