"""1, 2 and 4 processes measure the same."""

import pytest
import torch
import torch.distributed as dist

from consistency.evaluation.extractors import ClassifierExtractor
from consistency.evaluation.features import SmallClassifier
from consistency.evaluation.measure import batches_of_rank, measure
from consistency.evaluation.protocol import Evaluation
from consistency.evaluation.references import Reference
from consistency.evaluation.statistics import FeatureStatistics, Moments
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.models.unet import UNet
from consistency.sampling.samplers import ConsistencySampler

pytestmark = pytest.mark.slow
TOTAL = 203  # neither 2 nor 4 divide it


def image(index):
    """Sample `index`, uint8 [1, 8, 8]."""
    return torch.randint(256, (1, 8, 8), generator=torch.Generator().manual_seed(index)).to(torch.uint8)


def scores(rank, world_size, batch_size):
    """What one rank gets."""
    torch.manual_seed(0)
    extractor = ClassifierExtractor(SmallClassifier(1, 8, 5), accuracy=0.2)
    features = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).relu() / 8
    moments = Moments(features.double().mean(dim=0), features.double().T.cov())
    reference = Reference("toy", "", 300, "classifier", extractor.digest, moments, features)
    batches = (
        (torch.stack([image(int(index)) for index in indices]), indices)
        for indices in batches_of_rank(TOTAL, batch_size, rank=rank, world_size=world_size)
    )
    metrics = ("fd", "kd", "is", "precision", "recall")
    return measure(
        batches,
        total=TOTAL,
        extractor=extractor,
        reference=reference,
        metrics=metrics,
        allow_few=True,
        kid_subset_size=100,
    )


def sampled(rank, world_size):
    """Scores of what a model draws, and the images of this rank."""
    torch.manual_seed(0)
    network = UNet(
        image_size=8, in_channels=1, num_classes=3, channels=8, channel_mult=[1], num_blocks=1, attention_resolutions=[]
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    extractor = ClassifierExtractor(SmallClassifier(1, 8, 5), accuracy=0.2)
    features = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).relu() / 8
    moments = Moments(features.double().mean(dim=0), features.double().T.cov())
    reference = Reference("toy", "", 300, "classifier", extractor.digest, moments, features)
    evaluation = Evaluation(lambda data, **_: extractor, 45, "unused", batch_size=7, allow_few=True)
    seen = []
    extractor.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    row = evaluation.measure_sampler(
        Denoiser(network, EDM(boundary=0.002)).eval(),
        ConsistencySampler([1.0]),
        extractor,
        reference,
        seed=3,
        rank=rank,
        world_size=world_size,
    )
    return row["fd_classifier"], torch.cat(seen)


def errors():
    """What a rank says when a sample comes twice, once on each of two ranks; then when the first rank fails."""
    found = []
    statistics = FeatureStatistics(2, 0, total=4, keep_features=False)
    statistics.add(torch.zeros(2, 2), torch.zeros(2, 0), torch.tensor([[0, 1], [1, 3]][dist.get_rank()]))
    try:
        statistics.all_reduce()
    except ValueError as error:
        found.append(str(error))
    from consistency.evaluation import measure as module

    try:
        module._on_first_rank(lambda: 1 / 0, 1)
    except (ZeroDivisionError, RuntimeError) as error:
        found.append(type(error).__name__)
    return found


def work(rank, folder):
    torch.set_num_threads(1)
    results = {}
    for world_size in (4, 2):
        if rank < world_size:
            store = f"file://{folder}/store{world_size}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
            # 60: four batches; 120: two, so that with four ranks two have nothing.
            results[world_size] = [scores(rank, world_size, batch_size) for batch_size in (60, 120)]
            results[f"sampled{world_size}"] = sampled(rank, world_size)
            if world_size == 2:
                results["errors"] = errors()
            dist.destroy_process_group()
    torch.save(results, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=4)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


def test_any_number_of_processes_gives_the_same(ranks):
    for which, batch_size in enumerate((60, 120)):
        alone = scores(0, 1, batch_size)
        assert alone["fd_classifier"] > 0
        for world_size in (2, 4):
            for rank in range(world_size):
                assert ranks[rank][world_size][which] == pytest.approx(alone, rel=1e-9), (world_size, rank)


def test_repeated_samples_are_seen_over_ranks(ranks):
    message = "4 samples were announced, 4 came, 3 of them distinct"
    assert ranks[0]["errors"] == [message, "ZeroDivisionError"]
    assert ranks[1]["errors"] == [message, "RuntimeError"]


def test_any_number_of_processes_draws_the_same_images(ranks):
    score, images = sampled(0, 1)
    for world_size in (2, 4):
        parts = [ranks[rank][f"sampled{world_size}"] for rank in range(world_size)]
        assert all(part[0] == pytest.approx(score, rel=1e-9) for part in parts)
        drawn = torch.cat([part[1] for part in parts])
        assert sorted(map(bytes, drawn.flatten(1).numpy())) == sorted(map(bytes, images.flatten(1).numpy()))
